"""Part 3: ways to attend over a tree's nodes and the keys before them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_check.measure import device_us, milliseconds
from benchmarks.gpu_check.report import Box, Report
from benchmarks.gpu_check.setting import Setting

__all__ = ["VARIANTS", "attention_inputs", "run"]

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

_NEW_LENGTHS = 3
"""Key lengths never seen before, on which first calls are timed."""


def _repeated(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as in transformers: every key and value copied for each query head."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def _grouped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The groups as a batch, keys seen by all of them: nothing is copied."""
    heads, (_, kv_heads, _, size) = query.shape[1], keys.shape
    nodes, groups = query.shape[2], heads // kv_heads
    queries = query.view(kv_heads, groups, nodes, size).transpose(0, 1)
    keys, values = keys.expand(groups, -1, -1, -1), values.expand(groups, -1, -1, -1)
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return out.transpose(0, 1).reshape(1, heads, nodes, size)


def _native(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped queries of torch's own."""
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


@cache
def _chain(nodes: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The nodes of `attention_inputs` as the project's kernel takes them."""
    hidden = torch.ones(nodes, nodes, device=device, dtype=torch.bool).triu(1)
    return torch.tensor([keys - nodes], device=device), torch.arange(nodes, device=device), hidden


def _by_tree(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The project's own kernel, in Triton."""
    from retrieval_draft.engine.graph.tree_attention import tree_attention

    length, depths, hidden = _chain(query.shape[2], keys.shape[2], query.device)
    out: Tensor = tree_attention(
        query, keys, values, length, depths, None if mask is None else hidden, query.shape[-1] ** -0.5
    )
    return out


VARIANTS: dict[str, tuple[Attend, SDPBackend | None]] = {
    "torch's choice, repeated heads": (_repeated, None),
    "cudnn, repeated heads": (_repeated, SDPBackend.CUDNN_ATTENTION),
    "efficient, repeated heads": (_repeated, SDPBackend.EFFICIENT_ATTENTION),
    "efficient, groups as batch": (_grouped, SDPBackend.EFFICIENT_ATTENTION),
    "flash, one token": (_native, SDPBackend.FLASH_ATTENTION),
    "of trees, in Triton": (_by_tree, None),
}


def attention_inputs(
    heads: int, kv_heads: int, size: int, nodes: int, keys: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Random queries, keys, values, and the mask of a chain of nodes after the other keys."""
    torch.manual_seed(keys)
    query = torch.randn(1, heads, nodes, size, device=device, dtype=dtype)
    key, value = torch.randn(2, 1, kv_heads, keys, size, device=device, dtype=dtype).unbind(0)
    if nodes == 1:
        return query, key, value, None
    # Rows of a multiple of 16 columns, as the engine's masks have them.
    buffer = torch.zeros(nodes, -(-keys // 16) * 16, device=device, dtype=dtype)
    hidden = torch.ones(nodes, nodes, device=device, dtype=torch.bool).triu(1)
    buffer[:, keys - nodes : keys] = hidden.to(dtype) * torch.finfo(dtype).min
    return query, key, value, buffer[None, None, :, :keys]


def _reference(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Reference result in float64."""
    groups = query.shape[1] // keys.shape[1]
    out = []
    for head in range(query.shape[1]):
        scores = query[0, head].double() @ keys[0, head // groups].double().T / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask[0, 0] < 0, float("-inf"))
        out.append(scores.softmax(-1) @ values[0, head // groups].double())
    return torch.stack(out)[None]


@torch.no_grad()
def run(setting: Setting, box: Box, report: Report) -> None:
    """Runs every variant at every number of nodes and keys."""
    heads, kv_heads, size = (4, 2, 16) if setting.tiny else (32, 8, 128)
    dtype = torch.bfloat16
    lengths = (64, 256) if setting.tiny else (512, 2048, 8192, 32768)
    for length in lengths:
        for nodes in (1, 4) if setting.tiny else (1, 16, 64):
            given = attention_inputs(heads, kv_heads, size, nodes, length, dtype, setting.device)
            exact = _reference(*given)
            for name, (attend, backend) in VARIANTS.items():
                if name == "flash, one token" and nodes > 1:
                    continue
                if not box.has(0.5):
                    report.note(f"out of time at {length} keys, {nodes} nodes")
                    return
                row: dict[str, Any] = {"variant": name, "nodes": nodes, "keys": length}
                try:
                    row |= _measure(attend, backend, given, exact, setting, nodes)
                except (RuntimeError, ImportError) as error:  # Triton comes with torch for CUDA alone
                    if "CUDA error" in str(error):
                        raise
                    row["unavailable"] = str(error).splitlines()[0][:160]
                report.row(**row)
                off = row.get("max_error")
                if off is not None and not off < 0.05:
                    report.fail(f"attention {name!r} is off by {off:.2g} at {nodes} nodes, {length} keys")


def _measure(
    attend: Attend,
    backend: SDPBackend | None,
    given: tuple[Tensor, Tensor, Tensor, Tensor | None],
    exact: Tensor,
    setting: Setting,
    nodes: int,
) -> dict[str, Any]:
    def call(inputs: tuple[Tensor, Tensor, Tensor, Tensor | None] = given) -> Tensor:
        if backend is None:
            return attend(*inputs)
        with sdpa_kernel([backend]):
            return attend(*inputs)

    query, keys, _, _ = given
    first = []
    for fewer in range(1, _NEW_LENGTHS + 1):
        other = attention_inputs(
            query.shape[1],
            keys.shape[1],
            query.shape[3],
            nodes,
            keys.shape[2] - fewer,
            query.dtype,
            query.device,
        )
        first += milliseconds(lambda other=other: call(other), setting.device, 1)  # type: ignore[misc]
    out = call()
    return {
        "first_call_ms": round(statistics.median(first), 3),
        "warm_us": round(device_us(call, setting.device, 5 if setting.tiny else 20), 1),
        "max_error": float((out.double() - exact).abs().max()),
    }
