"""Part 1: the tests marked `cuda`; on a CPU their rehearsal."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.proc import run_child
from benchmarks.gpu_check.report import Box, NotThere, Report
from benchmarks.gpu_check.setting import Setting

__all__ = ["read_junit", "run"]

_TESTS = "tests/system/test_cuda.py"


def run(setting: Setting, box: Box, report: Report) -> None:
    """Runs pytest in a process of its own, within the box."""
    if importlib.util.find_spec("pytest") is None:
        raise NotThere("pytest is not installed")
    results = report.path.with_name("junit.xml")
    results.unlink(missing_ok=True)
    chosen = ["-m", "cuda"] if setting.cuda else ["-m", "not cuda"]
    chosen += ["-k", "rehearsal"] if setting.tiny else []
    arguments = ["-m", "pytest", _TESTS, "-q", "-x" if setting.fault else "--maxfail=30", "--tb=short"]
    arguments += ["-p", "no:cacheprovider", *chosen, f"--junitxml={results}"]
    arguments += ["-o", "junit_family=xunit1"]  # the one that keeps properties
    # Other people's versions may deprecate other things; that is not what is checked here.
    arguments += ["-W", "default::FutureWarning", "-W", "default::DeprecationWarning"]
    if importlib.util.find_spec("pytest_timeout") is None:
        arguments += [
            "-o",
            "addopts=--import-mode=importlib",
        ]  # strict settings would name the plugin missing
    code, output = run_child(arguments, 100.0 if setting.tiny else box.left - 5.0)
    report.put(exit_code=code, output=output.splitlines()[-60:])
    if results.exists():
        found = read_junit(results)
        report.put(**found)
        print(f"[gpu_check] tests: {found['counts']}, {found['positions']}")
        for name, message in found["failed"].items():
            print(f"[gpu_check] failed: {name}: {message}")
    if code is None:
        report.fail(f"tests were not through after {box.seconds:.0f} s")
    elif code == 5:
        report.fail("no test was found to run")
    elif code:
        failed = report.data.get("failed", {})
        names = ", ".join(list(failed)[:3]) + (", ..." if len(failed) > 3 else "")
        report.fail(f"{len(failed)} tests failed: {names}" if failed else f"pytest exited with {code}")


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of tests by outcome, of judged tokens by verdict, and the first line of each failure."""
    counts: Counter[str] = Counter()
    positions: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):  # noqa: S314 - pytest wrote it just now
        bad = [child for child in case if child.tag in ("failure", "error")]
        skipped = any(child.tag == "skipped" for child in case)
        counts["failed" if bad else "skipped" if skipped else "passed"] += 1
        if bad:
            failed[str(case.get("name"))] = str(bad[0].get("message", "")).splitlines()[0][:200]
        for each in case.iter("property"):
            if (value := str(each.get("value"))).isdigit():
                positions[str(each.get("name"))] += int(value)
    return {"counts": dict(counts), "positions": dict(positions), "failed": failed}
