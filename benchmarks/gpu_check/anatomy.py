"""Part 5: anatomy of a decoding step: kernels, copies, waits, idle time, and the host's phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from benchmarks.gpu_check.cases import Case, Decoder, launching
from benchmarks.gpu_check.measure import Counter, counter
from benchmarks.gpu_check.report import Box, Report
from benchmarks.gpu_check.setting import Setting, synchronize
from retrieval_draft.bench.decoders import NO_CUDNN
from retrieval_draft.engine.decode import Batch

__all__ = ["Steps", "run"]

_STEPS = 6
"""Steps of a reply that are observed, from the second on."""


def run(setting: Setting, box: Box, report: Report) -> None:
    """Runs the cases, the most informative first."""
    small, large = setting.geometries
    names = [f"{name}{NO_CUDNN}" for name in ("stock", "none", "calibrated")]
    cases = [
        *(Case(model, name) for model in (large, small) for name in names),
        *(Case(small, name, sampled=True) for name in names),
        *(Case(small, name, rows=8) for name in names),
        *(Case(large, name, rows=8) for name in names[1:]),
        *(Case(large, name, context="8192") for name in names),
    ]
    if setting.tiny:
        cases = [Case(large, name) for name in names]
        cases += [Case(large, names[2], sampled=True), Case(large, names[2], rows=2)]
    for case in cases:
        if not box.has(2.0):
            report.note(f"out of time before {case.model}, {case.label}")
            return
        report.row(**case.key, **_anatomy(setting, case))


class Steps:
    """Observes some steps of a reply: from the beginning of one to the beginning of another.

    Args:
        begin: Called when the first observed step begins.
        end: Called after the last one.
        skip: Steps before.

    Attributes:
        seen: Number of observed steps.
    """

    def __init__(self, begin: Callable[[], object], end: Callable[[], object], skip: int = 1) -> None:
        self._begin, self._end, self._skip = begin, end, skip
        self._begun = 0
        self.seen = 0

    def next(self) -> None:
        """Records the begin of a step."""
        step, self._begun = self._begun - self._skip, self._begun + 1
        if step == 0:
            self._begin()
        elif step == _STEPS:
            self._end()
        self.seen = min(max(step, 0), _STEPS)

    def over(self) -> None:
        """Records the end of the reply, perhaps before the last observed step."""
        if self._skip < self._begun <= self._skip + _STEPS:
            self._end()
            self.seen += 1


@contextmanager
def _watching(setting: Setting, case: Case, steps: Steps) -> Iterator[None]:
    """Notifies `steps` of every step of the decoder: a batch's, or a forward pass of `model.generate`."""
    if case.decoder.startswith("stock"):
        hook = setting.model(case.model).register_forward_pre_hook(lambda *_: steps.next())
        try:
            yield
        finally:
            hook.remove()
            steps.over()
        return
    step = Batch.step

    def told(batch: Batch) -> Any:
        steps.next()
        return step(batch)

    with mock.patch.object(Batch, "step", told):
        try:
            yield
        finally:
            steps.over()


def _anatomy(setting: Setting, case: Case) -> dict[str, Any]:
    stock = case.decoder.startswith("stock")
    new = 24 if case.decoder.startswith("calibrated") and setting.tiny else 64
    if not case.decoder.startswith("calibrated"):
        new = _STEPS + 3
    decoder = Decoder(setting, case, new)
    chosen = decoder.groups[0]
    times: list[float] = []

    def tick() -> None:
        synchronize(setting.device)
        times.append(time.perf_counter())

    def decode(begin: Callable[[], object], end: Callable[[], object]) -> tuple[int, Any]:
        # The first pass of `model.generate` is the prompt's, which is no step.
        steps = Steps(begin, end, 2 if stock else 1)
        with _watching(setting, case, steps):
            done = decoder.decode(chosen, new)
        return steps.seen, done.stats

    decode(lambda: None, lambda: None)
    with launching() as launches:
        steps, stats = decode(tick, tick)
    step_ms = 1e3 * (times[1] - times[0]) / steps
    row: dict[str, Any] = {"step_ms": round(step_ms, 3)}
    watched: Counter = counter(setting.device)
    counted, _ = decode(watched.start, watched.stop)
    row |= {"steps": counted, **watched.counts.by_step(counted)}
    if setting.cuda:
        row["idle_percent"] = round(100 * (1 - row["busy_ms"] / step_ms), 1)
    if stats is not None:
        phases = ("draft", "commit", "forward", "accept", "learn")
        row["phases_us"] = {
            name: round(1e6 * getattr(stats, f"{name}_seconds") / stats.passes, 1) for name in phases
        }
        row["launch_us"] = round(1e6 * sum(launches[1:]) / max(len(launches) - 1, 1), 1)
    row["most_frequent"] = dict(watched.counts.names.most_common(12))
    return row
