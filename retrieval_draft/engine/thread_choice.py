"""The number of threads of a pass over few tokens, chosen by measured time and again when times change."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from retrieval_draft.drafting.time_curve import TimeCurve
from retrieval_draft.engine.threads import number_of_threads

__all__ = ["ThreadChoice", "allowed_threads", "free_processors"]

Result = TypeVar("Result")

ASSUMED = {1: 1.0, 2: 1.05, 4: 1.1, 8: 1.2, 16: 1.4, 32: 2.5, 64: 5.0}
"""t(n) over t(1) before more than one pass was timed."""

GAIN = 1 / 3
"""Assumed exponent of the gain from threads: two take 1.26 times less time than one."""

MOST_TOKENS = 64
"""Passes over more tokens use as many threads as there are free processors: arithmetic is their limit."""

TRIAL_PASSES = 8
"""Passes between two trials at least."""

MOST_REPEATS = 3
"""Passes more that a trial takes at most, while its time is not believed, or its gain not to be seen yet."""

TRIAL_SHARE = 0.008
"""Share of the time that trials may lose in the long run."""

SLOWER = 1.25
"""Times the expected seconds from which two passes in a row call for a trial of fewer threads."""

LOOK_SECONDS, STALE_SECONDS = 0.25, 5.0
"""Time between two looks at the machine's processors, and after which a look is no measure of now."""

FREE = 0.6
"""Free processors more than threads that call for a trial of more threads."""

TAKEN = 0.3
"""Processors from which others are taken to have work for a whole one."""

RISK = 1.3
"""Factor for a pass on more threads than processors are free: the next one may take five times as long."""


class ThreadChoice:
    """Chooses between 1, 2, 4, ... threads and as many as torch may use, pass by pass.

    Beside a busy process two threads on two processors are slower than one: whichever of them is not running
    keeps the other waiting. So the times of each number of threads are kept as a curve over the number of
    tokens, and the fastest is used. The next smaller and larger ones are tried now and then, for a bounded
    share of the time; at once when passes became slower, or when processors became idle.

    Args:
        limit: Threads that may be used at most, asked before each pass.
        free: Processors that others left free since the last call, or None where that cannot be known.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        limit: Callable[[], int] | None = None,
        free: Callable[[], float | None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._allowed = allowed_threads if limit is None else limit
        self._free = free_processors() if free is None else free
        self._clock = clock
        self._limit = 0
        self._seen: set[int] = set()
        self._looked = self._clock()
        self._left: float | None = None
        self._curves: dict[int, TimeCurve] = {}
        self._reset(1)

    def _reset(self, limit: int) -> None:
        self._limit = limit
        self._curves = {}
        self._counts = [*(1 << power for power in range(limit.bit_length()) if 1 << power < limit), limit]
        self._trial: int | None = None
        self._repeats = 0
        self._is_upwards = False
        self._passes = TRIAL_PASSES - 2  # soon: nothing was tried
        self._seconds_to_trial = 0.0
        self._slower = 0
        self._is_called_for = False
        self._was_free = False

    def run(self, tokens: int, work: Callable[[], Result]) -> Result:
        """Calls `work`, a pass over so many tokens, with the number of threads that should be fastest."""
        limit = self._allowed()
        if limit != self._limit:
            self._reset(limit)
        if limit < 2 or tokens > MOST_TOKENS or tokens not in self._seen:
            self._seen.add(min(tokens, MOST_TOKENS + 1))
            # The first pass over so many tokens may load code, or prepare products of a shape: no measure.
            with number_of_threads(self._free_threads()):
                return work()
        threads = self.choose(tokens)
        with number_of_threads(threads):
            began = self._clock()
            out = work()
            seconds = self._clock() - began
        self.observe(threads, tokens, seconds)
        return out

    def choose(self, tokens: int) -> int:
        """The number of threads for a pass over so many tokens; of a trial, if one is due."""
        if not self._curves:
            return self._free_threads()
        if self._trial is not None:
            return self._trial
        best = min(self._counts, key=lambda count: self._expected(count, tokens))
        is_free = self._left is not None and self._left > best + FREE
        if is_free and not self._was_free and best < self._limit:
            self._call_for_trial(upwards=True)
            # Its times beside others are no measure now: for a start they are taken to be the best ones'.
            self._curves[self._next_trial(best)] = self._curves[best].scaled(1.0)
        self._was_free = is_free
        if self._passes < TRIAL_PASSES or (self._seconds_to_trial > 0 and not self._is_called_for):
            return best
        self._trial = self._next_trial(best)
        return self._trial

    def _expected(self, count: int, tokens: int) -> float:
        return self._curves[count].seconds(tokens) * self._risk(count)

    def _risk(self, count: int) -> float:
        return RISK if count > self._free_threads() else 1.0

    def _next_trial(self, best: int) -> int:
        index = self._counts.index(best)
        others = self._counts[max(index - 1, 0) : index] + self._counts[index + 1 : index + 2]
        return others[-1] if self._is_upwards else others[0]

    def observe(self, threads: int, tokens: int, seconds: float) -> None:
        """Records the time of a pass with so many threads."""
        if seconds <= 0:
            return
        if not self._curves:
            one = seconds * (threads / self._limit) ** GAIN
            curve = TimeCurve({size: share * one for size, share in ASSUMED.items()})
            curve = curve.scaled(one / curve.seconds(tokens))
            self._curves = {count: curve.scaled((self._limit / count) ** GAIN) for count in self._counts}
        self._passes += 1
        self._seconds_to_trial -= seconds
        expected = self._curves[threads].seconds(tokens)
        is_believed = self._curves[threads].observe(tokens, seconds)
        if threads == self._trial:
            expected_of = {count: self._expected(count, tokens) for count in self._counts}
            best = min(self._counts, key=expected_of.__getitem__)
            lost = max(seconds * self._risk(threads) - expected_of[best], 0.0)
            self._seconds_to_trial = max(self._seconds_to_trial, 0.0) + lost / TRIAL_SHARE
            is_over = is_believed and (best == threads or lost > 0)
            self._repeats += 1
            if is_over or self._repeats > MOST_REPEATS:
                self._trial, self._is_upwards = None, not self._is_upwards
                self._repeats, self._passes, self._slower, self._is_called_for = 0, 0, 0, False
                to_lose = expected_of[self._next_trial(best)] - expected_of[best]
                self._seconds_to_trial = max(self._seconds_to_trial, to_lose / TRIAL_SHARE)
            return
        self._slower = self._slower + 1 if seconds > SLOWER * expected else 0
        if self._slower == 2 and threads > 1:
            self._call_for_trial(upwards=False)

    def _call_for_trial(self, upwards: bool) -> None:
        """Makes a trial due, however much the last ones lost."""
        self._is_called_for, self._is_upwards, self._passes = True, upwards, TRIAL_PASSES

    def _look(self) -> None:
        now = self._clock()
        passed = now - self._looked
        if passed >= LOOK_SECONDS:
            self._looked, left = now, self._free()
            self._left = left if passed < STALE_SECONDS else None

    def _free_threads(self) -> int:
        """As many threads as processors that others leave free, as far as is known."""
        self._look()
        return self._limit if self._left is None else min(max(int(self._left + TAKEN), 1), self._limit)


def allowed_threads() -> int:
    """Threads that torch may use, no more than the processors that this process may run on.

    torch follows ``OMP_NUM_THREADS`` and ``torch.set_num_threads``. Affinity and the limit of a control group
    (``cpu.max``) may be smaller.
    """
    return int(max(1, min(torch.get_num_threads(), _affinity(), _quota())))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Quota:
    """Processors that the control group may use, read every few seconds: the limit may change."""

    _SECONDS = 2.0

    def __init__(self, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> None:
        self._root, self._own = root, own
        self._read = -math.inf
        self._count: float = math.inf

    def __call__(self) -> float:
        """Rounded up; infinity without a limit."""
        now = time.monotonic()
        if now - self._read >= self._SECONDS:
            self._read, self._count = now, min(map(self._limit, self._groups()), default=math.inf)
        return self._count

    def _groups(self) -> list[Path]:
        """The group's folder and those above it, each of which may have a limit."""
        try:
            names = [line.split(":", 2)[2].strip("/") for line in self._own.read_text().splitlines()]
        except (OSError, IndexError):
            names = [""]
        folders = {self._root}
        for name in names:
            folder = self._root / name
            folders.update([folder, *(above for above in folder.parents if self._root in above.parents)])
        return sorted(folders)

    def _limit(self, folder: Path) -> float:
        try:
            quota, period = (folder / "cpu.max").read_text().split()[:2]
            return math.inf if quota == "max" else max(1, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError, ZeroDivisionError):
            return math.inf


_quota = _Quota()


def free_processors(stat: Path = Path("/proc/stat")) -> Callable[[], float | None]:
    """Makes a function that counts the processors, of those that may be used, that others left free.

    Returns:
        Gives the number that was idle or this process's own since its last call; None where the system does
        not count idle time.
    """
    tick = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100

    def sample() -> tuple[float, float] | None:
        try:
            own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
            lines = (line.split() for line in stat.read_text().splitlines() if line.startswith("cpu"))
            ticks = sum(int(line[4]) + int(line[5]) for line in lines if line[0] in own)
        except (OSError, AttributeError, ValueError, IndexError):
            return None
        return time.monotonic(), ticks / tick + time.process_time()

    last = sample()

    def free() -> float | None:
        nonlocal last
        before, last = last, sample()
        if before is None or last is None or last[0] <= before[0]:
            return None
        return (last[1] - before[1]) / (last[0] - before[0])

    return free
