"""Launches, copies and waits of a decoding step as on a device, counted by the dispatcher on a CPU.

Captured passes are tapes, whose replay counts as one launch; eager passes of the model do not count. All that
the step asks of torch besides counts, views and new memory aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import LogitsProcessorList

from retrieval_draft.engine.attention.tree_mask import Upload
from retrieval_draft.engine.decode import Batch
from retrieval_draft.engine.graph.captured import TapeGraph
from retrieval_draft.engine.logits import LogitReader
from retrieval_draft.engine.sampling.penalties import CountPenalty
from retrieval_draft.engine.target import Target
from tests.support.batches import padded, ragged
from tests.support.dispatched import Dispatched
from tests.support.drafters import drafter_with, prompt_ids, reply_of
from tests.support.models import CONFIGS, make
from tests.support.sources import OracleSource

SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 1}
GREEDY = {"do_sample": False}
OF_ALL_LOGITS = {
    "temperature": {"temperature": 0.8, "top_k": 0},
    "top_p": {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
    "min_p": {"temperature": 1.5, "top_k": 0, "min_p": 0.1},
    "top_p, min_p": {"top_k": 0, "top_p": 0.95, "min_p": 0.02},
    "penalty": {"temperature": 0.8, "top_k": 0, "repetition_penalty": 1.3},
    "penalty, top_k": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    "greedy, penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "counts": {"top_k": 0, "logits_processor": LogitsProcessorList([CountPenalty(24, 0.6, 0.4)])},
}
"""Options of draws for which top-k alone does not leave few logits."""
STEPS = 20
OUTSIDE = 12
"""Launches besides the replay, copies included."""
EAGER = 25
"""Launches besides the model's eager pass, copies included."""


class HostReads(TorchFunctionMode):
    """Counts what reads the memory of a tensor past the dispatcher, the host's own tensors aside.

    Args:
        host: Storages of these; those that are made meanwhile are added.
        depth: Not empty while nothing is counted.
    """

    def __init__(self, host: set[int], depth: list[str | None]) -> None:
        super().__init__()
        self._host, self._depth = host, depth
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            self.count += not self._depth and storage(args[0]) not in self._host
        elif func is torch.empty and (kwargs or {}).get("device") == "cpu":
            self._host.add(storage(out))
        return out


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Steps:
    """The counts of each step."""

    def __init__(self) -> None:
        self.launches: list[list[str]] = []
        self.up: list[int] = []
        self.down: list[int] = []
        self.replays: list[int] = []
        self.reads: list[int] = []


@contextmanager
def counted() -> Iterator[Steps]:
    steps = Steps()
    now = {"up": 0, "down": 0, "replays": 0}
    host: set[int] = set()
    depth: list[str | None] = []

    def apart(name: str | None, call: Any) -> Any:
        def run(*given: Any, **options: Any) -> Any:
            if name is not None:
                now[name] += 1
            depth.append(name)
            try:
                out = call(*given, **options)
            finally:
                depth.pop()
            if name == "down":
                host.add(storage(out))
            return out

        return run

    step = Batch.step

    def counting(batch: Batch) -> Any:
        now.update(up=0, down=0, replays=0)
        with HostReads(host, depth) as reads, Dispatched(depth) as calls:
            out = step(batch)
        steps.launches.append(calls.launches)
        steps.up.append(now["up"])
        steps.down.append(now["down"])
        steps.replays.append(now["replays"])
        steps.reads.append(reads.count)
        return out

    with (
        mock.patch.object(Batch, "step", counting),
        mock.patch.object(TapeGraph, "replay", apart("replays", TapeGraph.replay)),
        mock.patch.object(Upload, "_send", apart("up", Upload._send)),
        mock.patch.object(LogitReader, "_down", apart("down", LogitReader._down)),
        mock.patch.object(LogitReader, "_is_here", False),
        mock.patch.object(Target, "_call", apart(None, Target._call)),
    ):
        yield steps


def run(name: str, options: dict[str, Any], graphed: bool) -> Steps:
    model = make(name)
    prompt = prompt_ids()
    target = Target(model, "tape")
    assert target.graphs is not None
    if not graphed:
        target.graphs.reason = "told so"
        target.graphs._is_checked = True
        target.graphs.recheck = lambda: None  # type: ignore[method-assign]
    plain = drafter_with(model, target=Target(model, "off"), nodes=0)
    reply = reply_of(plain.generate(prompt, max_new_tokens=4 * STEPS, **options), prompt)
    drafter = drafter_with(model, OracleSource(reply), target=target)
    with counted() as steps:
        out = drafter.generate(prompt, max_new_tokens=4 * STEPS, **options)
    assert reply_of(out, prompt) == reply
    assert drafter.stats.accepted > 0
    return steps


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_captured_step(name: str, options: dict[str, Any]) -> None:
    check_captured(run(name, options, graphed=True))


@pytest.mark.parametrize("options", OF_ALL_LOGITS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_captured_step_that_draws_from_all_logits(name: str, options: str) -> None:
    check_captured(run(name, {"do_sample": True, "seed": 2, **OF_ALL_LOGITS[options]}, graphed=True))


def check_captured(steps: Steps) -> None:
    usual = [i for i, count in enumerate(steps.replays) if count == 1]
    assert len(usual) >= len(steps.replays) - 3, "others are those in which a pass is captured"
    assert len(usual) >= 6
    for i in usual:
        assert (steps.up[i], steps.down[i]) == (1, 1)
        assert steps.reads[i] == 0
        assert len(steps.launches[i]) + 2 <= OUTSIDE, steps.launches[i]
        assert "_local_scalar_dense" not in steps.launches[i]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_eager_step(name: str, options: dict[str, Any]) -> None:
    steps = run(name, options, graphed=False)
    assert not any(steps.replays)
    assert len(steps.launches) >= 6
    for i, launches in enumerate(steps.launches):
        assert (steps.up[i], steps.down[i], steps.reads[i]) == (1, 1, 0)
        if i < 2:
            continue  # memory and masks are made
        assert len(launches) + 2 <= EAGER, launches
        assert "_local_scalar_dense" not in launches


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_captured_step_of_a_batch(name: str, options: dict[str, Any]) -> None:
    """One replay, one copy each way and as many launches as of a row alone, for 2 rows as for 7."""
    for rows in (2, 7):
        model, prompts = make(name), ragged()[:rows]
        options = {**options, "max_new_tokens": 4 * STEPS, "pad_token_id": 0}
        ids, mask = padded(prompts)
        plain = drafter_with(model, target=Target(model, "off"), nodes=0).generate(ids, mask, **options)
        replies = [row[ids.shape[1] :].tolist() for row in plain]
        drafter = drafter_with(model, OracleSource(*replies), target=Target(model, "tape"))
        with counted() as steps:
            out = drafter.generate(ids, mask, **options)
        assert torch.equal(out, plain)
        graphs = drafter.target.graphs
        assert graphs is not None
        assert graphs.rows_reason is None
        usual = [i for i, count in enumerate(steps.replays) if count == 1]
        assert len(usual) >= 6
        for i in usual:
            assert (steps.up[i], steps.down[i], steps.reads[i]) == (1, 1, 0)
            assert len(steps.launches[i]) + 2 <= OUTSIDE, (rows, steps.launches[i])
            assert "_local_scalar_dense" not in steps.launches[i]
