"""Settings as dataclasses: the ranges and the texts that their fields declare."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Annotated, Any, NamedTuple, get_origin, get_type_hints

from retrieval_draft.errors import InvalidInputError

__all__ = ["Range", "check_range", "check_ranges", "field_docs", "field_metadata"]


class Range(NamedTuple):
    """Least and greatest value of a field: ``rows: Annotated[int, Range(1, 64)] = 8``."""

    low: float
    high: float


@cache
def field_metadata(kind: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Type and annotations of every field by name; no annotations where the field has plain types."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())
        for name, hint in hints.items()
    }


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Checks a number that a user gives.

    Raises:
        InvalidInputError: It lies outside of `low` to `high`.
    """
    if not low <= value <= high:
        raise InvalidInputError(f"{name} is {value}; it must lie in {low}..{high}.")


def check_ranges(settings: Any) -> None:
    """Checks the fields of a dataclass that declare a `Range`; None lies in each.

    Raises:
        InvalidInputError: A value lies outside.
    """
    for name, (_, metadata) in field_metadata(settings.__class__).items():
        for each in metadata:
            value = getattr(settings, name)
            if isinstance(each, Range) and value is not None:
                check_range(name, value, *each)


@cache
def field_docs(kind: type) -> dict[str, str]:
    """The entries of a docstring's ``Attributes:`` section by name, each as one line without markup."""
    section = re.search(r"^Attributes:\n((?:    .*\n?)*)", inspect.getdoc(kind) or "", re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text).replace("`", "") for name, text in entries}
