"""Attention of a tree's nodes over a cache, in Triton: one program for every length of the text.

A mask has a column for each slot, and so a pass is captured for each number of slots. Here the length lies on
the device: one capture serves texts of any length, and slots beyond it cost nothing. Slots are read in runs,
by programs of their own (split-KV, as FlashDecoding does); the query heads that share keys read them once. A
second kernel adds the runs up. The runs' bounds depend on slots alone, never on the number of nodes.

Imported only where Triton is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["OPTIONS", "block_sizes", "run_length", "tree_attention"]

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

_NO_WINDOW = (1 << 31) - 1

_LARGEST_RUN = 1024

OPTIONS = {"num_warps": 4, "num_stages": 2}
"""Of the first kernel's compilation. With these and `block_sizes` sums stay in registers."""


@triton.jit
def _scores(
    q: tl.tensor, k: tl.tensor, scale: tl.tensor, softcap: tl.tensor, CAPPED: tl.constexpr
) -> tl.tensor:
    x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x


@triton.jit
def _add(x: tl.tensor, v: tl.tensor, maximum: tl.tensor, total: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """A block of keys: scores (rows, keys), -inf where unseen, and values, added to the running softmax."""
    larger = tl.maximum(maximum, tl.max(x, 1))
    finite = tl.where(larger == float("-inf"), 0.0, larger)
    p = tl.exp2((x - finite[:, None]) * _LOG2_E)
    shrink = tl.exp2((maximum - finite) * _LOG2_E)
    sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return larger, total * shrink + tl.sum(p, 1), sums


@triton.jit
def _attend_run(
    Q: tl.tensor, K: tl.tensor, V: tl.tensor, LENGTH: tl.tensor, DEPTHS: tl.tensor, HIDDEN: tl.tensor,
    SUMS: tl.tensor, MAXIMA: tl.tensor, TOTALS: tl.tensor, scale: tl.tensor, softcap: tl.tensor,
    window: tl.tensor, q_tree: tl.tensor, q_head: tl.tensor, q_node: tl.tensor, k_tree: tl.tensor,
    k_head: tl.tensor, k_slot: tl.tensor, v_tree: tl.tensor, v_head: tl.tensor, v_slot: tl.tensor,
    length_tree: tl.tensor, depth_tree: tl.tensor, hidden_tree: tl.tensor, nodes: tl.tensor,
    blocks: tl.tensor, run_length: tl.tensor, GROUP: tl.constexpr,
    DIM: tl.constexpr, VALUE: tl.constexpr, WIDE: tl.constexpr, WIDE_VALUE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:  # fmt: skip
    """One key head, one run of slots, and `ROWS` of a tree's rows: a row is a node in a query head.

    Keys of committed text, which every node sees but for its window, need no mask; the last block of the text
    and the nodes ask `HIDDEN`.
    """
    key_head, run = tl.program_id(0), tl.program_id(1)
    tree, block = tl.program_id(2) // blocks, tl.program_id(2) % blocks
    length = tl.load(LENGTH + tree * length_tree).to(tl.int32)  # 64 bits take the registers of the sums
    Q += tree.to(tl.int64) * q_tree
    K += tree.to(tl.int64) * k_tree + key_head.to(tl.int64) * k_head
    V += tree.to(tl.int64) * v_tree + key_head.to(tl.int64) * v_head
    DEPTHS += tree * depth_tree
    HIDDEN += tree * hidden_tree
    begin = run * run_length
    end = tl.minimum(begin + run_length, length + nodes)
    if WINDOWED:
        # The root sees farthest back.
        begin = tl.maximum(begin, tl.maximum(length - window + 1, 0) // KEYS * KEYS)
    if begin < end:
        rows = block * ROWS + tl.arange(0, ROWS)
        is_row = rows < GROUP * nodes
        node, head = rows % nodes, key_head * GROUP + rows // nodes
        d, e = tl.arange(0, WIDE), tl.arange(0, WIDE_VALUE)
        is_d, is_e = d < DIM, e < VALUE
        q = tl.load(
            Q + head[:, None] * q_head + node[:, None] * q_node + d[None, :],
            mask=is_row[:, None] & is_d[None, :],
            other=0.0,
        )
        position = length + tl.load(DEPTHS + node).to(tl.int32)
        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDE_VALUE], tl.float32)
        plain = begin + tl.maximum(tl.minimum(end, length) - begin, 0) // KEYS * KEYS
        for first in range(begin, plain, KEYS):
            slot = first + tl.arange(0, KEYS)
            at_key = K + slot[:, None] * k_slot + d[None, :]
            k = tl.load(at_key, mask=is_d[None, :], other=0.0)
            x = _scores(q, k, scale, softcap, CAPPED)
            if WINDOWED:
                x = tl.where(position[:, None] - slot[None, :] < window, x, float("-inf"))
            at_value = V + slot[:, None] * v_slot + e[None, :]
            v = tl.load(at_value, mask=is_e[None, :], other=0.0)
            maximum, total, sums = _add(x, v, maximum, total, sums)
        for first in range(plain, end, KEYS):
            slot = first + tl.arange(0, KEYS)
            is_slot = slot < end
            is_node = is_slot & (slot >= length)
            other = tl.where(is_node, slot - length, 0)
            sees = is_slot[None, :]
            if MASKED:
                at_pair = HIDDEN + node[:, None] * nodes + other[None, :]
                hidden = tl.load(at_pair, mask=is_node[None, :], other=0)
                sees = sees & (hidden == 0)
            if WINDOWED:
                depth = tl.load(DEPTHS + other, mask=is_node, other=0).to(tl.int32)
                at = tl.where(is_node, length + depth, slot)
                sees = sees & (position[:, None] - at[None, :] < window)
            at_key = K + slot[:, None] * k_slot + d[None, :]
            k = tl.load(at_key, mask=is_slot[:, None] & is_d[None, :], other=0.0)
            x = _scores(q, k, scale, softcap, CAPPED)
            x = tl.where(sees, x, float("-inf"))
            at_value = V + slot[:, None] * v_slot + e[None, :]
            v = tl.load(at_value, mask=is_slot[:, None] & is_e[None, :], other=0.0)
            maximum, total, sums = _add(x, v, maximum, total, sums)
        trees = tl.num_programs(2) // blocks
        at = ((run * trees + tree) * tl.num_programs(0) * GROUP + head) * nodes + node
        tl.store(SUMS + at[:, None] * VALUE + e[None, :], sums, mask=is_row[:, None] & is_e[None, :])
        tl.store(MAXIMA + at, maximum, mask=is_row)
        tl.store(TOTALS + at, total, mask=is_row)


@triton.jit
def _add_runs(
    SUMS: tl.tensor, MAXIMA: tl.tensor, TOTALS: tl.tensor, LENGTH: tl.tensor, SINKS: tl.tensor,
    OUT: tl.tensor, window: tl.tensor, nodes: tl.tensor, heads: tl.tensor, length_tree: tl.tensor,
    run_length: tl.tensor, VALUE: tl.constexpr, WIDE_VALUE: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr, HAS_SINKS: tl.constexpr,
) -> None:  # fmt: skip
    """One row of one tree: the runs that were written, in the order of their slots."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    length = tl.load(LENGTH + row // (heads * nodes) * length_tree).to(tl.int32)
    e = tl.arange(0, WIDE_VALUE)
    is_e = e < VALUE
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window + 1, 0) // KEYS * KEYS // run_length
    last = (length + nodes - 1) // run_length
    maximum = float("-inf")
    total = 0.0
    if HAS_SINKS:
        maximum = tl.load(SINKS + row // nodes % heads).to(tl.float32)
        total = 1.0
    sums = tl.zeros([WIDE_VALUE], tl.float32)
    for run in range(first, last + 1):
        at = run * rows + row
        largest = tl.load(MAXIMA + at)
        larger = tl.maximum(maximum, largest)
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # a row may see no key of the first runs
        shrink = tl.exp2((maximum - finite) * _LOG2_E)
        weight = tl.exp2((largest - finite) * _LOG2_E)
        total = total * shrink + weight * tl.load(TOTALS + at)
        sums = sums * shrink + weight * tl.load(SUMS + at * VALUE + e, mask=is_e, other=0.0)
        maximum = larger
    tl.store(OUT + row * VALUE + e, (sums / total).to(OUT.dtype.element_ty), mask=is_e)


def run_length(slots: int) -> int:
    """Slots of a run, by those of the cache: enough runs to fill a card, and scratch of some tens of MB."""
    return int(min(_LARGEST_RUN, max(256, triton.next_power_of_2(slots) // 32)))


def block_sizes(rows: int, dim: int, width: int) -> tuple[int, int, int, int]:
    """Sizes of a block, powers of two that `tl.dot` takes: its rows, keys, dimensions and those of values."""
    wide, wide_value = (max(16, triton.next_power_of_2(size)) for size in (dim, width))
    size = max(wide, wide_value)
    most, keys = 64 if size <= 128 else 32, 64 if size <= 64 else 32
    return min(most, max(16, triton.next_power_of_2(rows))), keys, wide, wide_value


@torch.library.custom_op("retrieval_draft::tree_attention", mutates_args=())
def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: Tensor,
    depths: Tensor,
    hidden: Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the nodes of trees over their committed texts and the nodes that they see.

    Args:
        query: (trees, heads, n, dim), each row contiguous.
        key: (trees, key heads, slots, dim). Slot s holds position s; the nodes lie in slots length,
            length + 1, ... in their order; slots after them may hold anything.
        value: (trees, key heads, slots, dim of values).
        length: int64, shape (trees,). Committed tokens, read on the device; length + n is at most `slots`.
        depths: int64, shape (trees, n), each row contiguous. Of the nodes: their positions less `length`.
        hidden: bool, shape (trees, n, n), each tree contiguous. [t, i, j] true where node i of tree t must
            not see its node j; None where all are seen.
        scale: Of the products.
        window: Positions that a node sees, itself included; None for all.
        softcap: Limit of the scores, which near it smoothly.
        sinks: (heads,). Scores of a key without a value, which takes its share of each query.

    Returns:
        (trees, heads, n, dim of values), of the query's dtype.

    Example:
        one tree, 1 head, keys [[1], [2]], values [[3], [5]], length 1, one node, query [[0]]: [[4]]
    """
    trees, heads, nodes, dim = query.shape
    key_heads, slots, width = key.shape[1], key.shape[2], value.shape[3]
    group = heads // key_heads
    run = run_length(slots)
    runs = triton.cdiv(slots, run)
    rows, keys, wide, wide_value = block_sizes(group * nodes, dim, width)
    blocks = triton.cdiv(group * nodes, rows)
    sums = query.new_empty((runs, trees, heads, nodes, width), dtype=torch.float32)
    maxima, totals = query.new_empty((2, runs, trees, heads, nodes), dtype=torch.float32)
    out = query.new_empty((trees, heads, nodes, width))
    reach = _NO_WINDOW if window is None else window
    _attend_run[(key_heads, runs, blocks * trees)](
        query, key, value, length, depths, depths if hidden is None else hidden, sums, maxima, totals,
        scale, 1.0 if softcap is None else softcap, reach, *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], length.stride(0), depths.stride(0), 0 if hidden is None else hidden.stride(0),
        nodes, blocks, run, group, dim, width, wide, wide_value, rows, keys,
        window is not None, softcap is not None, hidden is not None, **OPTIONS,
    )  # fmt: skip
    _add_runs[(trees * heads * nodes,)](
        sums, maxima, totals, length, maxima if sinks is None else sinks, out, reach, nodes, heads,
        length.stride(0), run, width, wide_value, keys, window is not None, sinks is not None,
    )  # fmt: skip
    return out


@tree_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, length: Tensor, depths: Tensor, hidden: Tensor | None,
    scale: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return query.new_empty((*query.shape[:3], value.shape[3]))
