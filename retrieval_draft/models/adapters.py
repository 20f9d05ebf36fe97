"""Models with a LoRA adapter, over the weights of one model."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from retrieval_draft._files import expanded
from retrieval_draft.errors import InvalidInputError, ModelFileError

__all__ = ["check_adapter", "read_adapters", "with_adapter"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def read_adapters(given: Iterable[str], model_name: str) -> dict[str, Path]:
    """Folders of adapters by name.

    Args:
        given: ``NAME=FOLDER`` each.
        model_name: Of the model, which no adapter may have.

    Raises:
        InvalidInputError: A word is not of that form, or a name is no name or given twice.
    """
    found: dict[str, Path] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals or not folder or not _NAME.fullmatch(name):
            raise InvalidInputError(f"The adapter {word!r} is not of the form NAME=FOLDER.")
        if name in found or name == model_name:
            raise InvalidInputError(f"Two models are called {name!r}.", "Give each adapter its own name.")
        found[name] = Path(folder)
    return found


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
            f"The adapter {str(folder)!r} does not fit {type(model).__name__}: "
            f"{type(error).__name__}: {first}"
        ) from error


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModelFileError(
            "Adapters are read by PEFT, which is not installed.", 'Run: pip install "retrieval_draft[lora]"'
        ) from error
    return peft
