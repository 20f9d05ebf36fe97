from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

from retrieval_draft._settings import Range, check_ranges, field_docs
from retrieval_draft.errors import InvalidInputError


@dataclass(frozen=True)
class Sizes:
    """Sizes of something.

    Attributes:
        rows: Rows of ``it``, as in
            `Sizes`.
        seconds: Limit: none by default.

    Example:
        rows: no field
    """

    rows: Annotated[int, Range(1, 64)] = 8
    seconds: Annotated[float | None, Range(0.5, 60)] = None
    name: str = ""

    def __post_init__(self) -> None:
        check_ranges(self)


def test_values_lie_in_their_ranges() -> None:
    Sizes(1, 60.0)
    Sizes(64, 0.5)
    for rows, seconds, message in (
        (0, None, "rows is 0; it must lie in 1..64."),
        (65, None, "rows is 65; it must lie in 1..64."),
        (8, 0.4, r"seconds is 0.4; it must lie in 0.5..60."),
        (8, float("nan"), "seconds is nan; it must lie in 0.5..60."),
    ):
        with pytest.raises(InvalidInputError) as raised:
            Sizes(rows, seconds)
        assert raised.value.message == message


def test_docs_are_lines_without_markup() -> None:
    assert field_docs(Sizes) == {
        "rows": "Rows of it, as in Sizes.",
        "seconds": "Limit: none by default.",
    }
