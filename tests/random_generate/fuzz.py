"""Draws cases until time is up, and shrinks the first that differs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, settings

from tests.random_generate.case import Case
from tests.random_generate.runner import Difference, Outcome, compare_outputs
from tests.random_generate.strategy import cases

__all__ = ["MAX_REFUSED", "MAX_ROUNDING", "Report", "fuzz"]

MAX_REFUSED = 0.2
"""The largest share of calls that may be refused: one that refuses all is never wrong."""

MAX_ROUNDING = 0.05
"""The largest share of cases that may differ in float32 alone."""

BATCH = 2
"""Cases that Hypothesis draws at once: its simplest, and one that owes nothing to those before."""


@dataclass
class Report:
    """Counts of a run.

    Attributes:
        cases: Number of cases.
        outcome: Their outcome.
        features: Cases by what they have.
        failed: The smallest case that differed, and how.
    """

    cases: int = 0
    outcome: Outcome = field(default_factory=Outcome)
    features: Counter[str] = field(default_factory=Counter)
    failed: tuple[Case, Difference] | None = None

    @property
    def complaints(self) -> list[str]:
        """The reason for which the run proves nothing; empty if it proves something."""
        found = []
        refused = self.outcome.refused.total()
        if refused > MAX_REFUSED * max(refused + self.outcome.calls, 1):
            found.append(f"{refused} calls were refused, and {self.outcome.calls} were not")
        if self.outcome.rounding > 2 + MAX_ROUNDING * self.cases:
            found.append(f"{self.outcome.rounding} of {self.cases} cases differed in float32")
        if self.cases > 40 and self.outcome.accepted == 0:
            found.append("no draft was accepted")
        return found


def fuzz(
    seconds: float,
    seed: int,
    most: int = 1 << 30,
    check: Callable[[Case], Outcome] = compare_outputs,
    shrink: bool = True,
) -> Report:
    """Runs random cases.

    Args:
        seconds: After which no new case begins; shrinking takes longer. The first, which compiles, does not
            count.
        seed: The same one draws the same cases.
        most: Limit of the cases.
        check: Runs a case.
        shrink: Whether a case that differs is made smaller.
    """
    report, end = Report(), math.inf
    seen: set[str] = set()

    def one(case: Case) -> None:
        nonlocal end
        if report.failed is None:
            if monotonic() > end or report.cases >= most or case.to_json() in seen:
                return
            seen.add(case.to_json())
            report.cases += 1
            report.features.update(_features(case))
        try:
            outcome = check(case)
        except Difference as difference:
            # Hypothesis runs the smallest one last.
            report.failed = case, difference
            raise
        if report.failed is None:
            report.outcome.add(outcome)
        if report.cases == 1:
            end = monotonic() + seconds

    quiet = settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        derandomize=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        print_blob=False,
    )
    while monotonic() < end and report.cases < most and report.failed is None:
        seed += 1
        try:
            hypothesis.seed(seed)(quiet(hypothesis.given(cases())(one)))()
        except (Difference, hypothesis.errors.Flaky):
            break
    return report


def _features(case: Case) -> set[str]:
    """Features of a case, for the counts by feature."""
    found = {
        f"architecture {case.architecture}", f"attention {case.attention}", f"method {case.method}",
        f"vocabulary {case.vocabulary}", f"route {case.route}", f"draft model {case.draft_model}",
        f"nodes {case.config['nodes']}", f"calls {len(case.calls)}",
    }  # fmt: skip
    for call in case.calls:
        found |= {f"option {name}" for name in call.options}
        found |= {
            f"rows {len(call.prompts)}", f"processor {call.processor}", f"cache {call.cache}",
            f"options in {call.options_in}", f"hint {call.hint}",
            "sampled" if call.options["do_sample"] else "greedy",
        }  # fmt: skip
        for name in ("criterion", "streamer", "follows", "cut", "changed"):
            if getattr(call, name):
                found.add(name)
    return found
