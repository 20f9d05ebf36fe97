"""One memory for the keys of all layers: moves in and out, growth, and paths against layers of their own."""

from __future__ import annotations

import pytest
import torch

from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.graph.arena import PAGE, Arena, lies_on_one_device, slot_bytes
from tests.support.dispatched import Dispatched
from tests.support.models import CONFIGS, WINDOW


def filled(length: int, name: str = "gemma3", seed: int = 0) -> SpeculativeCache:
    cache = SpeculativeCache(CONFIGS[name](), length)
    write(cache, length, seed)
    return cache


def write(cache: SpeculativeCache, count: int, seed: int, staged: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache.stage(staged)
    for layer in range(len(cache.layers)):
        cache.update(*torch.randn((2, 1, 2, count, 8), generator=generator).unbind(), layer)
    cache.stage(False)


def states(cache: SpeculativeCache) -> list[torch.Tensor]:
    return [part.clone() for layer in cache.layers for part in (layer.keys, layer.values)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_all_layers_of_a_shape_share_a_tensor_of_zeros() -> None:
    arena = Arena(filled(9), 2 * PAGE)
    (tensor,) = arena.tensors
    assert tensor.shape == (3, 2, 1, 2, 2 * PAGE, 8)
    assert not tensor.any()
    assert arena.nbytes == tensor.nbytes == 2 * PAGE * slot_bytes(filled(9))


def test_keys_and_values_of_other_sizes_have_tensors_of_their_own() -> None:
    cache = SpeculativeCache(CONFIGS["llama"](), 4)
    for layer in range(3):
        cache.update(torch.ones(1, 2, 4, 6), torch.ones(1, 2, 4, 8), layer)
    assert slot_bytes(cache) == 3 * 2 * (6 + 8) * 4
    assert [tuple(tensor.shape) for tensor in Arena(cache, PAGE).tensors] == [
        (3, 1, 1, 2, PAGE, 6),
        (3, 1, 1, 2, PAGE, 8),
    ]


def test_a_path_moves_in_all_layers_in_two_calls() -> None:
    """As it does in caches without an arena, windows included, step by step."""
    own, here = filled(40), filled(40)
    arena = Arena(here, PAGE)
    arena.take(here)
    for step in range(30):
        for cache in (own, here):
            write(cache, 6, step, staged=True)
        moved = torch.tensor([3, 5])
        own.commit(moved, 2, 4)
        with Dispatched() as calls:
            here.commit(moved, 2, 4)
        assert calls.launches == ["index_select", "copy_"]
        assert equal(states(own), states(here))
    assert arena.holds(here)
    assert here.get_seq_length() == 160


def test_the_next_cache_waits_until_the_one_before_has_left() -> None:
    first, second = filled(30), filled(20, seed=1)
    before, arena = states(first), Arena(first, PAGE)
    arena.take(first)
    arena.release(second)
    assert arena.owner() is first
    arena.release(first)
    assert arena.owner() is None
    assert first.mover is None
    arena.take(second)
    assert arena.holds(second)
    assert equal(states(first), before)
    write(second, 50, 2)
    assert equal(states(first), before)


def test_a_window_that_forgets_does_so_again_outside() -> None:
    cache = filled(1000)
    arena = Arena(cache, 2048)
    arena.take(cache)
    write(cache, 500, 1)
    arena.release(cache)
    assert cache.layers[0].capacity < 300
    assert cache.layers[1].capacity == 1500
    write(cache, 5, 2)
    assert cache.layers[0].keys.shape[2] == WINDOW - 1


def test_a_cache_that_has_outgrown_it_is_noticed() -> None:
    cache = filled(250)
    arena = Arena(cache, PAGE)
    arena.take(cache)
    write(cache, 20, 1)
    assert not arena.holds(cache)
    held = states(cache)
    arena = Arena(cache, 2 * PAGE)
    arena.take(cache)
    assert equal(states(cache), held)


def test_a_cache_that_was_emptied_begins_at_the_first_slot_again() -> None:
    cache = filled(700)  # the windows have forgotten its beginning
    arena = Arena(cache, 1024)
    arena.take(cache)
    cache.reset()
    assert not arena.holds(cache)
    write(cache, 7, 1)
    held = states(cache)
    arena.take(cache)
    assert arena.holds(cache)
    assert equal(states(cache), held)
    keys, _ = arena.keys_and_values(7)[0]
    assert torch.equal(keys, cache.layers[0].keys)


def test_nothing_of_the_text_before_is_left() -> None:
    first = filled(30)
    arena = Arena(first, PAGE)
    arena.take(first)
    arena.tensors[0][..., 100, :] = float("nan")
    arena.release(first)
    second = filled(4, seed=1)
    arena.take(second)
    assert arena.tensors[0].isfinite().all()
    assert not arena.tensors[0][..., 4:, :].any()


def test_a_cache_that_nobody_holds_leaves_by_itself() -> None:
    cache = filled(9)
    arena = Arena(cache, PAGE)
    arena.take(cache)
    del cache
    assert arena.owner() is None


def test_a_cache_that_could_not_move_in_is_not_held() -> None:
    cache = filled(PAGE - 4)
    write(cache, 8, 1, staged=True)
    arena = Arena(cache, PAGE)
    with pytest.raises(RuntimeError):
        arena.take(cache)
    assert not arena.holds(cache)


def test_all_but_some_leave_a_memory_that_is_replaced() -> None:
    caches = [filled(9, seed=seed) for seed in range(3)]
    arena = Arena(caches[0], PAGE, rows=4)
    arena.assign(caches, 4)
    arena.vacate_all_but(caches[:1])
    assert [arena.holds(cache, lane) for lane, cache in enumerate(caches)] == [True, False, False]


def test_other_shapes_do_not_fit() -> None:
    arena = Arena(filled(9), PAGE)
    other = SpeculativeCache(CONFIGS["llama"](), 4)
    assert not lies_on_one_device(other)
    for layer in range(3):
        other.update(torch.ones(1, 2, 4, 6), torch.ones(1, 2, 4, 6), layer)
    assert lies_on_one_device(other)
    assert not arena.fits(other)
    assert arena.fits(filled(3))


def test_rows_have_lanes_of_their_own_and_move_to_the_first() -> None:
    caches = [filled(30 + row, seed=row) for row in range(4)]
    held = [states(cache) for cache in caches]
    arena = Arena(caches[0], PAGE, 4)
    assert arena.assign(caches, 4) == [0, 1, 2, 3]
    assert arena.assign([caches[2]], 1) == [0]
    assert [arena.owner(lane) for lane in range(4)] == [caches[2], caches[1], None, caches[3]]
    assert arena.assign([caches[3], caches[2]], 2) == [1, 0]
    assert [arena.owner(lane) for lane in range(4)] == [caches[2], caches[3], None, None]
    assert [cache.mover is None for cache in caches] == [True, True, False, False]
    assert all(map(equal, held, map(states, caches)))
    arena.vacate([0])
    assert arena.owner() is None
    arena.clear()
    assert all(map(equal, held, map(states, caches)))
    assert all(cache.mover is None for cache in caches)


def test_staged_nodes_move_with_their_cache() -> None:
    own, here = filled(40), filled(40)
    arena = Arena(here, PAGE, 2)
    arena.take(here, 1)
    for cache in (own, here):
        write(cache, 6, 9, staged=True)
    arena.take(here, 0)
    moved = torch.tensor([3, 5])
    for cache in (own, here):
        cache.commit(moved, 2, 4)
    assert equal(states(own), states(here))


def test_paths_of_all_rows_move_in_two_calls_for_each_shape() -> None:
    alone, rows = [[filled(40 + row, seed=row) for row in range(3)] for _ in range(2)]
    arena = Arena(rows[0], PAGE, 4)
    lanes = arena.assign(rows, 4)
    paths = [([3, 5], 2), ([4], 1), ([], 1)]
    moves = torch.zeros(2, 4, 2, dtype=torch.int64)
    for row, (moved, kept) in enumerate(paths):
        for cache in (alone[row], rows[row]):
            write(cache, 6, row, staged=True)
        alone[row].commit(torch.tensor(moved) if moved else None, kept, kept + len(moved))
        for at, node in enumerate(moved):
            moves[:, lanes[row], at] = torch.tensor([40 + row + node, 40 + row + kept + at])
    with Dispatched() as calls:
        arena.move_rows(moves)
    assert calls.launches == ["index", "index_put_"]
    for row, (moved, kept) in enumerate(paths):
        rows[row].commit(None, kept, kept + len(moved))
        assert equal(states(alone[row]), states(rows[row]))


def test_nothing_has_moved_where_paths_cannot_be_read() -> None:
    cache = SpeculativeCache(CONFIGS["llama"](), 4)
    for layer in range(3):
        cache.update(torch.rand(1, 2, 4, 6), torch.rand(1, 2, 4, 8), layer)
    arena = Arena(cache, PAGE, 2)
    arena.assign([cache], 2)
    before = [tensor.clone() for tensor in arena.tensors]
    arena.tensors = (arena.tensors[0], arena.tensors[1].narrow(-2, 0, 2))
    with pytest.raises(IndexError):
        arena.move_rows(torch.tensor([[[3], [0]], [[1], [0]]]))
    assert torch.equal(arena.tensors[0], before[0])
