"""Part 4: a forward pass over n nodes: the host's time, the device's, and a captured graph's."""

from __future__ import annotations

import gc
import statistics
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.gpu_check.measure import counted, milliseconds
from benchmarks.gpu_check.report import Box, Report
from benchmarks.gpu_check.setting import Setting, synchronize
from retrieval_draft.bench.decoders import cudnn_attention
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.compat import cache_parameter
from retrieval_draft.engine.graph.graph_passes import GraphPasses
from retrieval_draft.engine.passes import tree_passes
from retrieval_draft.engine.target import Target

__all__ = ["run"]

_ROOM = 512
"""Slots of the static cache after the context: one for each pass and replay."""


@torch.no_grad()
def run(setting: Setting, box: Box, report: Report) -> None:
    """Runs both models at every context: the graph of a plain pass first, then eager and captured passes."""
    contexts = (16, 64) if setting.tiny else (128, 2048, 8192)
    sizes = (1, 4) if setting.tiny else (1, 4, 16, 32, 64)
    for model_name in setting.geometries:
        model = setting.model(model_name)
        target, capturing = Target(model, "off"), Target(model)
        for context in contexts:
            if not box.has(3.0):
                report.note(f"out of time before {model_name} at {context}")
                return
            report.row(model=model_name, context=context, **_graph(setting, model, context))
            same_length = tree_passes(target, context)
            growing = _Growing(target, context)
            for size in sizes:
                if not box.has(1.0):
                    report.note(f"out of time at {model_name}, {context}, {size} nodes")
                    return
                row = _eager(setting, partial(same_length, size), partial(growing, size))
                report.row(model=model_name, context=context, nodes=size, kind="eager", **row)
            if capturing.graphs is None:
                continue
            capturing.graphs.recheck()
            replayed = tree_passes(capturing, context)
            for size in sizes:
                if not box.has(2.0):
                    report.note(f"out of time at {model_name}, {context}, {size} captured nodes")
                    return
                row = _replayed(setting, capturing.graphs, partial(replayed, size))
                report.row(model=model_name, context=context, nodes=size, kind="captured", **row)


class _Growing:
    """Plain and tree passes after a text that is one token longer each time, as in decoding."""

    def __init__(self, target: Target, context: int) -> None:
        self._target, self._length = target, context
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, target.vocabulary, (context,), generator=generator).to(target.device)
        self._cache = target.cache(context + _ROOM)
        for _ in target.prefill(self._cache, ids, 1):
            pass

    def __call__(self, nodes: int) -> Tensor:
        star = DraftTree(
            np.arange(1, nodes + 1, dtype=np.int32),
            np.array([-1] + [0] * (nodes - 1), np.int32),
            np.array([0] + [1] * (nodes - 1), np.int32),
            np.ones(nodes, np.float32),
            np.ones(nodes, np.float32),
            np.zeros(nodes, np.int64),
        )
        logits = self._target.verify_tree(self._cache, star, self._length)
        self._cache.commit(None, 1, 1)
        self._length += 1
        return logits


def _eager(setting: Setting, same_length: Any, growing: Any) -> dict[str, Any]:
    device, rounds = setting.device, 2 if setting.tiny else 6
    milliseconds(same_length, device, 2)
    wall = statistics.median(milliseconds(same_length, device, rounds))
    begin = time.perf_counter()
    same_length()
    launched = 1e3 * (time.perf_counter() - begin)
    row: dict[str, Any] = {"wall_ms": round(wall, 3), "launch_ms": round(launched, 3)}
    row["wall_new_length_ms"] = round(statistics.median(milliseconds(growing, device, rounds // 2)), 3)
    with cudnn_attention(False):
        milliseconds(growing, device, 1)
        row["wall_new_length_no_cudnn_ms"] = round(
            statistics.median(milliseconds(growing, device, rounds)), 3
        )
    counts = counted(same_length, device)
    row["kernels"] = counts.kernels
    if setting.cuda:
        row["kernel_ms"] = round(counts.busy_ms, 3)
        row["launch_bound"] = round(wall / counts.busy_ms, 2) if counts.busy_ms else None
    return row


def _replayed(setting: Setting, graphs: GraphPasses, work: Any) -> dict[str, Any]:
    """A pass over a tree of our own: captured at the first call, with its trials, and replayed after."""
    before = graphs.captures, graphs.replays
    first = milliseconds(work, setting.device, 1)[0]
    wall = statistics.median(milliseconds(work, setting.device, 10))
    return {
        "first_ms": round(first, 1),
        "wall_ms": round(wall, 3),
        "captures": graphs.captures - before[0],
        "replays": graphs.replays - before[1],
        "reason": graphs.reason,
        "attention": "trees" if graphs.by_tree else "masks",
    }


def _graph(setting: Setting, model: Any, context: int) -> dict[str, Any]:
    """One token after a static cache: eager, and as a captured graph where the device has such."""
    row: dict[str, Any] = {"nodes": 1, "kind": "static cache"}
    try:
        plain = _StaticPass(model, context)
        rounds = 2 if setting.tiny else 10
        row["wall_ms"] = round(statistics.median(milliseconds(plain, setting.device, rounds)), 3)
        plain.rewind()
        expected = plain().float()
        if not setting.cuda:
            row["graph"] = "no CUDA device, not tried"
            return row
        row |= _captured(plain, expected, setting)
    except Exception as error:
        if "CUDA error" in str(error) and not setting.is_sound():
            raise
        row["graph"] = (
            f"not captured: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        )
    return row


def _captured(plain: _StaticPass, expected: Tensor, setting: Setting) -> dict[str, Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            plain()
    torch.cuda.current_stream().wait_stream(side)
    plain.rewind()
    synchronize(setting.device)
    before, begin = torch.cuda.memory_allocated(), time.perf_counter()
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # a graph collected meanwhile would spoil the capture
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = plain()
    finally:
        gc.enable()
    synchronize(setting.device)
    seconds, memory = time.perf_counter() - begin, torch.cuda.memory_allocated() - before
    plain.rewind()
    graph.replay()
    synchronize(setting.device)
    error = float((logits.float() - expected).abs().max())
    times = milliseconds(graph.replay, setting.device, 30)
    return {
        "graph": "captured",
        "graph_ms": round(statistics.median(times), 3),
        "capture_seconds": round(seconds, 3),
        "graph_mb": round(memory / 2**20, 1),
        "graph_error": error,
        "graph_equals_eager": error == 0.0,
    }


class _StaticPass:
    """One token after `context` others in a static cache; every call fills one more slot."""

    def __init__(self, model: Any, context: int) -> None:
        self._model, self._context = model, context
        device, slots = model.device, context + _ROOM
        self.cache = StaticCache(config=model.config, max_cache_len=slots)
        self._cache_name = cache_parameter(model)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (1, context), generator=generator).to(device)
        positions = torch.arange(context, device=device)[None]
        for part, part_positions in zip(ids.split(2048, 1), positions.split(2048, 1), strict=True):
            rows = part_positions[0][:, None] >= torch.arange(slots, device=device)[None]
            mask = torch.zeros(rows.shape, device=device, dtype=model.dtype)
            mask.masked_fill_(~rows, torch.finfo(model.dtype).min)
            self._call(part, part_positions, mask[None, None])
        self._token = ids[:, :1].clone()
        self._position = torch.full((1, 1), context, device=device)
        visible = torch.arange(slots, device=device) <= context
        self._mask = torch.zeros(slots, device=device, dtype=model.dtype)
        self._mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
        self._mask = self._mask[None, None, None]

    def _call(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        given = {self._cache_name: self.cache, "use_cache": True, "logits_to_keep": 1}
        logits: Tensor = self._model(
            input_ids=ids, position_ids=positions, attention_mask=mask, **given
        ).logits
        return logits

    def __call__(self) -> Tensor:
        return self._call(self._token, self._position, self._mask)

    def rewind(self) -> None:
        """Makes the next call write after the context again."""
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(self._context)
