"""Trees of a batch's rows, packed lane by lane, against a twin that writes each number by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import TreeAttention, packed_words
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.graph.tree_rows import TreeRows, most_moves
from tests.support.models import CONFIGS
from tests.support.trees import ancestors, tree_of

DEVICE = torch.device("cpu")


def cache_of(length: int, shift: int = 0) -> SpeculativeCache:
    cache = SpeculativeCache(CONFIGS["llama"](), length)
    for layer in range(len(cache.layers)):
        cache.update(*torch.zeros(2, 1, 2, length, 8).unbind(), layer)
    cache.shift = shift
    return cache


def random_tree(size: int, rng: np.random.Generator) -> DraftTree:
    parents = [-1] + [int(rng.integers(max(0, node - 4), node)) for node in range(1, size)]
    return tree_of(rng.integers(0, 97, size).tolist(), parents)


def words_of(tree: DraftTree | None, length: int, shift: int, nodes: int) -> list[int]:
    """Tokens, positions, depths, length, then a byte for each pair of nodes: 1 where one is not seen."""
    size = 0 if tree is None else len(tree)
    tokens = [0 if tree is None or node >= size else int(tree.tokens[node]) for node in range(nodes)]
    depths = [0 if tree is None or node >= size else int(tree.depths[node]) for node in range(nodes)]
    out = [*tokens, *(length + shift + depth for depth in depths), *depths, length]
    if nodes > 1:
        hidden = ~np.eye(nodes, dtype=bool)
        if tree is not None:
            hidden[:size, :size] &= ~ancestors(tree)
        out += np.frombuffer(hidden.tobytes().ljust(-(-nodes * nodes // 8) * 8, b"\0"), np.int64).tolist()
    return out


@pytest.mark.parametrize("nodes", [1, 4, 8, 32])
def test_lanes_hold_what_is_written_by_hand(nodes: int) -> None:
    """Several steps of one object, whose lanes, sizes and trees change."""
    rng = np.random.default_rng(nodes)
    trees = TreeRows(DEVICE)
    for rows, used in ((4, [2, 0, 3]), (2, [0, 1]), (8, [7, 1, 4, 0, 2])):
        caches = [cache_of(int(rng.integers(3, 60)), int(rng.integers(0, 3))) for _ in used]
        made = [random_tree(int(rng.integers(1, nodes + 1)), rng) for _ in used]
        lengths = [cache.get_seq_length() + 2 for cache in caches]
        trees.begin(rows, nodes, dict(zip(map(id, caches), used, strict=True)))
        for cache, tree, length in zip(caches, made, lengths, strict=True):
            trees.pack(cache, tree, length)
        trees.send()
        expected = [words_of(None, 0, 0, nodes) for _ in range(rows)]
        for lane, cache, tree, length in zip(used, caches, made, lengths, strict=True):
            expected[lane] = words_of(tree, length, cache.shift, nodes)
        assert trees.packed.tolist() == expected
        assert trees.packed.shape == (rows, packed_words(nodes))
        assert not trees.moves.any()
        assert [trees.lane_of(cache) for cache in caches] == used


def test_paths_move_to_the_slots_after_their_texts() -> None:
    """Nodes 3 and 5 of one row after one that lies in place, node 2 of another; nothing of the third."""
    caches = [cache_of(length) for length in (10, 20, 30)]
    trees = TreeRows(DEVICE)
    trees.begin(4, 8, {id(cache): lane for cache, lane in zip(caches, (1, 3, 0), strict=True)})
    tree = tree_of([5, 6], [-1, 0])
    trees.pack(caches[0], tree, 13, np.array([3, 5]), 1)
    trees.pack(caches[1], tree, 21, np.array([2]), 0)
    trees.pack(caches[2], tree, 31)
    trees.send()
    assert trees.moves.shape == (2, 4, most_moves(4))
    assert trees.moves[:, :, :2].tolist() == [
        [[0, 0], [13, 15], [0, 0], [22, 0]],
        [[0, 0], [11, 12], [0, 0], [20, 0]],
    ]
    assert not trees.moves[:, :, 2:].any()
    assert torch.equal(trees.sent, torch.cat([trees.packed.flatten(), trees.moves.flatten()]))
    trees.begin(4, 8, {id(caches[0]): 1})
    trees.pack(caches[0], tree, 13)
    trees.send()
    assert not trees.moves.any(), "of the step before"


def test_paths_as_long_as_a_pass_takes_fill_their_part_and_no_other() -> None:
    rng = np.random.default_rng(0)
    caches, trees, most = [cache_of(9) for _ in range(2)], TreeRows(DEVICE), most_moves(2)
    trees.begin(2, 4, {id(cache): lane for lane, cache in enumerate(caches)})
    moved = np.arange(most)
    for cache in caches:
        trees.pack(cache, random_tree(4, rng), 9 + most, moved, 0)
    before = trees._words[: 2 * packed_words(4)].copy()
    trees.send()
    assert trees.packed.flatten().tolist() == before.tolist()
    assert trees.moves.tolist() == [[(9 + moved).tolist()] * 2, [np.arange(9, 9 + most).tolist()] * 2]


def test_many_rows_move_no_more_slots_in_all_than_some() -> None:
    assert [most_moves(rows) for rows in (1, 2, 8, 16, 64, 512)] == [32, 32, 32, 16, 4, 0]


def test_a_row_alone_gets_the_inputs_that_it_makes_for_itself() -> None:
    """An eager pass takes its part where that of all rows cannot be captured."""
    tree, cache = tree_of([5, 6, 7, 8], [-1, 0, 1, 0]), cache_of(12)
    trees, windows = TreeRows(DEVICE), {"full_attention": None, "sliding_attention": 4}
    trees.begin(2, 8, {id(cache): 1})
    trees.pack(cache, tree, 12)
    trees.send()

    def attention() -> TreeAttention:
        return TreeAttention(dict(windows), torch.float32, DEVICE, (1, 8))

    found, alone = trees.inputs(cache, attention()), attention().prepare(tree, 12)
    assert found.lane == (trees, 1)
    assert torch.equal(found.input_ids, alone.input_ids)
    assert torch.equal(found.position_ids, alone.position_ids)
    masks: list[Any] = [found.attention_mask, alone.attention_mask]
    assert all(torch.equal(masks[0][kind], masks[1][kind]) for kind in windows)
