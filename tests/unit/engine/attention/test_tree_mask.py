"""Masks and positions of trees, written out and against a slow definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import TreeAttention, _Mask, padded_size
from tests.support.trees import ancestors, tree_of

CPU = torch.device("cpu")
MIN = torch.finfo(torch.float32).min


def slow_mask(tree: DraftTree, length: int, window: int | None) -> torch.Tensor:
    """Hidden or not by absolute positions, key by key."""
    first = 0 if window is None else max(0, length - window + 1)
    seen = ancestors(tree)
    out = torch.full((len(tree), length - first + len(tree)), MIN)
    for node in range(len(tree)):
        position = length + int(tree.depths[node])
        for key in range(first, length):
            if window is None or key > position - window:
                out[node, key - first] = 0
        for other in range(len(tree)):
            near = window is None or tree.depths[node] - tree.depths[other] < window
            if seen[node, other] and near:
                out[node, length - first + other] = 0
    return out


def test_small_tree_written_out() -> None:
    attention = TreeAttention({"full_attention": None}, torch.float32, CPU)
    inputs = attention.prepare(tree_of([8, 9, 4, 3], [-1, 0, 1, 0]), 2, np.array([3, 1]))
    assert inputs.input_ids.tolist() == [[8, 9, 4, 3]]
    assert inputs.position_ids.tolist() == [[2, 3, 4, 3]]
    assert inputs.moved.tolist() == [3, 1]
    assert (inputs.attention_mask[0, 0] == 0).int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 8, 40])
def test_masks_of_a_whole_generation_and_the_next_one(
    window: int | None, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host and as on a device."""
    rng = np.random.default_rng(0)
    attention = TreeAttention({"some": window}, torch.float32, CPU)
    if not here:
        monkeypatch.setattr(attention, "_is_here", False)
        monkeypatch.setattr(attention, "_send", lambda words: attention._host[:words])
        attention._masks = {"some": _Mask(window, torch.float32, CPU)}
    for _ in range(3):
        length = int(rng.integers(1, 30))
        for _ in range(40):
            size = int(rng.integers(1, 20))
            parents = [-1] + [int(rng.integers(max(0, node - 3), node)) for node in range(1, size)]
            tree = tree_of(rng.integers(0, 50, size).tolist(), parents)
            mask = attention.prepare(tree, length).attention_mask
            if size == 1:
                assert mask is None
            else:
                expected = slow_mask(tree, length, window)
                assert mask.shape == (1, 1, *expected.shape)
                assert torch.equal(mask[0, 0] == 0, expected == 0)
                assert torch.equal(mask[0, 0], expected)
            length += int(rng.integers(1, 6))


def test_several_layer_types_get_a_dictionary() -> None:
    attention = TreeAttention({"full_attention": None, "sliding_attention": 4}, torch.float32, CPU)
    plain = attention.prepare(DraftTree.root(3), 9)
    assert plain.attention_mask == {"full_attention": None, "sliding_attention": None}
    masks = attention.prepare(tree_of([1, 2], [-1, 0]), 9).attention_mask
    assert masks["full_attention"].shape == (1, 1, 2, 11)
    assert masks["sliding_attention"].shape == (1, 1, 2, 5)


def test_mask_buffer_is_reused() -> None:
    attention = TreeAttention({"full_attention": None}, torch.float32, CPU)
    first = attention.prepare(tree_of([1, 2, 3], [-1, 0, 0]), 5).attention_mask
    assert first.data_ptr() == attention.prepare(tree_of([1, 2], [-1, 0]), 9).attention_mask.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masks_of_other_precisions_are_finite(dtype: torch.dtype) -> None:
    attention = TreeAttention({"full_attention": None}, dtype, CPU)
    tree = tree_of([1, 2, 3], [-1, 0, 0])
    mask = attention.prepare(tree, 5).attention_mask
    assert mask.dtype == dtype
    assert mask.isfinite().all()
    hidden = slow_mask(tree, 5, None) != 0
    assert torch.equal(mask[0, 0], hidden * torch.tensor(torch.finfo(dtype).min, dtype=dtype))


def test_padded_nodes_see_no_node_but_themselves() -> None:
    attention = TreeAttention({"full_attention": None}, torch.float32, CPU)
    attention.pads = True
    inputs = attention.prepare(tree_of([7, 8, 9], [-1, 0, 1]), 2)
    assert inputs.input_ids.tolist() == [[7, 8, 9, 0]]
    assert inputs.position_ids.tolist() == [[2, 3, 4, 2]]
    assert (inputs.attention_mask[0, 0, :, 2:] == 0).int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1],
    ]  # fmt: skip


def test_sizes() -> None:
    assert [padded_size(n) for n in (1, 2, 3, 5, 9, 17, 25, 33, 49, 64, 65, 97)] == [
        1, 2, 4, 8, 16, 24, 32, 48, 64, 64, 96, 128,
    ]  # fmt: skip
