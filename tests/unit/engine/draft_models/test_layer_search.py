"""The search for layers to skip: bounded, the same for the same scores, and better than any single layer."""

from __future__ import annotations

import pytest

from retrieval_draft.engine.draft_models.layer_search import MORE, SINGLES, LayerSearch


def searched(
    layers: int, score: dict[int, float], head: float = 0.0
) -> tuple[LayerSearch, list[tuple[int, ...]]]:
    """A search in which layers spoil drafts independently of each other."""
    search, tried = LayerSearch(layers, head, depth=4), []
    while (candidate := search.candidate) is not None:
        tried.append(candidate)
        chance = 1.0
        for layer in candidate:
            chance *= score.get(layer, 0.1)
        search.note(chance)
    return search, tried


def test_every_layer_is_tried_alone_and_the_best_ones_together() -> None:
    search, tried = searched(6, {3: 0.99, 4: 0.98})
    assert tried[:5] == [(5,), (4,), (3,), (2,), (1,)]
    assert tried[5] == (3, 4)  # the best two
    assert all(3 in candidate and len(candidate) <= 3 for candidate in tried[5:])
    # Two of six layers less in a draft are worth a chance of 0.97 instead of 0.99.
    assert search.best == (3, 4)
    assert search.value(0.97, 2) > search.value(0.99, 1)


def test_where_layers_cost_next_to_nothing_the_best_single_one_stays() -> None:
    search, _ = searched(6, {3: 0.8, 4: 0.7}, head=1000.0)
    assert search.best == (3,)


@pytest.mark.parametrize("layers", [2, 3, 33, 34, 80, 126])
def test_it_is_bounded(layers: int) -> None:
    search, tried = searched(layers, {})
    assert len(tried) <= SINGLES + MORE
    assert len(set(tried)) == len(tried)
    assert 0 not in {layer for candidate in tried for layer in candidate}
    assert search.best
    with pytest.raises(IndexError):
        search.note(1.0)


def test_layers_that_are_needed_are_not_tried() -> None:
    search = LayerSearch(6, 0.0, depth=4, needed={2, 5})
    tried = []
    while (candidate := search.candidate) is not None:
        tried.append(candidate)
        search.note(0.9)
    assert tried[:3] == [(4,), (3,), (1,)]
    assert not {2, 5} & {layer for each in tried for layer in each}


def test_a_chain_is_worth_its_tokens_in_the_time_of_all_passes() -> None:
    # Half of the layers: one draft, right with a chance of 0.5, is 1.5 tokens in 1.5 passes.
    assert LayerSearch(4, 0.0, depth=1).value(0.5, 2) == pytest.approx(1.0)
    assert LayerSearch(4, 0.0, depth=2).value(1.0, 2) == pytest.approx(3 / 2)
