"""Rows of an adjacency matrix apart from it: what is merged, written to disk, and sent to other servers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.source import TokenArray

__all__ = ["MOST_VISITS", "MatrixRows", "pack_rows", "packed_sizes", "unpack_rows"]

MOST_VISITS = 1 << 20
"""Limit of a row's count: beyond it a sum of counts could not grow further within its 32 bits."""

LEAST_PROB = 1 / 64
"""Next tokens below it are not sent: they are drafted seldom, and each costs three to five bytes."""

_MOST_SENT = 255
_STEPS = 16
"""Steps of a sent probability's logarithm for each halving: it is off by 2.2% at most."""

_HEADER = struct.Struct("<BIB")
_kernels = LazyKernels("retrieval_draft.index._kernels.rows")


@dataclass(frozen=True, slots=True)
class MatrixRows:
    """Averaged next tokens of n-grams, which are known by their hash.

    Attributes:
        keys: uint64, shape (m,). From `key_of`.
        visits: int32, shape (m,). Observations in each mean.
        times: int32, shape (m,). When each was written last; larger is later.
        tokens: int32, shape (m, k). Most probable first, -1 where there are fewer.
        probs: float32, shape (m, k).
    """

    keys: NDArray[np.uint64]
    visits: NDArray[np.int32]
    times: NDArray[np.int32]
    tokens: TokenArray
    probs: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(getattr(self, field.name).nbytes) for field in fields(self))

    def only(self, chosen: NDArray[np.int64]) -> MatrixRows:
        """Some of the rows, by index."""
        return MatrixRows(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @staticmethod
    def join(parts: Sequence[MatrixRows]) -> MatrixRows:
        """All rows of `parts`, one or more, in a copy."""
        return MatrixRows(
            *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(MatrixRows))
        )

    def check(self, vocabulary: int) -> None:
        """Checks that every number is one that a matrix can have learned.

        Raises:
            DatastoreError: Names the first row that is not.
        """
        row = _kernels.first_unsound(self.keys, self.visits, self.tokens, self.probs, vocabulary, MOST_VISITS)
        if row >= 0:
            raise DatastoreError(
                f"Row {row} of {len(self)} was never learned: {self.visits[row]} observations, tokens "
                f"{self.tokens[row].tolist()}, probabilities {self.probs[row].tolist()}."
            )


def packed_sizes(rows: MatrixRows, vocabulary: int) -> NDArray[np.int64]:
    """Bytes of each row as packed by `pack_rows`: int64, shape (m,)."""
    sent = (rows.tokens >= 0) & (rows.probs >= LEAST_PROB)
    sizes: NDArray[np.int64] = 10 + sent.sum(1) * (_width(vocabulary) + 1)
    return sizes


def pack_rows(rows: MatrixRows, vocabulary: int) -> bytes:
    """Packs rows to be sent: keys, counts, and the next tokens that are probable enough.

    A probability p is sent as the byte nearest to -16 log2 p, and so off by 2.2% at most.

    Args:
        rows: Each with a first token that is probable enough; counts beyond 255 are sent as that.
        vocabulary: Number of token ids, which decides whether an id takes two bytes or four.

    Example:
        one row, seen twice, tokens [7, 4], probabilities [.5, .25], of 100 ids: 6 bytes of header, 8 of key,
        02 02 07 00 04 00 10 20
    """
    sent = (rows.tokens >= 0) & (rows.probs >= LEAST_PROB)
    wide = f"<u{_width(vocabulary)}"
    codes = np.rint(-_STEPS * np.log2(np.clip(rows.probs[sent], LEAST_PROB, 1.0)))
    return b"".join(
        (
            _HEADER.pack(_width(vocabulary), len(rows), rows.tokens.shape[1]),
            rows.keys.astype("<u8").tobytes(),
            np.clip(rows.visits, 1, _MOST_SENT).astype(np.uint8).tobytes(),
            sent.sum(1).astype(np.uint8).tobytes(),
            rows.tokens[sent].astype(wide).tobytes(),
            codes.astype(np.uint8).tobytes(),
        )
    )


def unpack_rows(packed: bytes, vocabulary: int, top_k: int, most: int) -> MatrixRows:
    """Reads and checks what `pack_rows` made; times are 0.

    Args:
        packed: Of any origin.
        vocabulary: Number of token ids.
        top_k: Next tokens of a row at most.
        most: Rows at most.

    Raises:
        DatastoreError: It is torn, or holds numbers that no matrix can have learned.
    """
    if len(packed) < _HEADER.size:
        raise DatastoreError(f"Rows take {_HEADER.size} bytes at least; there are {len(packed)}.")
    width, count, columns = _HEADER.unpack_from(packed)
    if width != _width(vocabulary) or not 1 <= count <= most or not 1 <= columns <= top_k:
        raise DatastoreError(f"{count} rows of {columns} tokens, {width} bytes each, are not expected here.")
    body = memoryview(packed)[_HEADER.size :]
    if len(body) < 10 * count:
        raise DatastoreError(f"{count} rows take {10 * count} bytes at least; there are {len(body)}.")
    sizes = np.frombuffer(body, np.uint8, count, 9 * count)
    total = int(sizes.sum())
    if int(sizes.max()) > columns or len(body) != 10 * count + total * (width + 1):
        raise DatastoreError(f"{count} rows with {total} tokens do not take {len(body)} bytes.")
    kept = np.arange(columns) < sizes[:, None]
    ids = np.frombuffer(body, f"<u{width}", total, 10 * count)
    codes = np.frombuffer(body, np.uint8, total, 10 * count + total * width)
    if total and int(ids.max()) >= vocabulary:
        raise DatastoreError(f"The token id {int(ids.max())} is none of {vocabulary}.")
    tokens, probs = np.full(kept.shape, -1, np.int32), np.zeros(kept.shape, np.float32)
    tokens[kept] = ids
    probs[kept] = np.exp2(codes.astype(np.float32) / -_STEPS)
    probs /= np.maximum(probs.sum(1, keepdims=True), 1.0)  # rounding may have made more than all of it
    rows = MatrixRows(
        np.frombuffer(body, "<u8", count).astype(np.uint64),
        np.frombuffer(body, np.uint8, count, 8 * count).astype(np.int32),
        np.zeros(count, np.int32),
        tokens,
        probs,
    )
    rows.check(vocabulary)
    return rows


def _width(vocabulary: int) -> int:
    """Bytes of a sent token id."""
    return 2 if vocabulary <= 1 << 16 else 4
