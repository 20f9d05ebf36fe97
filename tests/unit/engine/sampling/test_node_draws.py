"""Draws from what a captured pass leaves of its logits, against those from whole rows by the processors."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from retrieval_draft.engine.logits import LogitReader, Wanted
from retrieval_draft.engine.sampling.node_draws import DrawWords, PassNodes, draw_words, drawn_summary
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.engine.sampling.penalties import CountPenalty
from retrieval_draft.engine.sampling.sampling import Sampler
from retrieval_draft.engine.transcript import Transcript
from tests.support.trees import ancestors, tree_of

CPU = torch.device("cpu")
INTERPRETED = bool(os.environ.get("NUMBA_DISABLE_JIT"))
NODES = 4 if INTERPRETED else 24
PROMPT = np.array([5, 9, 9, 40], np.int32)
PADDING = np.array([7, 7], np.int64)

HOT, COLD = TemperatureLogitsWarper(1.5), TemperatureLogitsWarper(0.7)
PENALTY, COUNTS = RepetitionPenaltyLogitsProcessor(1.4, 3), CountPenalty(6, 0.7, 0.3)
LISTS: dict[str, list[Any]] = {
    "nothing": [],
    "temperature": [HOT],
    "top-k": [COLD, TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
    "top-p": [COLD, TopPLogitsWarper(0.9)],
    "low top-p": [TopPLogitsWarper(0.3, min_tokens_to_keep=3)],
    "min-p": [HOT, MinPLogitsWarper(0.1)],
    "low min-p": [MinPLogitsWarper(0.001)],
    "top-p, min-p": [COLD, TopPLogitsWarper(0.95), MinPLogitsWarper(0.02)],
    "min-p, top-p": [MinPLogitsWarper(0.05), TopPLogitsWarper(0.9)],
    "top-p, top-k": [TopPLogitsWarper(0.9), TopKLogitsWarper(5)],
    "many": [TopKLogitsWarper(200)],
    "penalty": [PENALTY, HOT],
    "penalties": [PENALTY, COUNTS, COLD, TopPLogitsWarper(0.9)],
    "counts": [COUNTS, TopKLogitsWarper(20)],
}


class Draws:
    """A tree after a text, and both ways to choose at its nodes."""

    def __init__(self, processors: list[Any], noise: GumbelNoise | None, vocabulary: int, seed: int) -> None:
        self.few, self.whole = (Sampler(LogitsProcessorList(processors), noise) for _ in range(2))
        self.wanted = self.few.wanted._replace(best=min(self.few.wanted.best, vocabulary))
        rng = np.random.default_rng(seed)
        parents = [-1, *(int(rng.integers(max(0, node - 3), node)) for node in range(1, NODES))]
        self.tree = tree_of(rng.integers(0, 12, NODES).tolist(), parents)
        self.text = Transcript(PROMPT, torch.from_numpy(np.concatenate([PADDING, PROMPT])[None]), 20)
        self.words = DrawWords(self.few, PADDING, vocabulary)
        size = draw_words(self.wanted, vocabulary)
        for token in (11, 9, 11, int(self.tree.tokens[0])):
            packed = self.words.of(self.text, size) if size else np.zeros(0, np.int64)
            self.text.append(token)
        packed = self.words.of(self.text, size) if size else packed
        self.nodes = PassNodes(
            torch.from_numpy(self.tree.tokens.astype(np.int64))[None],
            torch.from_numpy(self.tree.depths.astype(np.int64))[None],
            torch.tensor([len(self.text) - 1]),
            torch.from_numpy(~ancestors(self.tree))[None],
            torch.from_numpy(packed)[None],
        )

    def prefix(self, node: int) -> torch.Tensor:
        path = []
        while node:
            path.append(int(self.tree.tokens[node]))
            node = int(self.tree.parents[node])
        assert self.text.ids is not None
        return torch.cat([self.text.ids, torch.tensor([path[::-1]], dtype=torch.int64)], 1)

    def both(self, logits: torch.Tensor) -> list[tuple[int | None, int]]:
        """The choice at each node, from few logits and from all."""
        made = drawn_summary(logits, self.nodes, 4, self.wanted)
        _, best = LogitReader(4).read_with_best(logits, None, self.wanted, made)
        assert best is not None
        out = []
        for node in range(NODES):
            position = len(self.text) + int(self.tree.depths[node])
            few = self.few.choose_among(best, node, position)
            out.append((few, self.whole.choose(logits[node], self.prefix(node), position)))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [97, 20_000])
@pytest.mark.parametrize("name", LISTS)
def test_few_logits_choose_as_all_of_them_do(name: str, vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    noise = GumbelNoise(6, vocabulary, CPU)
    undecided = 0
    for scale in (1.0, 3.0, 6.0):
        draws = Draws(LISTS[name], noise, vocabulary, int(scale))
        assert draws.wanted != Wanted()
        for few, whole in draws.both((torch.randn(NODES, vocabulary) * scale).to(dtype)):
            undecided += few is None
            assert few in (None, whole)
    if vocabulary == 97 or name in ("nothing", "temperature", "top-k", "min-p", "penalty", "counts"):
        assert undecided <= NODES // 6, "flat and wide distributions aside, few decide"
    assert undecided < 3 * NODES


@pytest.mark.parametrize("name", ["penalty", "penalties", "counts"])
def test_the_best_after_penalties_without_noise(name: str) -> None:
    processors = [each for each in LISTS[name] if each in (PENALTY, COUNTS)]
    draws = Draws(processors, None, 97, 0)
    logits = torch.randn(NODES, 97)
    logits[:, ::2] = 2.0  # many are equal
    assert all(few == whole for few, whole in draws.both(logits))


def test_scores_are_those_of_the_processors_bit_for_bit() -> None:
    draws = Draws([PENALTY, COUNTS], None, 97, 2)
    logits = torch.randn(NODES, 97)
    scores = draws.nodes.scores(logits)
    for node in range(NODES):
        expected = LogitsProcessorList([PENALTY, COUNTS])(draws.prefix(node), logits[node : node + 1].clone())
        assert torch.equal(scores[node], expected[0])


def test_a_token_that_occurs_too_often_to_be_counted() -> None:
    sampler = Sampler(LogitsProcessorList([CountPenalty(4, 0.5, 0.1)]), None)
    words = DrawWords(sampler, PADDING[:0], 97)
    size = draw_words(sampler.wanted, 97)
    text = Transcript(PROMPT, None, 200)
    for _ in range(127):
        text.append(3)
    words.of(text, size)
    assert not words.is_full
    text.append(3)
    words.of(text, size)
    assert words.is_full


def test_words_are_none_but_for_draws() -> None:
    assert draw_words(Wanted(128), 1000) == 0
    assert draw_words(Wanted(candidates=True), 1000) == 5
    assert draw_words(Wanted(candidates=True, penalties=True), 1001) == 5 + 126
