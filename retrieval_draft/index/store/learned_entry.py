"""The content of an entry with what was learned: rows, where replies begin, or a calibration."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.matrix_rows import MatrixRows, pack_rows, unpack_rows

__all__ = [
    "MOST_MARKS",
    "MOST_ROWS",
    "TOP",
    "LearnedEntry",
    "pack_calibration",
    "pack_learned",
    "unpack_learned",
]

TOP = 8
"""Next tokens of a sent row."""

MOST_ROWS = 4096
MOST_MARKS = 1024

_ROWS, _CALIBRATION = 1, 2
_HEAD = struct.Struct("<BH")
_MARK = struct.Struct("<QI")


@dataclass(frozen=True, slots=True)
class LearnedEntry:
    """Rows, marks or a calibration that a server has learned since its last such entry.

    Attributes:
        rows: Rows of n-grams; None for none.
        marks: Sequence numbers of runs that begin with a prompt's text, and where the reply begins in each.
        calibration: A file of `Calibration.save`; empty for none.
    """

    rows: MatrixRows | None = None
    marks: Sequence[tuple[int, int]] = ()
    calibration: bytes = b""


def pack_learned(rows: MatrixRows | None, marks: Sequence[tuple[int, int]], vocabulary: int) -> bytes:
    """Packs rows and marks.

    Args:
        rows: At most `MOST_ROWS`, of `TOP` tokens; None for none.
        marks: At most `MOST_MARKS`.
        vocabulary: Number of token ids.
    """
    packed = b"" if rows is None or not len(rows) else pack_rows(rows, vocabulary)
    return _HEAD.pack(_ROWS, len(marks)) + b"".join(_MARK.pack(*mark) for mark in marks) + packed


def pack_calibration(content: bytes) -> bytes:
    """Packs a calibration's file."""
    return _HEAD.pack(_CALIBRATION, 0) + content


def unpack_learned(packed: bytes, vocabulary: int) -> LearnedEntry:
    """Reads and checks an entry's content; that of a calibration is checked by its reader.

    Raises:
        DatastoreError: It is torn, or no server can have learned it.
    """
    if len(packed) < _HEAD.size:
        raise DatastoreError(f"It has {len(packed)} bytes.")
    kind, count = _HEAD.unpack_from(packed)
    if kind == _CALIBRATION and not count:
        return LearnedEntry(calibration=packed[_HEAD.size :])
    end = _HEAD.size + count * _MARK.size
    if kind != _ROWS or count > MOST_MARKS or len(packed) < end:
        raise DatastoreError(f"It is of kind {kind} with {count} marks in {len(packed)} bytes.")
    marks = [_MARK.unpack_from(packed, _HEAD.size + each * _MARK.size) for each in range(count)]
    rows = unpack_rows(packed[end:], vocabulary, TOP, MOST_ROWS) if len(packed) > end else None
    return LearnedEntry(rows, marks)
