"""The file of a calibration: safetensors, sources by name, a row for each learned set of sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.errors import DatastoreError

__all__ = ["DELETE", "StoredCalibration", "decode_calibration", "encode_calibration"]

VERSION = "3"
SECOND_VERSION = "2"
FIRST_VERSION = "1"
FIRST_SOURCES = ("automaton", "adjacency", "history", "phrases", "corpus", "shared", "model", "siblings")
"""A file of version 1 names no sources: it holds every set of these eight, bit by bit, and all parameters in
one row, kind by kind. Those of the first release have no sharpness. Version 2 has no terms of a token's
occurrences, the last columns of the parameters."""

MAX_LEARNED = 1e6
"""Limit of every saved number."""

DELETE = "Delete it: what it knows is learned again."


@dataclass(frozen=True, slots=True)
class StoredCalibration:
    """Learned terms of sources in a file. A set of sources is a bit mask with bit i for ``sources[i]``.

    Attributes:
        sources: Names, "" for an unused bit.
        sets: int64, shape (sets,), ascending. All other sets have their initial terms.
        weights: float64, shape (sets, len(sources) + 1).
        expected: float64, shape (sets, BINS).
        accepted: float64, shape (sets, BINS).
        sharpness: float64, shape (sets, 2); None where all of them are initial.
        parameters: float64, shape (len(sources), PARAMETERS).
    """

    sources: tuple[str, ...]
    sets: NDArray[np.int64]
    weights: NDArray[np.float64]
    expected: NDArray[np.float64]
    accepted: NDArray[np.float64]
    sharpness: NDArray[np.float64] | None
    parameters: NDArray[np.float64]

    def only(self, slots: Mapping[str, int], size: int) -> StoredCalibration:
        """The same for the sources in `slots` only, each with its bit there; sets with others are left out.

        Args:
            slots: Bits by name, below `size`, all different.
            size: Sources of the result.

        Example:
            sources ("a", "b"), sets [1, 2, 3], slots {"b": 5}  ->  sets [32]
        """
        moves = [(bit, slots[name]) for bit, name in enumerate(self.sources) if name in slots]
        known = sum(1 << bit for bit, _ in moves)
        kept = self.sets & ~known == 0
        sources = [""] * size
        sets = np.zeros(int(kept.sum()), np.int64)
        weights = np.zeros((len(sets), size + 1))
        weights[:, -1] = self.weights[kept, -1]
        parameters = np.zeros((size, self.parameters.shape[1]))
        for bit, slot in moves:
            sources[slot] = self.sources[bit]
            sets |= (self.sets[kept] >> bit & 1) << slot
            weights[:, slot] = self.weights[kept, bit]
            parameters[slot] = self.parameters[bit]
        sharpness = None if self.sharpness is None else self.sharpness[kept]
        return StoredCalibration(
            tuple(sources), sets, weights, self.expected[kept], self.accepted[kept], sharpness, parameters
        )


def encode_calibration(stored: StoredCalibration) -> bytes:
    """The contents of a file.

    Args:
        stored: With sharpness.
    """
    from safetensors.numpy import save

    arrays = {name: getattr(stored, name).astype(np.float32) for name in _SHAPED}
    about = {
        "format": "retrieval_draft calibration",
        "version": VERSION,
        "sources": json.dumps(stored.sources),
    }
    return save(arrays | {"sets": stored.sets.astype(np.int32)}, about)


def decode_calibration(content: bytes, name: str) -> StoredCalibration:
    """Decodes a file of this format or an earlier one.

    Args:
        content: Of any origin; every number is checked.
        name: Of the file, for messages.

    Raises:
        DatastoreError: It is torn, of another format, or holds impossible numbers.
    """
    from safetensors.numpy import load

    from retrieval_draft.drafting._kernels.fusion import SOURCES, TIMES

    try:
        about = _metadata(content)
        version = about.get("version")
        if version not in (VERSION, SECOND_VERSION, FIRST_VERSION):
            raise DatastoreError(
                f"{name} has calibration format {version!r}; this release reads {FIRST_VERSION!r} to "
                f"{VERSION!r}.",
                DELETE,
            )
        present = load(content)
        arrays: dict[str, NDArray[Any]] = {
            each: present[each] for each in ("sets", *_SHAPED) if each in present
        }
        if version == FIRST_VERSION:
            sources = [*FIRST_SOURCES]
            arrays = _as_this_version(arrays)
        else:
            sources = json.loads(about["sources"])
        if version != VERSION:
            arrays["parameters"] = np.pad(arrays["parameters"], ((0, 0), (0, TIMES)))
        wrong = _wrong(arrays, sources, SOURCES)
    except DatastoreError:
        raise
    except Exception as error:  # safetensors and numpy raise many types for a broken header
        raise DatastoreError(f"{name} is no calibration: {error}.", DELETE) from error
    if wrong:
        raise DatastoreError(f"{name}: {wrong}.", DELETE)
    numbers = {name: arrays[name].astype(np.float64) for name in _SHAPED if name in arrays}
    sharpness = numbers.pop("sharpness", None)
    return StoredCalibration(tuple(sources), arrays["sets"].astype(np.int64), sharpness=sharpness, **numbers)


def _metadata(content: bytes) -> dict[str, Any]:
    """Names and values in the header of safetensors: eight bytes of its length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    return dict(about)


_SHAPED = ("weights", "expected", "accepted", "sharpness", "parameters")


def _as_this_version(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays of a file of version 1, one row a set, one row of parameters a source."""
    from retrieval_draft.drafting._kernels.fusion import BINS, DEPTHS, LENGTHS, RANKS

    count = len(FIRST_SOURCES)
    arrays["sets"] = np.arange(1 << count)
    for name in ("expected", "accepted"):
        arrays[name] = arrays[name].reshape(-1, BINS)
    # Absent beside lookups and absent beside a model are two kinds.
    sizes = [count * each for each in (LENGTHS, LENGTHS, DEPTHS, RANKS, 1)]
    kinds = np.split(arrays["parameters"], np.cumsum(sizes))
    arrays["parameters"] = np.concatenate([kind.reshape(count, -1) for kind in kinds], 1)
    return arrays


def _wrong(arrays: Mapping[str, NDArray[Any]], sources: Any, most: int) -> str:
    """Fault of a file's names or arrays; empty without one."""
    from retrieval_draft.drafting._kernels.fusion import BINS, PARAMETERS

    are_names = isinstance(sources, list) and all(isinstance(name, str) for name in sources)
    named = [name for name in sources if name] if are_names else []
    if not are_names or len(set(named)) < len(named):
        return f"sources are {sources!r}; they should be names, each once"
    count = len(sources)
    if count > most:
        return f"it knows {count} sources; this release tells {most} apart"
    sets = arrays["sets"]
    steps = np.diff(sets.astype(np.int64)) if sets.ndim == 1 and sets.dtype.kind in "iu" else np.zeros(1)
    if not (steps > 0).all() or (len(sets) and not 0 <= int(sets[0]) <= int(sets[-1]) < 1 << count):
        return f"sets of sources are not ascending numbers in 0..{(1 << count) - 1}"
    shapes = {
        "weights": (len(sets), count + 1),
        "expected": (len(sets), BINS),
        "accepted": (len(sets), BINS),
        "sharpness": (len(sets), 2),
        "parameters": (count, PARAMETERS),
    }
    for name, shape in shapes.items():
        array = arrays[name] if name != "sharpness" else arrays.get(name, np.zeros(shape))
        # Learned numbers stay far below; beyond the limit, sums of a few terms could overflow.
        low = 0.0 if name in ("expected", "accepted") else -MAX_LEARNED
        if array.shape != shape or not ((array >= low) & (array <= MAX_LEARNED)).all():
            return (
                f"{name} has shape {array.shape} or holds what is never learned; it should be {shape} of "
                f"numbers in {low:g}..{MAX_LEARNED:g}"
            )
    return ""
