"""The file of an adjacency matrix: rows and counts of order 0, in the history's folder and in snapshots."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from pathlib import Path
from weakref import WeakSet

import msgspec
import numpy as np
import xxhash

from retrieval_draft._files import read_bounded, replace_file
from retrieval_draft.errors import DatastoreError, TokenizerMismatchError
from retrieval_draft.index.adjacency import CLOCK, AdjacencyMatrix
from retrieval_draft.index.frequent import FADE, MAX_IDS
from retrieval_draft.index.matrix_rows import MatrixRows

__all__ = ["MOST_BYTES", "KeptMatrix", "load_matrix", "matrix_bytes", "merge_bytes", "save_matrix"]

MOST_BYTES = 1 << 30
"""Size beyond which a file is not read."""

SAVE_SECONDS = 60.0
"""Seconds of requests that a killed process loses at most."""

KIND = "retrieval_draft adjacency matrix"
FORMAT_VERSION = 1

_log = logging.getLogger("retrieval_draft")


class _File(msgspec.Struct, frozen=True):
    """Contents of the file, as MessagePack. Numbers are little-endian.

    Attributes:
        kind: Always `KIND`.
        format_version: Of this layout.
        fingerprint: Of the tokenizer; empty where there was none.
        top_k: Next tokens of a row.
        keys: uint64, of each row.
        visits: int32, of each row.
        times: int32, of each row.
        tokens: int32, `top_k` of each row.
        probs: float32, `top_k` of each row.
        ids: int32. Order 0.
        counts: float32, of each of `ids`.
        xxh3: Of all of these in turn.
    """

    kind: str
    format_version: int
    fingerprint: str
    top_k: int
    keys: memoryview
    visits: memoryview
    times: memoryview
    tokens: memoryview
    probs: memoryview
    ids: memoryview
    counts: memoryview
    xxh3: str


_ARRAYS = {
    "keys": "<u8",
    "visits": "<i4",
    "times": "<i4",
    "tokens": "<i4",
    "probs": "<f4",
    "ids": "<i4",
    "counts": "<f4",
}


def matrix_bytes(matrix: AdjacencyMatrix, fingerprint: str) -> bytes:
    """The contents of a file with all rows of a matrix.

    Args:
        matrix: It may be in use.
        fingerprint: Of the tokenizer; empty where there is none.
    """
    rows = matrix.rows()
    ids, counts = matrix.frequent()
    arrays = {
        "keys": rows.keys,
        "visits": rows.visits,
        "times": rows.times,
        "tokens": rows.tokens,
        "probs": rows.probs,
        "ids": ids,
        "counts": counts,
    }
    parts = {
        name: memoryview(np.ascontiguousarray(arrays[name], kind).view(np.uint8).reshape(-1).data)
        for name, kind in _ARRAYS.items()
    }
    return msgspec.msgpack.encode(
        _File(KIND, FORMAT_VERSION, fingerprint, matrix.top_k, **parts, xxh3=_checksum(parts))
    )


def merge_bytes(matrix: AdjacencyMatrix, content: bytes, fingerprint: str, vocabulary: int) -> None:
    """Merges the rows of `matrix_bytes` into a matrix.

    Args:
        matrix: Changed.
        content: Of any origin; every number is checked first.
        fingerprint: That the file should have.
        vocabulary: Number of token ids.

    Raises:
        DatastoreError: It is torn, of another format, or holds what no matrix learns; nothing was merged.
        TokenizerMismatchError: It belongs to another tokenizer.
    """
    try:
        file = msgspec.msgpack.decode(content, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DatastoreError(f"It is torn: {error}.") from error
    if (file.kind, file.format_version) != (KIND, FORMAT_VERSION):
        raise DatastoreError(
            f"It is {file.kind[:80]!r}, format version {file.format_version}; expected is {KIND!r}, "
            f"{FORMAT_VERSION}."
        )
    if file.fingerprint != fingerprint:
        raise TokenizerMismatchError(
            f"It belongs to the tokenizer {file.fingerprint[:80]!r}, not {fingerprint!r}.",
            "Name another folder for each tokenizer.",
        )
    parts = {name: getattr(file, name) for name in _ARRAYS}
    if file.xxh3 != _checksum(parts):
        raise DatastoreError(f"It was altered: its checksum is {file.xxh3[:40]!r}.")
    found = {}
    for name, kind in _ARRAYS.items():
        if len(parts[name]) % np.dtype(kind).itemsize:
            raise DatastoreError(f"{name} has {len(parts[name])} bytes.")
        found[name] = np.frombuffer(parts[name], kind).astype(np.dtype(kind).newbyteorder("="), copy=False)
    count = len(found["keys"])
    sizes = {name: len(array) for name, array in found.items()}
    if not 1 <= file.top_k <= 1 << 10 or any(
        sizes[name] != count * (file.top_k if name in ("tokens", "probs") else 1)
        for name in ("visits", "times", "tokens", "probs")
    ):
        raise DatastoreError(f"{count} rows of {file.top_k} tokens do not have the sizes {sizes}.")
    _check_numbers(found, sizes, vocabulary)
    rows = MatrixRows(
        found["keys"],
        found["visits"],
        found["times"],
        found["tokens"].reshape(count, file.top_k),
        found["probs"].reshape(count, file.top_k),
    )
    rows.check(vocabulary)
    matrix.merge_frequent(found["ids"], found["counts"])
    matrix.merge(rows)


def _check_numbers(found: dict[str, np.ndarray], sizes: dict[str, int], vocabulary: int) -> None:
    """Checks what `MatrixRows.check` does not: times, and the counts of order 0."""
    times, ids, counts = found["times"], found["ids"], found["counts"]
    if sizes["times"] and not 0 <= int(times.min()) <= int(times.max()) < CLOCK - 1:
        raise DatastoreError(f"A time is {times.min()} or {times.max()}; allowed is 0 to {CLOCK - 2}.")
    if sizes["ids"] != sizes["counts"]:
        raise DatastoreError(f"{sizes['ids']} ids have {sizes['counts']} counts.")
    if sizes["ids"]:
        most = min(vocabulary, MAX_IDS)
        ascending = bool((np.diff(ids) > 0).all())
        if not (ascending and int(ids[0]) >= 0 and int(ids[-1]) < most):
            raise DatastoreError(f"Counted ids are not ascending numbers in 0..{most - 1}.")
        if not bool(((counts >= 0) & (counts <= 2 * FADE)).all()):
            raise DatastoreError(f"A count is {counts.min()} or {counts.max()}; allowed is 0 to {2 * FADE}.")


def save_matrix(matrix: AdjacencyMatrix, path: Path, fingerprint: str) -> None:
    """Writes a matrix's file, replaced atomically. On a full disk it is lost, and nothing else fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, matrix_bytes(matrix, fingerprint))
    except OSError as error:
        _log.warning("The adjacency matrix could not be saved to %s: %s", path, error)


def load_matrix(matrix: AdjacencyMatrix, path: Path, fingerprint: str, vocabulary: int) -> bool:
    """Merges a matrix's file, where there is one.

    Returns:
        False where it may not be replaced, as it belongs to another tokenizer. One that is torn or cannot be
        read is started afresh.
    """
    if not path.exists():
        return True
    try:
        merge_bytes(matrix, read_bounded(path, MOST_BYTES), fingerprint, vocabulary)
    except TokenizerMismatchError as error:
        _log.warning("The adjacency matrix is not kept. %s cannot be used: %s", path, error)
        return False
    except (OSError, ValueError, DatastoreError) as error:
        _log.warning("The adjacency matrix starts afresh. %s cannot be used: %s", path, error)
    return True


def _checksum(parts: dict[str, memoryview]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts.values():
        digest.update(part)
    return digest.hexdigest()


class KeptMatrix:
    """A matrix that is kept on disk: read at the start, written now and then, at `save`, and at exit.

    The last of several processes that write one file wins; each has read it at its start.

    Args:
        matrix: The matrix.
        path: Its file.
        fingerprint: Of the tokenizer. A file of another one is neither read nor replaced.
        vocabulary: Number of token ids.
    """

    def __init__(self, matrix: AdjacencyMatrix, path: Path, fingerprint: str, vocabulary: int) -> None:
        self._matrix, self._path, self._fingerprint = matrix, path, fingerprint
        self._lock = threading.Lock()
        self._writes = load_matrix(matrix, path, fingerprint, vocabulary)
        self._saved = matrix.clock
        self._at = time.monotonic()
        self._process = os.getpid()
        _kept.add(self)

    def save_sometimes(self) -> None:
        """Has a thread save it where the last time is a while ago. Never blocks."""
        if time.monotonic() - self._at > SAVE_SECONDS:
            self._at = time.monotonic()
            threading.Thread(target=self.save, name="retrieval_draft matrix", daemon=True).start()

    def save(self) -> None:
        """Saves it, if anything was learned since the last time; not in the child of a fork."""
        if os.getpid() != self._process:
            return
        with self._lock:
            clock = self._matrix.clock
            if clock != self._saved and self._writes:
                save_matrix(self._matrix, self._path, self._fingerprint)
                self._saved, self._at = clock, time.monotonic()


_kept: WeakSet[KeptMatrix] = WeakSet()


@atexit.register
def _at_exit() -> None:
    for each in list(_kept):
        each.save()
