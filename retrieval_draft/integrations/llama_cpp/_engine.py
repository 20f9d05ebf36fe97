"""Import of llama-cpp-python, which is optional."""

from __future__ import annotations

import importlib
from typing import Any

from retrieval_draft.errors import InvalidInputError

__all__ = ["llama_cpp"]


def llama_cpp() -> Any:
    """The package `llama_cpp`.

    Raises:
        InvalidInputError: It is not installed, or cannot be loaded here.
    """
    try:
        return importlib.import_module("llama_cpp")
    except ModuleNotFoundError as error:
        raise InvalidInputError(
            "llama-cpp-python is not installed.", 'Run: pip install "retrieval_draft[llama]"'
        ) from error
    except (OSError, RuntimeError) as error:
        raise InvalidInputError(
            f"llama-cpp-python is installed but does not load: {error}.",
            "Install it again, built on this machine.",
        ) from error
