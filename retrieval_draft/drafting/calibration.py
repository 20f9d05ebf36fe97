"""Calibration of the sources' estimates, learned from accepted tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._files import replace_file
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.source import Proposal, TokenArray

__all__ = ["FEATURES", "Calibration", "NoiseKey", "places_of"]

PLACES = ("automaton", "adjacency", "history", "phrases", "corpus", "shared", "model", "siblings")
"""Sources that keep their index from one process to the next, so that their learned weights can be saved."""

FEATURES = ("length", "depth", "rank", "absent", "request", "cells", "noise")
"""Evidence that can be left out, to measure its value: match length, depth in the tree, rank among a
source's guesses, sources that guess otherwise, this request's own acceptance, counts by cell, and the noise
that sampled text is drawn with."""

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

MAX_LEARNED = 1e6
"""Limit of every saved number."""

VERSION = "1"
PRIORS = Path(__file__).with_name("priors.safetensors")


class NoiseKey(Protocol):
    """The keyed noise that a request's tokens are drawn with (`engine.sampling.noise.GumbelNoise`)."""

    sample_key: np.uint64
    vocabulary: int


class Calibration:
    """Terms by which sources are mixed in log odds, and accepted over expected by bins of the result.

    Weights are kept for each set of sources, so that the value of their agreement is learned; match length,
    depth, rank, and the probability that sources with other guesses left over, shift the sum. The result is
    corrected by a table of acceptance in similar cases. This is logistic mixing with a final adaptive map, as
    in context-mixing compressors (Mahoney 2005, "Adaptive weighing of context models").

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
        self.switches = np.array([name not in without for name in FEATURES], np.float64)
        sets = np.arange(fusion.MASKS)
        members = (sets[:, None] >> np.arange(fusion.SOURCES)) & 1
        size = np.maximum(members.sum(1), 1)
        self.weights: NDArray[np.float64] = np.zeros((fusion.MASKS, fusion.SOURCES + 1))
        # The estimate of a single source is used as it is; several count as somewhat more than their mean.
        self.weights[:, :-1] = members * np.where(size > 1, AGREEMENT / size, 1.0)[:, None]
        self.weights[:, -1] = np.where(size > 1, AGREEMENT_ODDS, 0.0)
        model = fusion.MODEL
        with_model = (members[:, model] > 0) & (size > 1)
        self.weights[with_model, :-1] = members[with_model] * LOOKUP_BESIDE_MODEL
        self.weights[with_model, -1] = 0.0
        self.weights[with_model, model] = 1.0
        self.parameters: NDArray[np.float64] = np.zeros(fusion.PARAMETERS)
        self.parameters[fusion.ABSENT + model] = NOT_OF_MODEL
        ranks = fusion.RANK_BIAS + model * fusion.RANKS
        self.parameters[ranks : ranks + fusion.RANKS] = MODEL_RANKS
        self.expected: NDArray[np.float64] = np.zeros(fusion.CELLS)
        self.accepted: NDArray[np.float64] = np.zeros(fusion.CELLS)
        self.request: NDArray[np.float64] = np.zeros(fusion.SOURCES)
        self.sharpness: NDArray[np.float64] = np.tile((SHARPNESS, 0.0), (fusion.MASKS, 1))
        self.noise: NoiseKey | None = None
        self.position = 0
        self.rate = RATE
        if priors and PRIORS.exists():
            self.load(PRIORS)
        sibling = 1 << PLACES.index("siblings")
        others = np.arange(1, sibling)
        self.weights[others | sibling] = self.weights[others]
        self.weights[others | sibling, PLACES.index("siblings")] = SIBLINGS_BESIDE_OTHERS

    def open(self, noise: NoiseKey | None = None) -> Calibration:
        """The same calibration for one request: learned terms are shared, but for the request's own part.

        Args:
            noise: Noise that the target draws the request's tokens with; None for greedy. Candidates are then
                ranked by log odds and noise together (`sharpen`), for which `position` must be kept up.
        """
        opened = copy(self)
        opened.noise = noise if self.switches[FEATURES.index("noise")] else None
        opened.request = np.zeros_like(self.request)
        return opened

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
        outcomes = np.full(len(tree), -1, np.int8)
        if tree.evidence is None or not len(emitted):
            return outcomes
        from retrieval_draft.drafting._kernels.fusion import score

        score(
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
        """Writes the learned terms, as safetensors. The file is replaced atomically.

        Raises:
            OSError: It cannot be written.
        """
        from safetensors.numpy import save

        arrays = {name: getattr(self, name).astype(np.float32) for name in (*_KEPT, *_KEPT_LATER)}
        replace_file(path, save(arrays, {"format": "retrieval_draft calibration", "version": VERSION}))

    def load(self, path: Path) -> None:
        """Reads a file of `save`.

        Raises:
            DatastoreError: The file is torn, of another format, or has other shapes; nothing is changed.
        """
        from safetensors import safe_open

        arrays: dict[str, NDArray[np.float64]] = {}
        try:
            with safe_open(path, "numpy") as file:
                version = (file.metadata() or {}).get("version")
                if version != VERSION:
                    raise DatastoreError(
                        f"{path} has calibration format {version!r}; this release reads {VERSION!r}.",
                        "Delete it: what it knows is learned again.",
                    )
                known = [*_KEPT, *(name for name in _KEPT_LATER if name in set(file.keys()))]
                for name in known:
                    arrays[name] = file.get_tensor(name).astype(np.float64)
        except DatastoreError:
            raise
        except Exception as error:  # safetensors and numpy raise many types for a broken header
            raise DatastoreError(
                f"{path} is no calibration: {error}.", "Delete it: what it knows is learned again."
            ) from error
        for name, array in arrays.items():
            own: NDArray[np.float64] = getattr(self, name)
            # Learned numbers stay far below; beyond the limit, sums of a few terms could overflow.
            low = 0.0 if name in ("expected", "accepted") else -MAX_LEARNED
            if array.shape != own.shape or not ((array >= low) & (array <= MAX_LEARNED)).all():
                raise DatastoreError(
                    f"{path}: {name} has shape {array.shape} or holds what is never learned; it should be "
                    f"{own.shape} of numbers in {low:g}..{MAX_LEARNED:g}.",
                    "Delete it: what it knows is learned again.",
                )
        for name, array in arrays.items():
            getattr(self, name)[:] = array


_KEPT = ("weights", "parameters", "expected", "accepted")
_KEPT_LATER = ("sharpness",)
"""Arrays that files of the first release do not have."""


@cache
def places_of(names: tuple[str, ...]) -> NDArray[np.int64]:
    """The index of each source in masks and weights; those without one of their own get a free one.

    Args:
        names: Of the sources, in the order of their proposals.

    Returns:
        int64, shape (len(names),). From the ninth source on they share the last index.

    Example:
        ("automaton", "corpus", "mine")  ->  [0, 4, 5]
    """
    from retrieval_draft.drafting._kernels.fusion import MODEL, SOURCES

    places: dict[int, int] = {}
    for index, name in enumerate(names):
        if name in PLACES and PLACES.index(name) not in places.values():
            places[index] = PLACES.index(name)
    # The initial terms of models and siblings fit no other source: their indices are used last.
    taken = (MODEL, PLACES.index("siblings"))
    order = sorted(range(SOURCES), key=lambda place: (place in taken, -place))
    free = [place for place in order if place not in places.values()]
    for index in range(len(names)):
        if index not in places:
            places[index] = free.pop(0) if free else SOURCES - 1
    return np.array([places[index] for index in range(len(names))], np.int64)
