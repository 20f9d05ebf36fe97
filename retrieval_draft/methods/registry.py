"""Methods by name. A new method is one file, one line in `config.METHODS`, and its tests."""

from __future__ import annotations

from importlib import import_module

from retrieval_draft.config import METHODS
from retrieval_draft.errors import UnknownMethodError
from retrieval_draft.methods.method import Method

__all__ = ["get_method"]


def get_method(name: str) -> Method:
    """The method of that name; its module is imported here.

    Raises:
        UnknownMethodError: There is none.
    """
    if name not in METHODS:
        raise UnknownMethodError(f"Unknown method {name!r}.", f"Choose one of: {', '.join(METHODS)}.")
    method: Method = import_module(f"retrieval_draft.methods.{name}").METHOD
    return method
