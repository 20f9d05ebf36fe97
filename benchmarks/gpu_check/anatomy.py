"""Part 5: what a decoding step consists of: kernels, copies, waits, idle time, and the host's phases."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.cases import Case, Decoded, Decoder, launching
from benchmarks.gpu_check.measure import Counts, counted
from benchmarks.gpu_check.report import Box, Report
from benchmarks.gpu_check.setting import Setting

__all__ = ["run"]

_SHORT, _LONG = 4, 16
"""Tokens of two runs, whose difference is what steps did, without prompt and preparation."""


def run(setting: Setting, box: Box, report: Report) -> None:
    """One case after the other, the most telling first."""
    small, large = setting.geometries
    cases = [
        *(Case(model, name) for model in (large, small) for name in ("stock", "none", "calibrated")),
        *(Case(small, name, sampled=True) for name in ("stock", "none", "calibrated")),
        *(Case(small, name, rows=8) for name in ("stock", "none", "calibrated")),
        *(Case(large, name, rows=8) for name in ("none", "calibrated")),
    ]
    if setting.tiny:
        cases = [Case(large, name) for name in ("stock", "none", "calibrated")]
        cases += [Case(large, "calibrated", sampled=True), Case(large, "calibrated", rows=2)]
    for case in cases:
        if not box.has(2.0):
            report.note(f"out of time before {case.model}, {case.label}")
            return
        report.row(**case.key, **_anatomy(setting, case))


def _anatomy(setting: Setting, case: Case) -> dict[str, Any]:
    decoder = Decoder(setting, case, 32)
    chosen = decoder.recorded[: case.rows]
    runs: dict[int, Decoded] = {}
    with launching() as launches:
        for new in (_LONG, _SHORT, _LONG):  # the first one warms up
            launches.clear()
            runs[new] = decoder.decode(chosen, new)
    launched = sum(launches[1:]) / max(len(launches) - 1, 1)
    found: dict[int, Counts] = {}
    for new in (_SHORT, _LONG):

        def work(new: int = new) -> None:
            decoder.decode(chosen, new)

        found[new] = counted(work, setting.device)
    steps = runs[_LONG].steps - runs[_SHORT].steps
    by_step: dict[str, Any] = dict(found[_LONG].minus(found[_SHORT], steps))
    step_ms = 1e3 * (runs[_LONG].seconds - runs[_SHORT].seconds) / max(steps, 1)
    by_step |= {"steps": steps, "step_ms": round(step_ms, 3)}
    if setting.cuda and step_ms > 0:
        by_step["idle_percent"] = round(100 * (1 - by_step["busy_ms"] / step_ms), 1)
    stats = runs[_LONG].stats
    if stats is not None and stats.passes:
        phases = ("draft", "commit", "forward", "accept", "learn")
        by_step["phases_us"] = {
            name: round(1e6 * getattr(stats, f"{name}_seconds") / stats.passes, 1) for name in phases
        }
        by_step["launch_us"] = round(1e6 * launched, 1)
    by_step["most_frequent"] = dict((found[_LONG].names - found[_SHORT].names).most_common(12))
    return by_step
