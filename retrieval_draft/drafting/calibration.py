"""Calibration of the sources' estimates, learned from accepted tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._files import read_bounded, replace_file
from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.config import DRAFT_MODEL, SOURCES
from retrieval_draft.drafting.calibration_format import (
    DELETE,
    StoredCalibration,
    decode_calibration,
    encode_calibration,
)
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.source import Proposal, TokenArray

__all__ = ["FEATURES", "Calibration", "NoiseKey", "columns_of"]

_kernels = LazyKernels("retrieval_draft.drafting._kernels.fusion")

FEATURES = ("length", "depth", "rank", "absent", "request", "cells", "occurrences", "noise")
"""Evidence that can be left out, to measure its value: match length, depth in the tree, rank among a
source's guesses, sources that guess otherwise, this request's own acceptance, counts by cell, how often its
text has the token, and the noise that sampled text is drawn with."""

SHARPNESS = 0.5
SHARPNESS_RATE = 0.02
"""Initial weight of the noise, and its learning rate."""

PRIOR = 20.0
"""Expected acceptances that a cell starts with, all of them met: it takes about so many to move it."""

AGREEMENT = 1.2
AGREEMENT_ODDS = 0.3
RATE = 0.01
"""Without shipped priors two sources that agree start at 1.2 times the mean of their log odds and 0.3 more;
from there each set of sources learns its own weights, at this rate."""

LOOKUP_BESIDE_MODEL = 0.02
NOT_OF_MODEL = 1.0
MODEL_RANKS = (1.2, 0.0, -0.7, -0.7, -0.7)
"""A draft model has read the text: at first its estimate has the full weight, a lookup's beside it a small
one. By rank, in log odds: where the target takes its best token, a model's first guess is right more often
than its probability and the later ones less often; where it samples, that is unlearned within a request."""

SIBLINGS_BESIDE_OTHERS = 0.1
"""The priors are of requests that were alone. Beside another source siblings have a small weight until they
have proved right: at a temperature of 0.8 they agree seldom. 0.05 to 0.2 give equal results."""

REQUEST_RATE = 0.03
"""Learning rate of the terms of one request, which are dropped with it."""

MEMORY = 128.0
"""Expected acceptances at which the sums of a cell are halved."""

MOST_BYTES = 1 << 24
"""Size beyond which a file is not read; with terms of all sets it has less than a megabyte."""

PRIORS = Path(__file__).with_name("priors.safetensors")


_NONE: TokenArray = np.empty(0, np.int32)


class NoiseKey(Protocol):
    """The keyed noise that a request's tokens are drawn with (`engine.sampling.noise.GumbelNoise`)."""

    sample_key: np.uint64
    vocabulary: int


class Calibration:
    """Terms by which sources are mixed in log odds, and accepted over expected by bins of the result.

    Weights are kept for each set of sources, so that the value of their agreement is learned; match length,
    depth, rank, how often the request has the token, and the probability that sources with other guesses left
    over, shift the sum. The result is corrected by a table of acceptance in similar cases. This is logistic
    mixing with a final adaptive map, as in context-mixing compressors (Mahoney 2005, "Adaptive weighing of
    context models").

    Every child of an accepted node is an observation: it was, or was not, emitted by the target. So a step
    without verified drafts is learned from too, and a source that was wrong for a while regains its weight
    when it is right.

    Args:
        priors: Whether to start from the shipped weights rather than from those above.
        without: Names of `FEATURES` that are not learned.

    Raises:
        InvalidInputError: `without` names no feature.

    Example:
        guesses "1" with .9 that are never taken: the estimate falls below .2 within 400 steps, and comes
        back within 600 once they are
    """

    def __init__(self, priors: bool = True, without: Collection[str] = ()) -> None:
        from retrieval_draft.drafting._kernels import fusion

        unknown = [name for name in without if name not in FEATURES]
        if unknown:
            raise InvalidInputError(
                f"Unknown evidence {unknown[0]!r}.", f"Choose from: {', '.join(FEATURES)}."
            )
        slots = _table_slots().values()
        assert DRAFT_MODEL.slot == fusion.MODEL, "kernels know the slot of draft models"
        assert len({*slots}) == len(slots), "each source of the table has a slot of its own"
        assert max(slots) < fusion.SOURCES - 1, "the last slot is for sources outside of the table"
        self.switches = np.array([name not in without for name in FEATURES], np.float64)
        self.weights: NDArray[np.float64] = np.empty((fusion.MASKS, fusion.SOURCES + 1))
        self.parameters: NDArray[np.float64] = np.empty((fusion.SOURCES, fusion.PARAMETERS))
        self.expected: NDArray[np.float64] = np.zeros(fusion.CELLS)
        self.accepted: NDArray[np.float64] = np.zeros(fusion.CELLS)
        self.request: NDArray[np.float64] = np.zeros(fusion.SOURCES)
        self.occurrences: NDArray[np.uint8] = np.zeros(fusion.COUNTERS, np.uint8)
        self.sharpness: NDArray[np.float64] = np.empty((fusion.MASKS, 2))
        self.noise: NoiseKey | None = None
        self.position = 0
        self.rate = RATE
        self._start()
        if priors and PRIORS.exists():
            self.load(PRIORS)
            self._start_siblings()

    def open(self, prompt: TokenArray = _NONE, *, noise: NoiseKey | None = None) -> Calibration:
        """The same calibration for one request: learned terms are shared, but for the request's own part.

        Args:
            prompt: int32, shape (length,). Its tokens count as evidence, as those of the reply do later.
            noise: Noise that the target draws the request's tokens with; None for greedy. Candidates are then
                ranked by log odds and noise together (`sharpen`), for which `position` must be kept up.
        """
        opened = copy(self)
        opened.noise = noise if self.switches[FEATURES.index("noise")] else None
        opened.request = np.zeros_like(self.request)
        opened.occurrences = np.zeros_like(self.occurrences)
        opened.count(prompt)
        return opened

    def count(self, tokens: TokenArray) -> None:
        """Counts tokens appended to the request's text, int32, shape (m,); before the next drafts."""
        _kernels.count_tokens(np.array(tokens, np.int32), self.occurrences)

    def observe(
        self, tree: DraftTree, proposals: Sequence[Proposal], emitted: TokenArray
    ) -> NDArray[np.int8]:
        """Learns from the outcome of a step's guesses, verified or not.

        Args:
            tree: The whole fused tree of the step.
            proposals: The proposals it was fused from.
            emitted: int32, shape (length,). Tokens that the target emitted after the root.

        Returns:
            int8, shape (n + 1,). 1 where a node was emitted, 0 where its parent was and it was not, else -1.
        """
        if tree.evidence is None or not len(emitted):
            return np.full(len(tree), -1, np.int8)
        outcomes = np.empty(len(tree), np.int8)
        _kernels.score(
            tree.tokens,
            tree.parents,
            tree.evidence,
            np.array(emitted, np.int32),
            self.weights,
            self.parameters,
            self.request,
            self.expected,
            self.accepted,
            self.rate,
            REQUEST_RATE,
            MEMORY,
            self.switches,
            self.sharpness,
            0.0 if self.noise is None else SHARPNESS_RATE,
            outcomes,
        )
        return outcomes

    def save(self, path: Path) -> None:
        """Writes the contents from `encode`. The file is replaced atomically.

        Raises:
            OSError: It cannot be written.
        """
        replace_file(path, self.encode())

    def encode(self) -> bytes:
        """Contents of a file with the learned terms of the sources of the table.

        Sets of sources without learned terms are left out, so that it stays small.
        """
        fresh = Calibration(priors=False)
        changed = np.zeros(len(self.weights), np.bool_)
        for name in _BY_SET:
            changed |= (self._rows(name) != fresh._rows(name)).any(1)
        names = {slot: name for name, slot in _table_slots().items()}
        sources = tuple([names.get(slot, "") for slot in range(len(self.request))])
        sets = np.flatnonzero(changed)
        rows = {name: self._rows(name)[sets] for name in _BY_SET}
        stored = StoredCalibration(sources, sets, parameters=self.parameters, **rows)
        return encode_calibration(stored.only(_table_slots(), len(sources)))

    def load(self, path: Path) -> None:
        """Reads a file of `save`, in this release or an earlier one.

        Raises:
            DatastoreError: As `decode` does, or the file cannot be read.
        """
        try:
            content = read_bounded(path, MOST_BYTES)
        except (OSError, ValueError) as error:
            raise DatastoreError(f"{path} is no calibration: {error}.", DELETE) from error
        self.decode(content, str(path))

    def decode(self, content: bytes, name: str) -> None:
        """Loads what `encode` returned, in this release or an earlier one.

        Sources are identified by name: terms of sources that are not in the table are ignored, and missing
        ones start as without priors.

        Args:
            content: Of any origin; every number is checked.
            name: Of the file or its sender, for messages.

        Raises:
            DatastoreError: It is torn, of another format, or has other shapes; nothing is changed.
        """
        stored = decode_calibration(content, name).only(_table_slots(), len(self.request))
        self._start()
        for name in _BY_SET:
            rows = getattr(stored, name)
            if rows is not None:
                self._rows(name)[stored.sets] = rows
        named = [slot for slot, name in enumerate(stored.sources) if name]
        self.parameters[named] = stored.parameters[named]

    def _rows(self, name: str) -> NDArray[np.float64]:
        """A view of one of `_BY_SET`, shape (MASKS, columns)."""
        array: NDArray[np.float64] = getattr(self, name)
        return array.reshape(len(self.weights), -1)

    def _start(self) -> None:
        """Sets the initial terms of lookups, alone and together, of a draft model and of siblings."""
        from retrieval_draft.drafting._kernels import fusion

        sets = np.arange(fusion.MASKS)
        members = (sets[:, None] >> np.arange(fusion.SOURCES)) & 1
        size = np.maximum(members.sum(1), 1)
        # The estimate of a single source is used as it is; several count as somewhat more than their mean.
        self.weights[:, :-1] = members * np.where(size > 1, AGREEMENT / size, 1.0)[:, None]
        self.weights[:, -1] = np.where(size > 1, AGREEMENT_ODDS, 0.0)
        model = DRAFT_MODEL.slot
        with_model = (members[:, model] > 0) & (size > 1)
        self.weights[with_model, :-1] = members[with_model] * LOOKUP_BESIDE_MODEL
        self.weights[with_model, -1] = 0.0
        self.weights[with_model, model] = 1.0
        self._start_siblings()
        self.parameters[:] = 0.0
        self.parameters[model, fusion.ABSENT] = NOT_OF_MODEL
        self.parameters[model, fusion.RANK_BIAS : fusion.RANK_BIAS + fusion.RANKS] = MODEL_RANKS
        self.expected[:] = self.accepted[:] = 0.0
        self.sharpness[:] = SHARPNESS, 0.0

    def _start_siblings(self) -> None:
        """Gives siblings a small weight beside other sources, which keep theirs."""
        slot = SOURCES["siblings"].slot
        sets = np.arange(1, len(self.weights))
        others = sets[sets >> slot & 1 == 0]
        self.weights[others | 1 << slot] = self.weights[others]
        self.weights[others | 1 << slot, slot] = SIBLINGS_BESIDE_OTHERS


_BY_SET = ("weights", "expected", "accepted", "sharpness")
"""Arrays with a row, or with BINS cells, for each set of sources."""


def _table_slots() -> dict[str, int]:
    """Fixed slots of the table's sources, with which learned terms are saved."""
    return {spec.name: spec.slot for spec in (*SOURCES.values(), DRAFT_MODEL)}


@cache
def columns_of(names: tuple[str, ...]) -> tuple[NDArray[np.int64], int]:
    """Slots and columns of sources: those of the table have slots of their own, others get free ones.

    A slot without a source of the table starts like that of a lookup. Where there are more sources than
    slots, the remaining ones share the last one, which no source of the table has.

    Args:
        names: Of the sources, in the order of their proposals.

    Returns:
        int64, shape (len(names),): index of each one's slot among those in use; and the set of slots in use,
        a bit mask.

    Example:
        ("automaton", "mine", "corpus"), in slots 0, 10 and 4  ->  [0, 2, 1], 0b100_0001_0001
    """
    from retrieval_draft.drafting._kernels.fusion import SOURCES as COUNT

    table = _table_slots()
    free = [slot for slot in range(COUNT) if slot not in table.values()]
    taken: set[int] = set()
    found: list[int] = []
    for name in names:
        slot = table.get(name, -1)
        if slot < 0 or slot in taken:  # not of the table, or one of several with one name
            slot = free.pop(0) if free else COUNT - 1
        taken.add(slot)
        found.append(slot)
    slots = sorted(taken)
    return np.array([slots.index(slot) for slot in found], np.int64), sum(1 << slot for slot in slots)
