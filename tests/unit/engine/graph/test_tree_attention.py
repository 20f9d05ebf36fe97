"""The Triton kernels, by Triton's interpreter on the CPU, against attention written out in numpy."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("compiled for a card; TRITON_INTERPRET=1 runs it here", allow_module_level=True)

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.graph import attention
from retrieval_draft.engine.graph import tree_attention as module
from retrieval_draft.engine.graph.tree_attention import run_length, tree_attention
from retrieval_draft.engine.target import Target
from tests.random_generate.architectures import EAGER_ONLY, model_of
from tests.support.batches import padded, ragged
from tests.support.trees import tree_of


def random_tree(nodes: int, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Nodes that each one must not see, and the depths of all."""
    hidden = ~np.eye(nodes, dtype=bool)
    depths = np.zeros(nodes, np.int64)
    for node in range(1, nodes):
        parent = int(rng.integers(max(0, node - 4), node))
        hidden[node] &= hidden[parent]
        depths[node] = depths[parent] + 1
    return hidden, depths


def attention_numpy(
    query: Any, key: Any, value: Any, length: int, depths: Any, hidden: Any, scale: float,
    window: int | None, softcap: float | None, sinks: Any,
) -> NDArray[np.float64]:  # fmt: skip
    """The kernels' twin: (heads, n, dim of values)."""
    heads, nodes = query.shape[1:3]
    group = heads // key.shape[1]
    out = np.empty((heads, nodes, value.shape[3]))
    for head in range(heads):
        for node in range(nodes):
            seen = list(range(length)) + [length + each for each in range(nodes) if not hidden[node, each]]
            positions = [at if at < length else length + depths[at - length] for at in seen]
            if window is not None:
                at = length + depths[node]
                seen = [
                    slot for slot, position in zip(seen, positions, strict=True) if at - position < window
                ]
            scores = key[0, head // group, seen].astype(np.float64) @ query[0, head, node] * scale
            if softcap is not None:
                scores = np.tanh(scores / softcap) * softcap
            sink = [] if sinks is None else [float(sinks[head])]
            weights = np.exp(np.concatenate([scores, sink]) - max([*scores, *sink]))
            weights = weights[: len(seen)] / weights.sum()
            out[head, node] = weights @ value[0, head // group, seen]
    return out


CASES = {
    "groups": (4, 2, 16, 16, None, None, False),
    "one head": (1, 1, 16, 16, None, None, False),
    "window": (4, 2, 16, 16, 20, None, False),
    "narrow window": (2, 1, 16, 16, 3, None, False),
    "softcap": (4, 4, 16, 16, None, 5.0, False),
    "sinks": (6, 2, 16, 16, 30, None, True),
    "odd sizes": (6, 2, 24, 40, None, None, False),
}


LENGTHS = [(0, 8), (5, 1), (256, 8), (300, 12)]


@pytest.mark.parametrize(
    ("case", "length", "nodes"),
    [*((case, 70, 9) for case in CASES), *(("narrow window", *each) for each in LENGTHS)],
)
def test_kernels_attend_as_written_out(case: str, length: int, nodes: int) -> None:
    heads, key_heads, dim, width, window, softcap, has_sinks = CASES[case]
    rng = np.random.default_rng(length + nodes)
    slots = 384
    hidden, depths = random_tree(nodes, rng)
    query = rng.standard_normal((1, heads, nodes, dim)).astype(np.float32)
    key = rng.standard_normal((1, key_heads, slots, dim)).astype(np.float32)
    value = rng.standard_normal((1, key_heads, slots, width)).astype(np.float32)
    key[:, :, length + nodes :] = value[:, :, length + nodes :] = np.nan  # slots that were never written
    sinks = rng.standard_normal(heads).astype(np.float32) if has_sinks else None
    found = tree_attention(
        torch.from_numpy(query), torch.from_numpy(key), torch.from_numpy(value), torch.tensor([length]),
        torch.from_numpy(depths)[None], torch.from_numpy(hidden)[None] if nodes > 1 else None, 0.3, window,
        softcap, None if sinks is None else torch.from_numpy(sinks),
    )  # fmt: skip
    expected = attention_numpy(query, key, value, length, depths, hidden, 0.3, window, softcap, sinks)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5, rtol=1e-5)


def test_keys_and_queries_of_other_strides_are_read_where_they_lie() -> None:
    """Layers' keys are slices of an arena, and queries are transposed views."""
    rng = np.random.default_rng(0)
    nodes, length = 8, 40
    hidden, depths = random_tree(nodes, rng)
    states = torch.from_numpy(rng.standard_normal((2, 1, 2, 256, 16)).astype(np.float32))
    query = torch.from_numpy(rng.standard_normal((1, nodes, 4, 16)).astype(np.float32)).transpose(1, 2)
    key, value = (states[part].narrow(-2, 0, 64) for part in range(2))
    rest = torch.tensor([length]), torch.from_numpy(depths)[None], torch.from_numpy(hidden)[None], 0.25
    found = tree_attention(query, key, value, *rest)
    again = tree_attention(query.contiguous(), key.contiguous(), value.contiguous(), *rest)
    torch.testing.assert_close(found, again, atol=0, rtol=0)


def matmul_row_by_row(a: NDArray[np.float32], b: NDArray[np.float32], **given: Any) -> NDArray[np.float32]:
    """`np.matmul` of (n, k) and (k, m), of which each element is summed alike in products of any size."""
    out: NDArray[np.float32] = (a[:, None, :] * np.ascontiguousarray(b.T)).sum(-1)
    return out


def test_the_capacity_of_the_cache_and_other_nodes_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node's sums do not depend on the padding beside it."""
    monkeypatch.setattr(module, "run_length", lambda slots: 64)
    # The interpreter multiplies by BLAS, which on some machines sums a row otherwise beside other rows.
    monkeypatch.setattr(np, "matmul", matmul_row_by_row)
    rng = np.random.default_rng(1)
    length = 100
    states = torch.from_numpy(rng.standard_normal((2, 1, 2, 512, 16)).astype(np.float32))
    query = torch.from_numpy(rng.standard_normal((1, 4, 32, 16)).astype(np.float32))
    hidden, depths = random_tree(32, rng)
    few = 8  # the first nodes see none of the later ones
    found = [
        tree_attention(
            query[:, :, :nodes].contiguous(), states[0, :, :, :slots], states[1, :, :, :slots],
            torch.tensor([length]), torch.from_numpy(depths[:nodes])[None],
            torch.from_numpy(hidden[:nodes, :nodes].copy())[None], 0.25,
        )[:, :, :few]
        for nodes, slots in ((few, 256), (32, 512))
    ]  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("window", [None, 20])
def test_rows_of_a_batch_are_attended_to_as_each_alone(window: int | None) -> None:
    """Lengths of their own, inputs that are slices of what is packed for all, a lane that holds NaN."""
    rng = np.random.default_rng(2)
    nodes, lengths = 8, torch.tensor([[0, 9], [300, 9], [40, 9]])[:, 0]
    made = [random_tree(nodes, rng) for _ in lengths]
    depths = torch.from_numpy(np.stack([each for _, each in made]))
    hidden = torch.zeros((3, 2 * nodes * nodes), dtype=torch.bool)
    hidden[:, : nodes * nodes] = torch.from_numpy(np.stack([each.reshape(-1) for each, _ in made]))
    hidden = hidden[:, : nodes * nodes].view(3, nodes, nodes)
    states = torch.from_numpy(rng.standard_normal((2, 4, 2, 384, 16)).astype(np.float32))
    states[:, 3] = np.nan
    query = torch.from_numpy(rng.standard_normal((3, 4, nodes, 16)).astype(np.float32))
    sinks = torch.randn(4)
    key, value = states[0, :3], states[1, :3]
    found = tree_attention(query, key, value, lengths, depths, hidden, 0.25, window, None, sinks)
    for row in range(3):
        one = slice(row, row + 1)
        alone = tree_attention(
            query[one], key[one], value[one], lengths[one].clone(), depths[one].clone(),
            hidden[one].contiguous(), 0.25, window, None, sinks,
        )  # fmt: skip
        assert torch.equal(found[one], alone)
        assert alone.isfinite().all()


def test_runs_are_longer_in_larger_caches() -> None:
    assert [run_length(slots) for slots in (256, 8192, 16384, 32768, 1 << 17)] == [256, 256, 512, 1024, 1024]


def test_the_example() -> None:
    ones = torch.ones(1, 1, 1, 1)
    key, value = (torch.tensor(each, dtype=torch.float32).view(1, 1, 2, 1) for each in ([1, 2], [3, 5]))
    assert tree_attention(0 * ones, key, value, torch.tensor([1]), torch.tensor([[0]]), None, 1.0).item() == 4


def begun(target: Target, length: int) -> Any:
    cache = target.cache(length + 30)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 97, length))
    for _ in target.prefill(cache, ids, 1):
        pass
    return cache


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss", "deepseek-v3"])
def test_captured_passes_attend_to_trees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over steps that move paths: plain, with soft caps, windows, sinks, and values of another size."""
    calls = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments[7:9])
        return tree_attention(*arguments)

    monkeypatch.setattr(attention, "_kernel", lambda: counted)
    model = model_of(name, "eager" if name in EAGER_ONLY else "sdpa", 97, 0, torch.float32)
    eager, target = Target(model, "off"), Target(model, "tape")
    mine, theirs = begun(target, 60), begun(eager, 60)
    for step in range(4):
        tree = tree_of([5, 6, 7, 8, 9], [-1, 0, 1, 0, 3]) if step else tree_of([5], [-1])
        length = mine.get_seq_length()
        found = target.verify_tree(mine, tree, length)[: len(tree)]
        wanted = eager.verify_tree(theirs, tree, length)
        assert float((found - wanted).abs().max()) < 1e-4
        for cache in (mine, theirs):
            cache.commit(torch.tensor([3, 4]) if step else None, 1, 3 if step else 1)
    assert target.graphs is not None
    assert target.graphs.reason is None
    assert target.graphs.by_tree
    assert not target.graphs._reads_masks
    assert len(calls) == target.graphs.captures * model.config.num_hidden_layers
    assert {window for window, _ in calls} == set(target.graphs._windows.values())
    assert any(softcap for _, softcap in calls) == (name == "gemma2")


@torch.no_grad()
@pytest.mark.parametrize("wrong", [lambda out: out + 1, lambda out: out[:, :, :0]], ids=["values", "shape"])
def test_masks_are_read_where_the_kernel_is_wrong(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_kernel", lambda: lambda *arguments: wrong(tree_attention(*arguments)))
    model = model_of("llama", "sdpa", 97, 0, torch.float32)
    eager, target = Target(model, "off"), Target(model, "tape")
    tree = tree_of([5, 6, 7], [-1, 0, 0])
    found = target.verify_tree(begun(target, 30), tree, 30)[:3]
    assert torch.allclose(found, eager.verify_tree(begun(eager, 30), tree, 30), atol=1e-4)
    assert target.graphs is not None
    assert target.graphs.replays == 1
    assert not target.graphs.by_tree


@torch.no_grad()
@pytest.mark.parametrize(("largest", "sizes"), [(256, 1), (4, 2)])
def test_one_pass_does_for_texts_of_any_length_where_no_layer_reads_masks(
    largest: int, sizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_LARGEST_HEAD", largest)
    model = model_of("llama", "sdpa", 97, 0, torch.float32)
    eager, target = Target(model, "off"), Target(model, "tape")
    assert target.graphs is not None
    tree = tree_of([5, 6, 7], [-1, 0, 0])
    for length in (30, 300, 40, 310):
        found = target.verify_tree(begun(target, length), tree, length)[:3]
        wanted = eager.verify_tree(begun(eager, length), tree, length)
        assert torch.allclose(found, wanted, atol=1e-4)
    assert target.graphs.captures == sizes


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_captured_passes_over_rows_attend_to_trees(name: str) -> None:
    model = model_of(name, "sdpa", 97, 0, torch.float32)
    ids, mask = padded(ragged((9, 23, 14)))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found, wanted = (
        RetrievalDrafter.for_model(model, config=DraftConfig(nodes=3, graphs=graphs))
        for graphs in ("tape", "off")
    )
    assert torch.equal(found.generate(ids, mask, **options), wanted.generate(ids, mask, **options))
    graphs = found.target.graphs
    assert graphs is not None
    assert (graphs.reason, graphs.rows_reason) == (None, None)
    assert graphs.by_tree
    assert not graphs._reads_masks
    assert any(rows == 4 for rows, _, _ in graphs._passes)
