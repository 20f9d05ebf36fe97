"""Measured cost of a forward pass over n tokens, and the number of draft nodes that pays best."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.drafting.time_curve import TimeCurve

__all__ = ["CostModel"]

_kernels = LazyKernels("retrieval_draft.drafting._kernels.cost")

SIZES = (1, 2, 4, 8, 16, 32, 64)
MORE_SIZES = (128, 256, 512, 1024)
"""Sizes of passes over several rows."""

ROUNDS = 2
ENOUGH_SECONDS = 1.0
MAX_ROUNDS = 7

STEP_MEMORY = 0.99
SETTLED = 16
"""A node's time is weighed against the tokens a second of the last hundred steps of all requests, after so
many steps. On simulated CPUs this yields 1 to 6% more tokens a second than each step's own best rate, on a
simulated GPU as much; request by request it would yield less."""

OVERHEAD_MEMORY = 24
"""Steps over which the loop's own time is averaged."""

TRIAL_STEPS = (40, 640)
"""Steps between two trials of another number of nodes: the first, doubled after each trial that found the
curve right, up to the last."""

TRIAL_SHARE = 0.008
"""Share of the time that trials may lose in the long run."""

TRIAL_LEAST = 4
"""Draft nodes that a trial of more verifies at least, where the tree has so many."""

SURPRISE = 0.2
"""Error of the curve, in natural logarithms, after which trials come as often as at the start."""


class CostModel:
    """t(n): seconds of a verification pass over n tokens, root included.

    Measured once on the user's model, device and dtype, then refined from every real step: mostly the sizes
    next to it, since a measurement under load gets the shape wrong, and the shape decides.

    Example:
        t(1) = 1, t(2) = 1.7, t(5) = 2.8; path probabilities [.95, .9, .85, .8]:
        (1 + .95 + .9 + .85 + .8) / 2.8 = 1.61 beats 1 / 1 and 1.95 / 1.7, so all four are verified
    """

    def __init__(self) -> None:
        self.device: object = None
        self._times: TimeCurve | None = None
        # Tokens of recent steps, and their time in passes over one token, so that both fade together and a
        # machine that slows down does not leave a rate that no step can reach.
        self._emitted = 0.0
        self._spent = 0.0
        self._steps = 0
        self._overhead = 0.0
        self._trial: int | None = None
        self._is_trial_repeated = False
        self._is_trial_larger = False
        self._trial_wait = TRIAL_STEPS[0]
        self._steps_to_trial = TRIAL_STEPS[0]
        self._seconds_to_trial = 0.0

    @property
    def is_measured(self) -> bool:
        """True if `measure` or `load` has run."""
        return self._times is not None

    @classmethod
    def measure(
        cls,
        forward: Callable[[int], None],
        device: object = None,
        progress: Callable[[], object] | None = None,
    ) -> CostModel:
        """Times `forward(n)` for n = 1, 2, 4, ..., 64, sizes alternating, and keeps the least of each.

        The least, since other work on the machine can only add time. Two rounds, or as many as fit a second.

        Args:
            forward: Runs a pass over n tokens and returns when its result is ready.
            device: The model's device, for the record.
            progress: Called after each pass of the first rounds, `ROUNDS` times the number of sizes in all.
        """
        forward(SIZES[0])
        least = np.full(len(SIZES), np.inf)
        started = time.perf_counter()
        for turn in range(MAX_ROUNDS):
            if turn >= ROUNDS and time.perf_counter() - started > ENOUGH_SECONDS:
                break
            for index, size in enumerate(SIZES):
                begin = time.perf_counter()
                forward(size)
                least[index] = min(least[index], time.perf_counter() - begin)
                if progress is not None and turn < ROUNDS:
                    progress()
        model = cls()
        model.device = device
        model.load(dict(zip(SIZES, least.tolist(), strict=True)))
        return model

    def load(self, seconds: dict[int, float]) -> None:
        """Sets the curve from measured seconds for every size of `SIZES`; more tokens never cost less."""
        self._times = TimeCurve({size: seconds[size] for size in SIZES})

    def seconds_by_size(self) -> dict[int, float]:
        """The present curve: seconds by number of tokens."""
        return {} if self._times is None else self._times.by_size()

    def for_rows(self, rows: int) -> CostModel:
        """A model of passes over `rows` rows that starts from this one.

        The time of linear layers, the larger part, depends on the number of nodes only. The cost of the rows'
        attention, and of sizes beyond those measured, is learned from real passes.
        """
        model = type(self)()
        model.device = self.device
        if self._times is not None:
            more = (size for size in MORE_SIZES if size < rows * MORE_SIZES[0])
            model._times = self._times.extended((*SIZES, *more))
        return model

    def seconds(self, tokens: int) -> float:
        """t(tokens), interpolated between the measured sizes."""
        return self._curve.seconds(tokens)

    def choose(
        self,
        path_probs: NDArray[np.float32],
        context_length: int = 0,
        rows: int = 1,
        carried: int | None = None,
        passed: NDArray[np.int64] | None = None,
    ) -> int:
        """Number of draft nodes to verify for the most tokens a second; 0 is possible.

        The time of a node could be spent on steps like the recent ones, so it pays if it yields more than
        their tokens a second. And n is never larger than the one that maximises this step's own rate, (1 +
        sum of path probabilities) / t(n): the highest estimates are often too high.

        Args:
            path_probs: float32, shape (n,). Path probabilities of the draft nodes, best first, root excluded.
            context_length: Tokens in the cache. The curve follows it through `observe`.
            rows: Rows that share the pass; each has a root, which is a certain token.
            carried: Accepted tokens that the pass repeats in front of a chain. They are repeated again, with
                root and drafts that were accepted, unless all drafts are. None where no pass repeats any.
            passed: int64, shape (n + 1,). Tokens of the pass over the first 0, 1, ... nodes where passes have
                few sizes, padding included; None where each node is a token more.

        Returns:
            n in 0..len(path_probs).
        """
        if self._times is None or not len(path_probs):
            return 0
        return self._or_trial(self.best(path_probs, rows, carried, passed), len(path_probs))

    def best(
        self,
        path_probs: NDArray[np.float32],
        rows: int = 1,
        carried: int | None = None,
        passed: NDArray[np.int64] | None = None,
    ) -> int:
        """As `choose`, without trials: for a tree that no pass verifies."""
        if self._times is None or not len(path_probs):
            return 0
        most, repeated = len(path_probs), -1 if carried is None else carried
        if passed is None:
            tokens = rows + max(repeated, 0) + (most if carried is None else 2 * most + 1)
            curve = self._times.up_to(tokens)
        else:
            assert carried is None, "chains have passes of every length"
            curve = np.concatenate([np.zeros(rows - 1), self._times.up_to(int(passed.max()))[passed - 1]])
        rate = self._emitted / (self._spent * self._times.seconds(1)) if self._steps >= SETTLED else 0.0
        best: int = _kernels.best_nodes(path_probs, curve, rows, repeated, self._overhead, rate)
        return best

    def _or_trial(self, best: int, most: int) -> int:
        """The best number of draft nodes, of at most `most`; where a trial is due, twice or a quarter of it.

        Sizes that are not verified are not timed: a curve on which drafts are dear would stay so for good.
        """
        if self._is_trial_repeated:
            self._trial = min(self._trial or 0, most)
        elif self._steps_to_trial <= 0 and self._seconds_to_trial <= 0:
            is_larger = self._is_trial_larger or not best
            self._trial = min(max(2 * best, TRIAL_LEAST), most) if is_larger else best // 4
        else:
            return best
        return self._trial

    def note_step(self, emitted: int, seconds: float, forward_seconds: float) -> None:
        """Records a whole step.

        Args:
            emitted: Tokens it yielded.
            seconds: Its duration, drafting and bookkeeping included.
            forward_seconds: The part of it in the forward pass.
        """
        if seconds <= 0 or self._times is None:
            return
        if self._trial is not None:
            self._end_trial(emitted, seconds)
        self._steps += 1
        self._steps_to_trial -= 1
        self._seconds_to_trial -= seconds
        self._emitted = self._emitted * STEP_MEMORY + emitted
        self._spent = self._spent * STEP_MEMORY + seconds / self._times.seconds(1)
        over = min(max(seconds - forward_seconds, 0.0), forward_seconds)
        self._overhead += (over - self._overhead) / min(self._steps, OVERHEAD_MEMORY)

    def _end_trial(self, emitted: int, seconds: float) -> None:
        """Sets the next trial's time: what this one lost is to be a small share of all time."""
        assert self._times is not None
        lost = seconds
        if self._emitted:
            lost -= emitted * self._spent / self._emitted * self._times.seconds(1)
        self._seconds_to_trial = max(self._seconds_to_trial, 0.0) + max(lost, 0.0) / TRIAL_SHARE
        self._steps_to_trial = self._trial_wait
        if not self._is_trial_repeated:
            self._trial, self._is_trial_larger = None, not self._is_trial_larger

    def observe(self, tokens: int, context_length: int, seconds: float) -> None:
        """Refines the curve from a real pass.

        Args:
            tokens: Tokens in the pass, roots included.
            context_length: Tokens in the cache.
            seconds: Its duration.
        """
        if self._times is None or seconds <= 0:
            return
        is_surprise = abs(math.log(seconds / self._times.seconds(tokens))) > SURPRISE
        is_believed = self._times.observe(tokens, seconds)
        if self._trial is not None:
            self._is_trial_repeated = not is_believed and not self._is_trial_repeated
            self._trial_wait = TRIAL_STEPS[0] if is_surprise else min(2 * self._trial_wait, TRIAL_STEPS[1])

    def seconds_up_to(self, tokens: int) -> NDArray[np.float64]:
        """t(1), t(2), ..., t(tokens): float64, shape (tokens,). Not to be written to."""
        return self._curve.up_to(tokens)[:tokens]

    @property
    def _curve(self) -> TimeCurve:
        if self._times is None:
            raise RuntimeError("the cost model was asked before it was measured")
        return self._times
