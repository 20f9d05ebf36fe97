"""STAND: averaged n-gram rows, the longest of 4, 3 and 2 tokens, in a fixed shape."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retrieval_draft.config import DraftConfig
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import NodeLogits
from retrieval_draft.methods.method import MethodContext
from retrieval_draft.methods.stand import METHOD, SHAPE, StandTable
from tests.support.tokens import ids


def source(rows=1024):
    (made,) = METHOD.sources(MethodContext(DraftConfig(adjacency_rows=rows), DraftStores(16)))
    return made


def predictions(context, tokens, probs=None):
    padded = [*[-1] * (4 - len(context)), *context]
    probs = [0.9 / 2**index for index in range(len(tokens))] if probs is None else probs
    return NodeLogits(
        np.array([padded], np.int32), np.array([tokens], np.int32), np.array([probs], np.float32)
    )


def test_the_shape_has_80_nodes_and_13_levels():
    depths, paths = [], []
    for node, (parent, rank) in enumerate(SHAPE):
        assert parent < node
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
        paths.append((*(paths[parent] if parent >= 0 else ()), rank))
    assert len(set(paths)) == 80 == METHOD.nodes
    assert max(depths) == 13
    assert paths[:3] == [(0,), (0, 0), (0, 0, 0)]
    assert max(path[-1] for path in paths) < 10


def test_rows_average_all_visits():
    table = StandTable(64)
    table.learn(predictions([5, 7], [9], [0.6]))
    table.learn(predictions([5, 7], [4, 9], [0.5, 0.2]))
    tokens, probs, order = table.longest([5, 7])
    assert (tokens, order) == ([9, 4], 2)
    assert probs == pytest.approx([0.4, 0.25])  # (.6 + .2) / 2 and .5 / 2
    for _ in range(38):
        table.learn(predictions([5, 7], [3], [1.0]))
    tokens, probs, _ = table.longest([5, 7])
    assert tokens == [3, 9, 4]
    assert probs == pytest.approx([38 / 40, 0.8 / 40, 0.5 / 40], rel=1e-4)


def test_ten_are_kept():
    table = StandTable(64)
    table.learn(predictions([5, 7], list(range(12))))
    assert table.longest([5, 7])[0] == list(range(10))


def test_the_longest_of_four_three_and_two_tokens_and_never_one():
    opened = source().open(ids(1, 2, 3, 4))
    opened.learn(predictions([4], [8]))
    assert len(opened.propose(80)) == 0
    opened.learn(predictions([9, 3, 4], [5]))
    assert opened.propose(1).match_lengths.tolist() == [2]
    opened.learn(predictions([9, 2, 3, 4], [6]))
    assert opened.propose(1).tokens.tolist() == [6]
    opened.learn(predictions([1, 2, 3, 4], [7]))
    proposal = opened.propose(1)
    assert proposal.tokens.tolist() == [7]
    assert proposal.match_lengths.tolist() == [4]


def test_the_worked_example():
    opened = source().open(ids(5, 7))
    opened.learn(predictions([5, 7], [9, 4], [0.6, 0.3]))
    opened.learn(predictions([7, 9], [2], [0.8]))
    proposal = opened.propose(80)
    assert proposal.tokens.tolist() == [9, 2, 4]
    assert proposal.parents.tolist() == [-1, 0, -1]
    assert proposal.probs.tolist() == pytest.approx([0.6, 0.8, 0.3])
    assert opened.propose(2).tokens.tolist() == [9, 2]


def test_token_zero_short_and_empty_prompts():
    opened = source().open(ids())
    opened.observe(ids())
    assert len(opened.propose(80)) == 0
    opened.observe(ids(0))
    opened.learn(predictions([0], [0]))
    assert len(opened.propose(80)) == 0
    opened.observe(ids(0))
    opened.learn(predictions([0, 0], [0]))
    assert opened.propose(80).tokens.tolist() == [0] * 13
    opened.learn(NodeLogits(np.empty((0, 4), np.int32), np.empty((0, 1), np.int32), np.empty((0, 1), "f4")))


def test_rows_outlive_requests_and_the_table_does_not_grow():
    made = source(16)
    before = made.nbytes
    first = made.open(ids(1, 2))
    first.learn(predictions([1, 2], [3]))
    first.close()
    second = made.open(ids(1, 2))
    assert second.propose(1).tokens.tolist() == [3]
    for token in range(3, 200):
        second.learn(predictions([token, token + 1], [7]))
    assert made.nbytes == before
    assert second.propose(1).tokens.tolist() == []  # the least recently written rows made room


def noise(key):
    return GumbelNoise(key, 16, torch.device("cpu"))


def sampled(opened, key, position=3, nodes=80):
    calibration = SimpleNamespace(noise=noise(key), position=position)
    tree = METHOD.tree(1, [opened.propose(80)], calibration, nodes)
    return tree.tokens[1:].tolist()


def test_sampled_children_are_drawn_by_their_probability():
    opened = source().open(ids(5, 7))
    opened.learn(predictions([5, 7], [9, 4, 3], [0.6, 0.3, 0.1]))
    draws = [sampled(opened, key) for key in range(600)]
    assert all(sorted(draw) == [3, 4, 9] for draw in draws)  # without replacement
    for token, prob in ((9, 0.6), (4, 0.3), (3, 0.1)):
        first = sum(draw[0] == token for draw in draws) / len(draws)
        assert first == pytest.approx(prob, abs=0.07)
    second = [draw[1] for draw in draws if draw[0] == 9]
    assert second.count(4) / len(second) == pytest.approx(0.75, abs=0.07)


def test_draws_depend_on_the_request_and_the_position_alone():
    opened = source().open(ids(5, 7))
    opened.learn(predictions([5, 7], list(range(8)), [0.125] * 8))
    assert sampled(opened, 1) == sampled(opened, 1)
    assert sampled(opened, 1) != sampled(opened, 2)
    assert sampled(opened, 1) != sampled(opened, 1, position=4)
    assert sampled(opened, 1, nodes=2) == sampled(opened, 1)[:2]


def test_the_first_draws_are_the_targets_where_the_rows_are_its_distribution():
    opened = source().open(ids(5, 7))
    opened.learn(predictions([5, 7], [9, 4, 3], [0.5, 0.3, 0.2]))
    opened.learn(predictions([7, 9], [1, 2], [0.6, 0.4]))
    scores, after = torch.full((16,), -torch.inf), torch.full((16,), -torch.inf)
    scores[[9, 4, 3]], after[[1, 2]] = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.6, 0.4]).log()
    for key in range(20):
        first = noise(key).draw(scores, 3)
        drafts = sampled(opened, key)
        assert drafts[0] == first
        if first == 9:
            assert drafts[1] == noise(key).draw(after, 4)


def test_greedy_requests_get_the_most_probable_children():
    opened = source().open(ids(5, 7))
    opened.learn(predictions([5, 7], [9, 4, 3], [0.4, 0.3, 0.3]))
    for calibration in (None, SimpleNamespace(noise=None, position=3)):
        tree = METHOD.tree(1, [opened.propose(80)], calibration, 80)
        assert tree.tokens.tolist() == [1, 9, 4, 3]
    assert len(METHOD.tree(1, [], SimpleNamespace(noise=noise(1), position=3), 80)) == 1
