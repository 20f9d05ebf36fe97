"""Property tests: chains of a batch against the trees of single sessions, and against each other's texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting._kernels import fusion
from retrieval_draft.drafting.batch import ChainBatch
from retrieval_draft.drafting.batch import chain_batch as batch
from retrieval_draft.drafting.calibration import PRIOR, Calibration, columns_of
from retrieval_draft.drafting.sources import make_sources
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.history import HistorySource
from retrieval_draft.index.source import DraftSource, Proposal
from retrieval_draft.index.suffix_automaton import AutomatonSession

VOCABULARY = 6
TOP = 4
texts = st.lists(st.integers(0, 3), min_size=1, max_size=40) | st.lists(st.just(0), min_size=1, max_size=30)
steps = st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=5)


def _array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int32)


@contextmanager
def _everything_counts() -> Iterator[None]:
    """Guesses and occurrences of any weight, as in the trees that chains are compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "NEEDED", 1e-9)
        patch.setattr(batch, "SAMPLE", 32)
        yield


def _children(proposal: Proposal, parent: int | None) -> list[int]:
    """Nodes below a node, best first; none where the source does not have the chain so far."""
    if parent is None:
        return []
    below = np.flatnonzero(proposal.parents == parent)
    return [int(node) for node in below[np.argsort(-proposal.probs[below], kind="stable")]]


def _candidates(
    proposals: list[Proposal],
    at: list[int | None],
    depth: int,
    calibration: Calibration,
    request: Any,
    text: list[int],
) -> dict[int, float]:
    """Tokens that may come next by the rules of `fusion.fuse`, written anew: token to probability."""
    columns, used = columns_of(tuple(proposal.source for proposal in proposals))
    slots = np.array([slot for slot in range(fusion.SOURCES) if used >> slot & 1], np.int64)
    width = fusion.OWN + fusion.PER_SOURCE * len(slots)
    evidence: dict[int, Any] = {}
    left = {}
    for proposal, parent, column in zip(proposals, at, columns, strict=True):
        nodes = _children(proposal, parent)
        covered = float(proposal.probs[nodes].sum())
        if covered > 0:
            left[column] = np.log(max(1 - covered, fusion.LEAST_LEFT))
        for rank, node in enumerate(nodes[:TOP]):
            row = evidence.setdefault(int(proposal.tokens[node]), np.zeros(width, np.float32))
            row[fusion.RANK] = rank if row[fusion.MASK] == 0 else min(row[fusion.RANK], rank)
            row[fusion.MASK] += 1 << slots[column]
            own = row[fusion.OWN + fusion.PER_SOURCE * column :]
            own[fusion.ODDS] = fusion.log_odds(float(proposal.probs[node]))
            own[fusion.LENGTH] = fusion.length_bucket(int(proposal.match_lengths[node]))
    probs = {}
    for token, row in evidence.items():
        mask = int(row[fusion.MASK])
        row[fusion.DEPTH] = depth
        row[fusion.TIME] = min(text.count(token), 3)
        for column, value in left.items():
            if not mask >> slots[column] & 1:
                row[fusion.OWN + fusion.PER_SOURCE * column + fusion.LEFT] = value
        odds = fusion.mixed_odds(row, slots, calibration.weights, calibration.parameters, request)
        raw = min(max(1 / (1 + np.exp(-odds)), fusion.UNLIKELY), fusion.CERTAIN)
        cell = fusion.cell_of(mask, odds)
        ratio = (calibration.accepted[cell] + PRIOR) / (calibration.expected[cell] + PRIOR)
        probs[token] = min(raw * ratio, fusion.CERTAIN)
    return probs


def _check(
    drafted: np.ndarray,
    path_probs: np.ndarray,
    proposals: list[Proposal],
    calibration: Calibration,
    request: Any,
    text: list[int],
) -> None:
    """Follows a chain through the trees of the sources, and weighs what they say at each node."""
    at: list[int | None] = [-1] * len(proposals)
    path = 1.0
    for depth, (token, prob) in enumerate(zip(drafted, path_probs, strict=True), 1):
        expected = _candidates(proposals, at, depth, calibration, request, text)
        assert token in expected
        assert prob / path == pytest.approx(expected[int(token)], rel=2e-3)
        assert expected[int(token)] >= max(expected.values()) - 2e-3
        path = float(prob)
        for number, proposal in enumerate(proposals):
            named = [node for node in _children(proposal, at[number]) if proposal.tokens[node] == token]
            at[number] = named[0] if named else None
        if at[0] is None:  # an automaton goes on with what ends the chain, its tree does not
            return


@settings(max_examples=60, deadline=None)
@given(texts, st.lists(texts, max_size=3), steps, st.sampled_from(["automaton", "history", "both"]))
def test_chains_are_what_the_trees_of_sessions_say(
    prompt: list[int], earlier: list[list[int]], turns: list[list[int]], which: str
) -> None:
    names = ("automaton", "history") if which == "both" else (which,)
    config = DraftConfig(sources=names)
    sources: list[DraftSource] = make_sources(config, DraftStores(VOCABULARY))
    for source in sources:
        if isinstance(source, HistorySource):
            for text in earlier:
                source.history.add(_array([]), _array(text))
            source.flush()
    with _everything_counts():
        chains = ChainBatch(DraftStores(VOCABULARY), config, max_chain=6, sources=sources)
        session = chains.open(_array(prompt))
        text = list(prompt)
        for emitted in turns:
            tokens, lengths, probs = chains.step([session], emitted, [len(emitted)])
            text += emitted
            opened = [source.open(_array(text)) for source in sources]
            proposals = [each.propose(400) for each in opened]
            size = int(lengths[0])
            request = chains._slots.request[chains._slots.slot(session)]
            _check(tokens[0, :size], probs[0, :size], proposals, chains.calibration, request, text)
            if size == 0:
                best = _candidates(proposals, [-1] * len(proposals), 1, chains.calibration, request, text)
                assert max(best.values(), default=0.0) < 0.052
    chains.shut_down()
    for source in sources:
        source.close()


orders = st.lists(
    st.tuples(st.sampled_from(["open", "step", "close"]), st.integers(0, 3), st.integers(0, 2)), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(orders, st.lists(texts, min_size=4, max_size=4))
def test_a_request_drafts_from_no_other_ones_text(
    order: list[tuple[str, int, int]], prompts: list[list[int]]
) -> None:
    """Texts of different requests share no token, so that one from elsewhere would show."""
    chains = ChainBatch(DraftStores(40), DraftConfig(sources=("automaton",)), max_chain=5)
    open_ids: dict[int, int] = {}
    twins: dict[int, AutomatonSession] = {}
    own: dict[int, list[int]] = {}
    for what, who, how_many in order:
        if what == "open" and who not in open_ids:
            own[who] = [token + 10 * who for token in prompts[who]]
            open_ids[who] = chains.open(_array(own[who]))
            twins[who] = AutomatonSession(_array(own[who]), ())
        elif what == "close" and who in open_ids:
            chains.close(open_ids.pop(who))
        elif what == "step" and open_ids:
            rows = sorted(open_ids, key=lambda each: (each + who) % 4)  # rows change their order
            emitted = [[(token + who) % 4 + 10 * row for token in range(how_many)] for row in rows]
            for row, tokens in zip(rows, emitted, strict=True):
                own[row] += tokens
                twins[row].observe(_array(tokens))
            out, lengths, _ = chains.step(
                [open_ids[row] for row in rows],
                _array(list(chain.from_iterable(emitted))),
                [how_many] * len(rows),
                min_prob=0.0,
            )
            for row, drafted, size in zip(rows, out, lengths, strict=True):
                assert chains.text(open_ids[row]).tolist() == own[row]
                assert set(drafted[:size].tolist()) <= set(own[row])
                assert (size > 0) == (len(twins[row].propose(5)) > 0)
    chains.shut_down()


@settings(max_examples=30, deadline=None)
@given(st.lists(texts, min_size=2, max_size=6), steps)
def test_what_is_drafted_for_a_row_does_not_depend_on_its_company(
    prompts: list[list[int]], turns: list[list[int]]
) -> None:
    """Without learning in between: alone or among others, in whatever slot, a row gets the same chain."""
    config = DraftConfig(sources=("automaton", "history"))
    together = ChainBatch(DraftStores(VOCABULARY), config)
    gap = together.open(_array([5]))
    ids = [together.open(_array(prompt)) for prompt in prompts]
    together.close(gap, finished=False)
    together.flush()
    alone = [ChainBatch(DraftStores(VOCABULARY), config) for _ in prompts]
    singles = [one.open(_array(prompt)) for one, prompt in zip(alone, prompts, strict=True)]
    emitted = list(chain.from_iterable(turns))
    # All of it is taken in with the first step, when nothing has been proposed yet that could be scored.
    out = together.step(ids, _array(emitted * len(ids)), [len(emitted)] * len(ids))
    for row, (one, session) in enumerate(zip(alone, singles, strict=True)):
        same = one.step([session], _array(emitted), [len(emitted)])
        for array, other in zip(out, same, strict=True):
            np.testing.assert_array_equal(array[row], other[0])
    for one in (together, *alone):
        one.shut_down()
