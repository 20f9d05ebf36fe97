from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrieval_draft.engine import thread_choice, threads
from retrieval_draft.engine.thread_choice import ThreadChoice, _Quota, allowed_threads, free_processors

ALONE = {1: 0.042, 2: 0.034}
BESIDE_ONE = {1: 0.042, 2: 0.080}


class Machine:
    """Passes that take the seconds of a table by number of threads, on a clock of their own."""

    def __init__(self, seconds: dict[int, float], free: float | None) -> None:
        self.now = 0.0
        self.seconds, self.free = seconds, free
        self.choice = ThreadChoice(lambda: max(self.seconds), lambda: self.free, lambda: self.now)

    def run(self, passes: int, tokens: int = 1) -> list[int]:
        """The numbers of threads that passes were made with."""
        chosen: list[int] = []

        def work() -> None:
            chosen.append(torch.get_num_threads())
            self.now += self.seconds[chosen[-1]]

        for _ in range(passes):
            self.choice.run(tokens, work)
        return chosen


@pytest.fixture(autouse=True)
def counted_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that are set are counted, not made: more than this machine has are asked for."""
    current = [2]
    monkeypatch.setattr(thread_choice.torch, "get_num_threads", lambda: current[0])
    monkeypatch.setattr(threads, "_set_threads", lambda count, for_mkl: current.__setitem__(0, count))


def spent(machine: Machine, passes: int, tokens: int = 1) -> float:
    begin = machine.now
    machine.run(passes, tokens)
    return machine.now - begin


@pytest.mark.parametrize("free", [None, 2.0])
def test_two_threads_alone_one_beside_a_busy_process_and_two_again(free: float | None) -> None:
    machine = Machine(ALONE, free)
    assert spent(machine, 300) < 1.01 * 300 * ALONE[2]
    machine.seconds, machine.free = BESIDE_ONE, None if free is None else 1.0
    machine.run(20)
    assert spent(machine, 300) < 1.02 * 300 * BESIDE_ONE[1]
    machine.seconds, machine.free = ALONE, free
    if free is not None:
        begin = machine.now
        while machine.run(1)[0] != 2 or machine.run(1)[0] != 2:
            assert machine.now - begin < 2.0
    else:
        machine.run(600)  # nobody says that a processor is free: a trial finds out
    assert spent(machine, 300) < 1.01 * 300 * ALONE[2]


def test_idle_processors_that_may_not_be_used_cost_little() -> None:
    """As in a container with a quota: trials lose, and come rarely."""
    machine = Machine(BESIDE_ONE, 2.0)
    machine.run(100)
    assert spent(machine, 2000) < 1.01 * 2000 * BESIDE_ONE[1]


def test_one_slow_pass_changes_nothing() -> None:
    machine = Machine(ALONE, 2.0)
    machine.run(40)  # a trial has just been made
    machine.seconds = {1: 0.5, 2: 0.4}
    machine.run(1)
    machine.seconds = ALONE
    assert set(machine.run(5)) == {2}


def test_many_processors_are_tried_from_the_top_down() -> None:
    """16 threads where four are enough: neighbours are tried, and the loss stays small."""
    machine = Machine({1: 0.1, 2: 0.06, 4: 0.04, 8: 0.045, 16: 0.06}, None)
    machine.run(2000)
    assert spent(machine, 500) < 1.02 * 500 * 0.04


def test_long_passes_and_single_threads_are_left_alone() -> None:
    machine = Machine(BESIDE_ONE, None)
    machine.run(100)
    assert machine.run(1, tokens=200) == [2]
    machine.free = 1.5  # of two; another process shares a processor with the second thread
    machine.run(10)
    assert machine.run(1, tokens=200) == [1]
    machine.free = 1.9
    machine.run(10)
    assert machine.run(1, tokens=200) == [2]
    alone = Machine({1: 0.1}, None)
    assert alone.run(3) == [1, 1, 1]


def test_threads_are_given_back_after_an_error() -> None:
    machine = Machine(BESIDE_ONE, None)
    machine.run(60)

    def fail() -> None:
        raise ValueError("no pass")

    with pytest.raises(ValueError, match="no pass"):
        machine.choice.run(1, fail)
    assert torch.get_num_threads() == 2


def test_affinity_and_control_groups_are_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_choice.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(thread_choice, "_affinity", lambda: 6)
    monkeypatch.setattr(thread_choice, "_quota", lambda: 3.0)
    assert allowed_threads() == 3
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert _Quota(tmp_path, own)() == float("inf")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    assert _Quota(tmp_path, own)() == 2
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert _Quota(tmp_path, own)() == 1
    (tmp_path / "cpu.max").write_text("never mind\n")
    assert _Quota(tmp_path, tmp_path / "none")() == float("inf")


def test_processors_that_others_leave_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, own = [10.0], [3.0]
    monkeypatch.setattr(thread_choice.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(thread_choice.time, "process_time", lambda: own[0])
    monkeypatch.setattr(thread_choice.os, "sched_getaffinity", lambda process: {0, 2})
    stat = tmp_path / "stat"
    line = "cpu{} 5 0 5 {} {} 0 0 0 0 0\n"
    stat.write_text("cpu 1 1 1 900 9 0\n" + "".join(line.format(n, 100, 0) for n in range(3)) + "intr 5\n")
    free = free_processors(stat)
    assert free() is None, "no time has passed"
    clock[0] += 1.0
    own[0] += 0.25
    tick = thread_choice.os.sysconf("SC_CLK_TCK")
    stat.write_text(line.format(0, 100 + tick // 2, 0) + line.format(1, 999, 0) + line.format(2, 100, tick))
    assert free() == pytest.approx(1.75)
    stat.write_text("cpu0 nothing\n")
    assert free() is None
    assert free_processors(tmp_path / "none")() is None


def test_a_pause_beside_a_busy_process_calls_for_no_trial() -> None:
    """A processor is idle then, the one that this process would use."""
    machine = Machine(BESIDE_ONE, 1.0)
    machine.run(140)  # a trial has just been made
    for _ in range(3):
        machine.now += 1.0
        assert set(machine.run(10)) == {1}


def test_two_threads_again_where_sizes_take_turns() -> None:
    """Times that are not believed at first need a second one of about the same size."""
    machine = Machine(ALONE, 2.0)
    machine.run(40, tokens=12)
    machine.seconds, machine.free = {1: 0.15, 2: 1.0}, 1.0
    for _ in range(20):
        machine.run(1, tokens=12)
        machine.run(1, tokens=39)
    machine.seconds, machine.free = {1: 0.15, 2: 0.08}, 2.0
    begin = machine.now
    while machine.run(1, tokens=12) + machine.run(1, tokens=39) != [2, 2]:
        assert machine.now - begin < 2.0


@pytest.mark.parametrize("free", [None, 1.0, 2.0])
def test_first_passes_of_each_size_that_load_code(free: float | None) -> None:
    machine = Machine({1: 5.0, 2: 5.0}, free)
    for tokens in (1, 2, 4, 8):
        machine.seconds = {1: 5.0, 2: 5.0}
        machine.run(1, tokens)
        machine.seconds = BESIDE_ONE
        machine.run(3, tokens)
    machine.run(10)
    assert machine.run(40).count(2) <= 2


def test_threads_that_are_lucky_beside_a_busy_process() -> None:
    """A little faster is not worth the risk of more threads than free processors; much faster is."""
    machine = Machine({1: 0.042, 2: 0.038}, 1.0)
    machine.run(100)
    assert machine.run(100).count(2) < 10
    machine.seconds = {1: 0.042, 2: 0.028}
    machine.run(300)
    assert machine.run(100).count(1) < 10


def test_the_first_passes_beside_a_busy_process() -> None:
    """One thread from the start, as few processors are free; two are tried once."""
    machine = Machine(BESIDE_ONE, 1.0)
    machine.now += 1.0
    assert machine.run(40).count(2) <= 2
