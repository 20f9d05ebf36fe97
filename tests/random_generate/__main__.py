"""python -m tests.random_generate [--seconds N] [--seed S] [--case JSON]; exits with 3 on a difference."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
import tempfile
import warnings
from pathlib import Path
from time import monotonic

import torch
from transformers.utils import logging as transformers_logging

from tests.random_generate.case import Case
from tests.random_generate.fuzz import Report, fuzz
from tests.random_generate.runner import Difference, compare_outputs


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz_generate.sh", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="a new one each time without")
    parser.add_argument("--case", default=None, help="a case as JSON, or a file of it, to run again")
    given = parser.parse_args(arguments)
    if given.case is not None:
        text = given.case if given.case.lstrip().startswith("{") else Path(given.case).read_text()
        return _again(Case.from_json(text))
    seed = secrets.randbits(32) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    begin = monotonic()
    report = fuzz(given.seconds, seed)
    return _show(report, monotonic() - begin)


def _again(case: Case) -> int:
    try:
        outcome = compare_outputs(case)
    except Difference as difference:
        _print_difference(case, difference)
        return 3
    print(outcome)
    return 0


def _show(report: Report, seconds: float) -> int:
    outcome = report.outcome
    for feature, number in sorted(report.features.items()):
        print(f"  {number:6d}  {feature}")
    for what, counts in (("refused", outcome.refused), ("raised", outcome.raised)):
        for message, number in counts.most_common():
            print(f"  {number:6d}  {what}: {message}")
    print(
        f"{report.cases} cases in {seconds:.0f} s: {outcome.calls} calls, {outcome.tokens} tokens, "
        f"{outcome.accepted} drafts accepted; {outcome.refused.total()} refused, {outcome.raised.total()} "
        f"raised as model.generate does, {outcome.rounding} differed in float32 alone"
    )
    if report.failed is not None:
        _print_difference(*report.failed)
        return 3
    for complaint in report.complaints:
        print(f"error: {complaint}")
    return 3 if report.complaints else 0


def _print_difference(case: Case, difference: Difference) -> None:
    print(f"A difference in call {difference.call}: {difference.what}")
    print(f"expected: {difference.expected}")
    print(f"got:      {difference.got}")
    print(f"hint:     run it again with ./scripts/fuzz_generate.sh --case '{case.to_json()}'", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.getLogger("retrieval_draft").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as home:
        # Measurements of tiny models stay out of the user's cache folder.
        os.environ["RETRIEVAL_DRAFT_HOME"] = home
        sys.exit(main())
