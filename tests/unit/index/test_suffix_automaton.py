from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.suffix_automaton import AutomatonSource, SuffixAutomaton
from tests.support.tokens import ids


def chain(automaton: SuffixAutomaton, budget: int = 8) -> list[int]:
    """Tokens from the root down the first child of every node."""
    proposal = automaton.propose(budget, automaton.workspace())
    out, parent = [], -1
    while True:
        children = np.flatnonzero(proposal.parents == parent)
        if not len(children):
            return out
        parent = int(children[0])
        out.append(int(proposal.tokens[parent]))


def test_docstring_example() -> None:
    automaton = SuffixAutomaton()
    automaton.insert(ids(7, 8, 9, 4, 7, 8))
    proposal = automaton.propose(2, automaton.workspace())
    assert automaton.match_length == 2
    assert proposal.tokens.tolist() == [9, 4]
    assert proposal.parents.tolist() == [-1, 0]
    assert proposal.match_lengths.tolist() == [2, 3]


def test_token_zero_is_a_token() -> None:
    automaton = SuffixAutomaton()
    automaton.insert(ids(5, 0, 0, 6, 5))
    assert automaton.followers(ids(5)) == {0: 1}
    assert chain(automaton)[:3] == [0, 0, 6]


def test_match_at_the_very_end_of_the_text_proposes_what_followed_before() -> None:
    automaton = SuffixAutomaton()
    automaton.insert(ids(1, 2, 3, 9, 1, 2, 3))
    assert automaton.match_length == 3
    assert chain(automaton)[0] == 9


def test_text_seen_once_proposes_nothing() -> None:
    automaton = SuffixAutomaton()
    automaton.insert(ids(1, 2, 3, 4))
    assert len(automaton.propose(8, automaton.workspace())) == 0
    assert len(SuffixAutomaton().propose(8, automaton.workspace())) == 0


def test_vocabulary_above_65536() -> None:
    automaton = SuffixAutomaton()
    automaton.insert(ids(70_000, 262_143, 5, 4_464, 9, 70_000))
    assert chain(automaton)[:2] == [262_143, 5]


def test_counts_outvote_the_first_occurrence() -> None:
    automaton = SuffixAutomaton()
    automaton.insert(ids(1, 2, 3, 50, *(1, 2, 3, 60) * 5, 1, 2, 3))
    assert chain(automaton)[0] == 60


def test_a_run_of_one_token_stays_linear() -> None:
    automaton = SuffixAutomaton()
    automaton.insert(np.full(10_000, 3, np.int32))
    assert automaton.match_length == 9_999
    assert automaton.num_states == 10_001
    proposal = automaton.propose(60, automaton.workspace())
    assert proposal.tokens.tolist() == [3] * 60
    assert proposal.parents.tolist() == list(range(-1, 59))
    automaton.insert(ids(4))  # gives every one of 10,000 states an edge
    automaton.insert(ids(3, 3))
    assert chain(automaton)[0] == 3


def test_bytes_per_token() -> None:
    rng = np.random.default_rng(0)
    zipf = np.minimum(rng.zipf(1.3, 40_000), 30_000).astype(np.int32)
    automaton = SuffixAutomaton(len(zipf))
    automaton.insert(zipf)
    assert automaton.nbytes <= 110 * len(zipf)


@pytest.mark.parametrize("budget", [0, 1, 7, 64, 1000])
def test_any_budget(budget: int) -> None:
    automaton = SuffixAutomaton()
    automaton.insert(np.array([1, 2, 3, 1, 2, 4] * 30, np.int32))
    proposal = automaton.propose(budget, automaton.workspace())
    assert len(proposal) <= budget
    assert np.all(proposal.parents < np.arange(len(proposal)))
    assert np.all((proposal.probs > 0) & (proposal.probs <= 1))


def test_proposing_changes_nothing_and_is_repeatable() -> None:
    automaton = SuffixAutomaton()
    automaton.insert(np.array([1, 2, 3, 1, 2, 4, 1, 2], np.int32))
    workspace = automaton.workspace()
    first, second = automaton.propose(9, workspace), automaton.propose(9, workspace)
    assert first.tokens.tolist() == second.tokens.tolist()
    assert first.probs.tolist() == second.probs.tolist()


def test_references_do_not_run_into_the_prompt() -> None:
    session = AutomatonSource().open(ids(5, 6), references=[ids(6, 7, 8), ids(9, 9)])
    assert session.automaton.followers(ids(8)) == {}
    assert session.automaton.followers(ids(9)) == {9: 1}
    proposal = session.propose(4)
    assert proposal.tokens.tolist() == [7, 8]


def test_read_only_input_is_taken() -> None:
    tokens = ids(1, 2, 1)
    tokens.flags.writeable = False
    automaton = SuffixAutomaton()
    automaton.insert(tokens)
    assert automaton.followers(ids(1)) == {2: 1}


def test_negative_ids_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="-1 is negative"):
        SuffixAutomaton().insert(ids(3, -1))
