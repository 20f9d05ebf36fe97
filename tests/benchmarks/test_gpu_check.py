"""The GPU check, rehearsed: every part through the same code, killed, and with faults put in on purpose."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_check.anatomy import Steps
from benchmarks.gpu_check.cases import Case, Decoder
from benchmarks.gpu_check.main import FAULTS, PARTS
from benchmarks.gpu_check.measure import read_trace
from benchmarks.gpu_check.outcomes import FILE, read_outcomes
from benchmarks.gpu_check.report import Report, read_parts
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.supervisor import Worker
from benchmarks.gpu_check.table import make_table, reasons
from benchmarks.gpu_check.tests import verdict
from retrieval_draft.bench.replay import Replayer, Trace
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.index.draft_stores import DraftStores

ROOT = Path(__file__).resolve().parents[2]


def command(out: Path, *options: str) -> list[str]:
    rehearsal = ["--device", "cpu", "--tiny", "--seconds", "60", "--out", str(out)]
    return [sys.executable, "-m", "benchmarks", "gpu_check", *rehearsal, *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, *options), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280
    )


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(out, *options), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )


Runs = dict[str, tuple["Future[subprocess.CompletedProcess[str]]", Path]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A whole rehearsal and one for each fault, all at once: each waits for imports most of the time."""
    options = {fault: ("--parts", "races", "--fault", fault) for fault in FAULTS}
    folders = {name: tmp_path_factory.mktemp(name) for name in ("whole", *options)}
    with ThreadPoolExecutor(len(folders)) as pool:
        yield {
            name: (pool.submit(run, folder, *options.get(name, ())), folder)
            for name, folder in folders.items()
        }


@pytest.fixture
def rehearsal(runs: Runs) -> tuple[subprocess.CompletedProcess[str], Path]:
    done, out = runs["whole"]
    return done.result(), out


def wait_for(path: Path, status: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and json.loads(path.read_text())["status"] == status:
            return
        time.sleep(0.1)
    raise AssertionError(f"{path.name} was not {status} in time")


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in listed]


@pytest.mark.slow
def test_killed_check_leaves_what_was_finished(tmp_path: Path, runs: Runs) -> None:
    process = start(tmp_path, "--parts", "facts,attention")
    wait_for(tmp_path / "parts" / "facts.json", "done")
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    part = json.loads((tmp_path / "parts" / "facts.json").read_text())
    assert part["status"] == "done"
    assert part["torch"]
    end = time.monotonic() + 10
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}/exe").exists() for worker in workers)


@pytest.mark.slow
def test_stopped_check_prints_what_it_has(tmp_path: Path) -> None:
    process = start(tmp_path, "--parts", "facts,races")
    wait_for(tmp_path / "parts" / "facts.json", "done")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("FAILED: ")
    assert "SIGTERM" in output
    assert json.loads((tmp_path / "results.json").read_text())["parts"]["facts"]["status"] == "done"


@pytest.mark.slow
def test_rehearsal_ends_well(rehearsal: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "OK"
    assert [name.strip() for name in lines[0].split("|")] == [
        "model", "context", "decoder", "tokens/s", "tokens per step", "ms a step", "host us", "kernels",
        "syncs", "equal",
    ]  # fmt: skip
    assert 8 <= len(lines) - 2 <= 40
    assert (out / "table.txt").read_text() == done.stdout
    assert json.loads((out / "results.json").read_text())["ok"] is True


@pytest.mark.slow
def test_rehearsal_goes_through_every_part(rehearsal: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, out = rehearsal
    parts = read_parts(out / "parts", list(PARTS))
    assert list(parts) == list(PARTS)
    for name, part in parts.items():
        assert part["status"] in ("done", "cut"), (name, part)
        assert part["failures"] == []
    assert {"torch", "sdp_priority_order", "launch_us", "h2d_us", "copy_tb_per_second"} <= parts[
        "facts"
    ].keys()
    assert parts["tests"]["counts"]["passed"] >= 5
    assert parts["tests"]["positions"]["worse"] == 0
    assert {row["side"] for row in parts["races"]["rows"]} == {
        "as ever",
        "copies delayed",
        "launches waited for",
    }
    assert any(row["accepted"] for row in parts["races"]["rows"])
    assert any(row.get("max_error") is not None for row in parts["attention"]["rows"])
    assert {row["kind"] for row in parts["passes"]["rows"]} == {"static cache", "eager"}
    assert all(row["kernels"] > 0 for row in parts["anatomy"]["rows"])
    drafted = [row for row in parts["speed"]["rows"] if row["decoder"].startswith("calibrated")]
    assert all(row["equal"] == "recorded" for row in drafted)
    assert any(row["tokens_per_step"] > 1.1 for row in drafted)
    assert {"stock", "stock-no-cudnn", "stock-compiled", "none"} <= {
        row["decoder"] for row in parts["speed"]["rows"]
    }
    assert {row["kind"] for row in parts["half_precision"]["rows"]} == {"product", "attention", "replies"}
    assert "not there yet" in json.dumps(parts)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_noticed(runs: Runs, fault: str) -> None:
    later, out = runs[fault]
    done = later.result()
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("FAILED: races: ")
    assert "different" in last
    assert json.loads((out / "results.json").read_text())["failures"]


CHILD = """
import os, sys, time
for line in sys.stdin:
    name, seconds = line.split()
    if name == "dies": os._exit(9)
    if name == "hangs": time.sleep(60)
    os.write(1, f"done {name}\\n".encode())
"""


def test_worker_that_dies_or_hangs_costs_its_part_alone(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    Report(tmp_path, "hangs", 1.0).row(kept=True)
    with Worker([sys.executable, str(script)], tmp_path, lambda: None) as worker:
        for name in ("well", "dies", "well", "hangs", "well"):
            worker.run(name, 1.0, 2.0 if name == "hangs" else 30.0)
    parts = read_parts(tmp_path, ["well", "dies", "hangs"])
    assert set(parts) == {"dies", "hangs"}
    assert "exit code 9" in parts["dies"]["failures"][0]
    assert "killed after 2 s" in parts["hangs"]["failures"][0]
    assert parts["hangs"]["rows"] == [{"kept": True}]


def test_reasons_name_what_did_not_run_or_did_not_end() -> None:
    parts: dict[str, dict[str, Any]] = {
        "facts": {"status": "done", "failures": []},
        "races": {"status": "running", "failures": ["x"]},
    }
    assert reasons(parts, ["facts", "races", "speed"]) == [
        "races: x",
        "races: was not through",
        "speed: did not run",
    ]


def test_table_has_sixty_rows_at_most_and_joins_what_anatomy_counted() -> None:
    key = {"model": "8b", "context": "recorded"}
    row = {**key, "decoder": "none-no-cudnn", "tokens_per_second": 40.0, "equal": "recorded"}
    parts: dict[str, dict[str, Any]] = {
        "speed": {"rows": [row] * 80},
        "anatomy": {"rows": [{**key, "decoder": "none", "kernels": 1364.0, "syncs": 1.0}]},
    }
    lines = make_table(parts).splitlines()
    assert len(lines) == 61
    assert [cell.strip() for cell in lines[1].split("|")] == [
        "8b", "recorded", "none-no-cudnn", "40", "-", "-", "-", "1364", "1", "recorded",
    ]  # fmt: skip


def test_trace_of_the_profiler_is_counted() -> None:
    events: list[dict[str, Any]] = [
        {"cat": "kernel", "name": "gemm", "ts": 0, "dur": 10},
        {"cat": "kernel", "name": "gemm", "ts": 5, "dur": 10},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 20, "dur": 2},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "ts": 30, "dur": 3},
        {"cat": "gpu_memset", "name": "Memset (Device)", "ts": 40, "dur": 1},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 1},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 0, "dur": 1},
        {"cat": "cuda_runtime", "name": "cudaMalloc", "ts": 0, "dur": 1},
        {"cat": "cuda_runtime", "name": "cudaMallocHost", "ts": 0, "dur": 1},
        {"ph": "M", "name": "process_name"},
    ]
    counts = read_trace(events)
    assert (counts.kernels, counts.up, counts.down, counts.syncs, counts.mallocs) == (2, 1, 1, 1, 1)
    assert counts.busy_ms == pytest.approx(0.021)
    assert counts.names == {"gemm": 2}


SUITE = """
import os
import pytest


def test_well(record_property):
    record_property("worse", 2)


def test_wrong():
    assert not "line one\\nline two"


@pytest.mark.skip
def test_left_out():
    pass


def test_ends_the_process():
    os._exit(9)


def test_never_runs():
    pass
"""


def test_outcomes_are_known_even_when_pytest_does_not_end(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    results = tmp_path / "outcomes.jsonl"
    plugin = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.outcomes", "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, str(tmp_path)],
        cwd=tmp_path,
        env={**environment(), FILE: str(results)},
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 9
    results.write_text(results.read_text() + '{"torn')
    found = read_outcomes(results)
    assert found["tests"] == 5
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["positions"] == {"worse": 2}
    assert list(found["failed"]) == ["test_wrong"]
    assert "line one" in found["failed"]["test_wrong"]


def test_out_of_time_is_a_fault_of_tests_only_where_few_ran_or_some_failed() -> None:
    assert verdict(0, 9, {"passed": 9}, [], 50) == (None, None)
    assert verdict(None, 10, {"passed": 5}, [], 50) == (None, "5 of 10 tests ran in 50 s")
    assert verdict(None, 10, {"passed": 4}, [], 50)[0] == "4 of 10 tests ran in 50 s"
    assert verdict(None, 0, {}, [], 50)[0] is not None
    assert verdict(None, 10, {"passed": 8, "failed": 1}, ["test_x"], 50)[0] == "1 tests failed: test_x"
    assert verdict(5, 0, {}, [], 50)[0] == "no test was found to run"
    assert verdict(0, 3, {"skipped": 3}, [], 50)[0] == "no test was found to run"
    assert verdict(3, 9, {"passed": 2}, [], 50)[0] == "pytest exited with 3"


def test_measured_reply_is_not_known_before() -> None:
    """A decoder takes the steps of a replay without history, however often it decodes the same text."""
    setting = Setting(torch.device("cpu"), True, None)
    decoder = Decoder(setting, Case("tiny-8b", "calibrated"), 48)
    for group in decoder.groups:
        steps = [decoder.decode(group, 48).steps for _ in range(2)]
        prompt, reply = (np.array(ids, np.int32) for ids in (group[0].prompt, group[0].reply[:48]))
        replayer = Replayer(DraftConfig(nodes=16), 16, False, DraftStores(32000), Calibration())
        expected = replayer.run(Trace("any", prompt, reply)).steps
        assert steps[0] == steps[1]
        assert steps[0] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("taken", "seen"), [(0, 0), (2, 0), (3, 1), (7, 5), (8, 6), (20, 6)])
def test_steps_are_counted_where_they_happen(taken: int, seen: int) -> None:
    told: list[str] = []
    steps = Steps(lambda: told.append("begin"), lambda: told.append("end"), 2)
    for _ in range(taken):
        steps.next()
    steps.over()
    assert steps.seen == seen
    assert told == (["begin", "end"] if seen else [])
