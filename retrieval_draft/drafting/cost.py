"""Measured cost of a forward pass over n tokens, and the number of draft nodes that pays best."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["CostModel"]

SIZES = (1, 2, 4, 8, 16, 32, 64)
MORE_SIZES = (128, 256, 512, 1024)
"""Sizes of passes over several rows."""

ROUNDS = 2
ENOUGH_SECONDS = 1.0
MAX_ROUNDS = 7
RATE_ALL = 0.03
"""Share of a step's error that moves the whole curve: a longer context, a warmer machine."""

MEASURED = 3.0
REMEMBERED = 24.0
"""The measurement weighs as three real steps of a size; a step never weighs less than one in 24."""

STEP_MEMORY = 0.99
SETTLED = 16
"""A node's time is weighed against the tokens a second of the last hundred steps of all requests, after so
many steps. On simulated CPUs this yields 1 to 6% more tokens a second than each step's own best rate, on a
simulated GPU as much; request by request it would yield less."""

OUTLIER = 0.7
"""Natural log of the largest correction by one step: a stalled machine is not a slow model."""


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
        self._sizes: tuple[int, ...] = SIZES
        self._log_sizes = np.log2(np.array(SIZES, np.float64))
        self._log_seconds: NDArray[np.float64] | None = None
        self._weights: NDArray[np.float64] = np.full(len(SIZES), MEASURED)
        self._table: NDArray[np.float64] = np.empty(0, np.float64)
        self._emitted = 0.0
        self._spent = 0.0
        self._steps = 0
        self._overhead = 0.0

    @property
    def is_measured(self) -> bool:
        """True if `measure` or `load` has run."""
        return self._log_seconds is not None

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
        self._log_seconds = np.log([max(seconds[size], 1e-9) for size in SIZES])
        self._weights = np.full(len(SIZES), MEASURED)
        self._table = np.empty(0, np.float64)

    def seconds_by_size(self) -> dict[int, float]:
        """The present curve: seconds by number of tokens."""
        if self._log_seconds is None:
            return {}
        return dict(zip(self._sizes, np.exp(np.maximum.accumulate(self._log_seconds)).tolist(), strict=True))

    def for_rows(self, rows: int) -> CostModel:
        """A model of passes over `rows` rows that starts from this one.

        The time of linear layers, the larger part, depends on the number of nodes only. The cost of the rows'
        attention, and of sizes beyond those measured, is learned from real passes.
        """
        model = CostModel()
        model.device = self.device
        model._sizes = (*SIZES, *(size for size in MORE_SIZES if size < rows * MORE_SIZES[0]))
        model._log_sizes = np.log2(np.array(model._sizes, np.float64))
        model._weights = np.ones(len(model._sizes))
        if self._log_seconds is not None:
            model._log_seconds = np.log(self._curve(model._sizes[-1])[np.array(model._sizes) - 1])
        return model

    def seconds(self, tokens: int) -> float:
        """t(tokens), interpolated between the measured sizes."""
        return float(self._curve(tokens)[tokens - 1])

    def choose(
        self,
        path_probs: NDArray[np.float32],
        context_length: int = 0,
        rows: int = 1,
        carried: int | None = None,
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

        Returns:
            n in 0..len(path_probs).
        """
        if self._log_seconds is None or not len(path_probs):
            return 0
        expected = np.empty(len(path_probs) + 1, np.float64)
        expected[0] = rows
        np.cumsum(path_probs, out=expected[1:])
        expected[1:] += rows
        first = rows - 1 + (carried or 0)
        curve = self._curve(first + len(expected) * (1 if carried is None else 2))
        seconds = curve[first : first + len(expected)] + self._overhead
        if carried is not None:
            refused = 1.0 - np.concatenate(([1.0], path_probs))
            again = curve[carried + np.rint(expected).astype(np.int64)] - curve[0]
            seconds = seconds + refused * again
        rate = float((expected / seconds).max())
        if self._steps >= SETTLED:
            rate = max(rate, self._emitted / self._spent)
        return int(np.argmax(expected - rate * seconds))

    def note_step(self, emitted: int, seconds: float, forward_seconds: float) -> None:
        """Records a whole step.

        Args:
            emitted: Tokens it yielded.
            seconds: Its duration, drafting and bookkeeping included.
            forward_seconds: The part of it in the forward pass.
        """
        if seconds <= 0:
            return
        self._steps += 1
        self._emitted = self._emitted * STEP_MEMORY + emitted
        self._spent = self._spent * STEP_MEMORY + seconds
        over = min(max(seconds - forward_seconds, 0.0), forward_seconds)
        self._overhead += (over - self._overhead) / min(self._steps, REMEMBERED)

    def observe(self, tokens: int, context_length: int, seconds: float) -> None:
        """Refines the curve from a real pass.

        Args:
            tokens: Tokens in the pass, roots included.
            context_length: Tokens in the cache.
            seconds: Its duration.
        """
        if self._log_seconds is None or seconds <= 0:
            return
        log_tokens = float(np.log2(tokens))
        expected = float(np.interp(log_tokens, self._log_sizes, self._log_seconds))
        error = min(max(float(np.log(seconds)) - expected, -OUTLIER), OUTLIER)
        nearness = np.maximum(0.0, 1.0 - np.abs(self._log_sizes - log_tokens))
        self._weights = np.minimum(self._weights + nearness, REMEMBERED)
        rate = np.maximum(nearness / self._weights, RATE_ALL)
        self._log_seconds = self._log_seconds + error * rate
        self._table = np.empty(0, np.float64)

    def seconds_up_to(self, tokens: int) -> NDArray[np.float64]:
        """t(1), t(2), ..., t(tokens): float64, shape (tokens,). Not to be written to."""
        return self._curve(tokens)[:tokens]

    def _curve(self, tokens: int) -> NDArray[np.float64]:
        if self._log_seconds is None:
            raise RuntimeError("the cost model was asked before it was measured")
        if len(self._table) < tokens:
            # The next timed pass makes it stale, so it extends no further than `tokens`.
            reach = _log2_up_to(max(64, 1 << (tokens - 1).bit_length()))
            # Made monotone only here: one slow pass of a small size must not raise the larger ones for good.
            known = np.maximum.accumulate(self._log_seconds)
            logs = np.interp(reach, self._log_sizes, known)
            slope = (known[-1] - known[-2]) / (self._log_sizes[-1] - self._log_sizes[-2])
            beyond = reach > self._log_sizes[-1]
            logs[beyond] = known[-1] + slope * (reach[beyond] - self._log_sizes[-1])
            self._table = np.exp(logs)
        return self._table


@cache
def _log2_up_to(count: int) -> NDArray[np.float64]:
    return np.log2(np.arange(1, count + 1))
