"""Draft nodes go to the rows where they bring most."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np

from retrieval_draft.drafting.budget import MOST_CARRIED, Budget
from retrieval_draft.drafting.cost import SIZES, CostModel
from retrieval_draft.drafting.tree import DraftTree


def tree(*path_probs: float) -> DraftTree:
    """A root with children of these path probabilities, best first."""
    size = len(path_probs) + 1
    probs = np.array([1.0, *path_probs], np.float32)
    parents = np.zeros(size, np.int32)
    parents[0] = -1
    tokens = np.arange(size, dtype=np.int32)
    return DraftTree(tokens, parents, np.minimum(tokens, 1), probs, probs, np.zeros(size, np.int64))


def model(slope: float) -> CostModel:
    cost = CostModel()
    cost.load({size: 1.0 + slope * (size - 1) for size in SIZES})
    return cost


def test_without_costs_all_of_every_tree_is_verified() -> None:
    assert Budget().share([tree(0.9, 0.1), tree()], [5, 5]) == [2, 0]


def test_a_row_alone_gets_what_the_cost_model_chooses() -> None:
    cost, probs = model(0.45), tree(0.9, 0.8, 0.5, 0.2)
    assert Budget(cost).share([probs], [9]) == [cost.choose(probs.path_probs[1:])]


def test_a_tree_without_a_source_would_have_had_a_shorter_pass() -> None:
    verified, other = tree(0.9, 0.5, 0.4), tree(0.6, 0.4, 0.3)
    assert Budget().beyond(verified, other) == (3, 0.0)
    costs = model(slope=0.1)
    nodes, seconds = Budget(costs).beyond(verified, other)
    assert nodes == 2
    assert seconds == costs.seconds(4) - costs.seconds(3) > 0
    assert Budget(costs).beyond(tree(), other) == (0, 0.0)


def test_a_tree_without_a_source_is_no_longer_than_one_that_would_be_verified() -> None:
    """A source that makes all nodes less likely saves no time of a pass over nodes that do not pay."""
    costs = model(slope=0.3)
    verified, other = tree(0.3, 0.1), tree(0.9, *[0.2] * 20)
    alone = costs.choose(other.path_probs[1:])
    assert alone == 1
    assert Budget(costs).beyond(verified, other) == (alone, costs.seconds(3) - costs.seconds(2))


def test_nodes_of_all_rows_compete() -> None:
    # Passes over 2 tokens and more: another one costs 0.1 and must bring that share of 2 tokens in 1.1.
    shares = Budget(model(0.1)).share([tree(0.9, 0.8, 0.01), tree(0.5, 0.05), tree(), tree(0.02)], [9] * 4)
    assert shares == [2, 1, 0, 0]


def test_equal_nodes_leave_every_share_a_prefix() -> None:
    shares = Budget(model(0.01)).share([tree(0.5, 0.5), tree(0.5, 0.5)], [9, 9])
    assert shares == [2, 2]


def test_the_more_rows_the_less_a_node_pays() -> None:
    probs = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    dear = model(0.02)
    dear.load({size: 1.0 + 0.02 * size + 0.004 * size**2 for size in SIZES})
    budget = Budget(dear)
    per_row = [budget.share([tree(*probs)] * rows, [9] * rows)[0] for rows in (1, 4, 16)]
    assert per_row[0] > per_row[1] >= per_row[2]


def test_costs_of_several_rows_are_learned_apart() -> None:
    cost = model(0.1)
    budget = Budget(cost)
    before = cost.seconds(8)
    for _ in range(200):
        budget.timed(3, 8, 100, 10.0)
    assert cost.seconds(8) == before, "passes over one row are not what they were"
    learned = budget._cost(4)
    assert abs(learned.seconds(8) - 10.0) < 0.5, "3 rows count as 4"
    assert learned.seconds(512) > 10.0


def test_chains_have_passes_of_their_own_and_repeat_a_bounded_number_of_tokens() -> None:
    asked: list[Any] = []

    class Fixed:
        def choose(self, path_probs: Any, length: int, rows: int = 1, carried: int | None = None) -> int:
            asked.append((len(path_probs), length, rows, carried))
            return 1

    chains = [tree(0.9, 0.8), tree(), tree(0.7)]
    budget = Budget(cast(Any, Fixed()))
    assert budget.alone(chains, [10, 20, 30], [None, 3, 4]) == [1, 0, 1]
    assert asked == [(2, 10, 1, None), (1, 30, 1, 4)]
    assert budget.alone(chains, [10, 20, 30], [MOST_CARRIED, 3, MOST_CARRIED + 1]) == [1, 0, 0]
    assert Budget().alone(chains, [10, 20, 30], [None, 3, MOST_CARRIED + 1]) == [2, 0, 0]


def test_a_copy_of_a_budget_learns_alone() -> None:
    """gpu_check takes a drafter back to measurements that it had before."""
    budget = Budget(CostModel())
    cost = budget.cost_of_one
    assert isinstance(cost, CostModel)
    cost.load({size: 0.01 * size for size in SIZES})
    copied = copy.deepcopy(budget)
    before = cost.seconds(8)
    for _ in range(4):
        copied.timed(1, 8, 100, 5.0)
    assert cost.seconds(8) == before
    other = copied.cost_of_one
    assert isinstance(other, CostModel)
    assert other.seconds(8) > 2 * before


def test_a_size_that_is_paid_for_is_filled_by_every_row() -> None:
    """Fewer nodes than trees are padded to cost the same, and one more costs a size."""
    flat, steep = model(0.001), model(0.3)
    rows = [tree(0.9, 0.8, 0.7, 0.6, 0.5), tree(0.01, 0.01)]
    assert Budget(flat).share(rows, [9, 9], (1, 4, 8)) == [5, 2]
    assert Budget(model(0.15)).share(rows, [9, 9], (1, 4, 8)) == [3, 2]
    assert Budget(steep).share(rows, [9, 9], (1, 4, 8)) == [0, 0]
    assert Budget(flat).share(rows, [9, 9], (1, 4)) == [3, 2]
    assert Budget(flat).share([tree(), tree()], [9, 9], (1, 4)) == [0, 0]
    assert Budget(flat).share(rows[:1], [9], (1, 4)) == [3]
    assert Budget().share(rows, [9, 9], (1, 4)) == [5, 2], "nothing is weighed without costs"


def test_rows_are_priced_with_the_padding_of_all_lanes() -> None:
    """Three rows are passed as four; of all shares that fill a size the one with the best rate is taken."""
    rng = np.random.default_rng(0)
    sizes = (1, 4, 8, 16)
    for case in range(60):
        rows = [tree(*np.sort(rng.random(rng.integers(0, 20)) ** 2)[::-1].tolist()) for _ in range(3)]
        cost = model(float(rng.choice([0.002, 0.02, 0.1, 0.5])))
        filled = [[min(size - 1, row.num_draft_tokens) for row in rows] for size in sizes]
        rates = []
        for size, shares in zip(sizes, filled, strict=True):
            probs = [row.path_probs[1 : 1 + share] for row, share in zip(rows, shares, strict=True)]
            rates.append((3 + float(np.concatenate(probs).sum())) / cost.for_rows(4).seconds(4 * size))
        best = filled[int(np.argmax(rates))]
        assert Budget(cost).share(rows, [9] * 3, sizes) == best, case
