"""Models with a LoRA adapter, over the weights of one model."""

from __future__ import annotations

import copy
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

from retrieval_draft._files import expanded
from retrieval_draft.errors import ModelFileError

__all__ = ["check_adapter", "with_adapter"]


def check_adapter(folder: str | Path) -> Path:
    """The folder of an adapter.

    Raises:
        ModelFileError: It holds none, or PEFT is not installed.
    """
    path = expanded(folder)
    if not (path / "adapter_config.json").is_file():
        raise ModelFileError(
            f"The folder {str(folder)!r} holds no adapter: adapter_config.json is missing.",
            "Name a folder that save_pretrained of a PEFT model wrote.",
        )
    _peft()
    return path


def with_adapter(model: Any, folder: str | Path) -> Any:
    """The PEFT model of an adapter, whose other weights are those of `model`, in the same memory.

    `model` itself stays as it is, so that several adapters and the model without any can be used at once.

    Args:
        model: A model of transformers.
        folder: As written by ``save_pretrained`` of a PEFT model.

    Raises:
        ModelFileError: There is no such adapter, or not for this model.
    """
    path = check_adapter(folder)
    shared: dict[int, Any] = {id(each): each for each in chain(model.parameters(), model.buffers())}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's own calls
            return _peft().PeftModel.from_pretrained(copy.deepcopy(model, shared), str(path)).eval()
    except Exception as error:  # any type: PEFT has errors of many
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelFileError(
            f"The adapter {str(folder)!r} does not fit {type(model).__name__}: {type(error).__name__}: {first}"
        ) from error


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModelFileError(
            "Adapters are read by PEFT, which is not installed.", 'Run: pip install "retrieval_draft[lora]"'
        ) from error
    return peft
