"""Part 1: the tests marked `cuda`; on a CPU their rehearsal."""

from __future__ import annotations

import importlib.util

from benchmarks.gpu_check.outcomes import FILE, read_outcomes
from benchmarks.gpu_check.proc import run_child
from benchmarks.gpu_check.report import Box, NotThere, Report
from benchmarks.gpu_check.setting import Setting

__all__ = ["run", "verdict"]

_TESTS = "tests/system/test_cuda.py"


def run(setting: Setting, box: Box, report: Report) -> None:
    """Runs pytest in a process of its own, within the box."""
    if importlib.util.find_spec("pytest") is None:
        raise NotThere("pytest is not installed")
    results = report.path.with_name("outcomes.jsonl")
    results.unlink(missing_ok=True)
    chosen = ["-m", "cuda"] if setting.cuda else ["-m", "not cuda"]
    chosen += ["-k", "rehearsal"] if setting.tiny else []
    arguments = ["-m", "pytest", _TESTS, "-q", "-x" if setting.fault else "--maxfail=30", "--tb=short"]
    arguments += ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.outcomes", *chosen]
    # Other versions may deprecate other things, which is not checked here.
    arguments += ["-W", "default::FutureWarning", "-W", "default::DeprecationWarning"]
    if importlib.util.find_spec("pytest_timeout") is None:
        # Strict settings would name the plugin missing.
        arguments += ["-o", "addopts=--import-mode=importlib"]
    limit = 100.0 if setting.tiny else box.left - 5.0
    code, output = run_child(arguments, limit, {FILE: str(results.absolute())})
    found = read_outcomes(results)
    report.put(exit_code=code, output=output.splitlines()[-60:], **found)
    print(f"[gpu_check] tests: {found['counts']} of {found['tests']}, {found['positions']}")
    for name, message in found["failed"].items():
        print(f"[gpu_check] failed: {name}: {message}")
    wrong, note = verdict(code, found["tests"], found["counts"], list(found["failed"]), box.seconds)
    if note:
        report.note(note)
    if wrong:
        report.fail(wrong)


def verdict(
    code: int | None, tests: int, counts: dict[str, int], failed: list[str], seconds: float
) -> tuple[str | None, str | None]:
    """The fault, and a remark. A timeout is no fault where half passed and none failed.

    Args:
        code: Of pytest; None at a timeout.
        tests: Number of tests to run.
        counts: Those that ran, by outcome.
        failed: Names of the failed ones.
        seconds: Available time.
    """
    ran = sum(counts.values())
    late = f"{ran} of {tests} tests ran in {seconds:.0f} s" if code is None else None
    if failed:
        return f"{len(failed)} tests failed: {', '.join(failed[:3])}" + ", ..." * (len(failed) > 3), late
    if code == 5 or (code == 0 and not counts.get("passed")):
        return "no test was found to run", None
    if code is None:
        return (late, None) if not tests or 2 * counts.get("passed", 0) < tests else (None, late)
    return (f"pytest exited with {code}" if code else None), None
