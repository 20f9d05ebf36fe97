"""The phrase table against a search through every position of every phrase."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_draft.index.phrases import CAP, KEPT, LONGEST, SHORTEST, SURE, PhraseSource, PhraseTable
from retrieval_draft.index.source import Proposal

# 256 and 65536 share bytes with 1 and 0, which must not matter to a search in bytes.
TOKEN = st.sampled_from([0, 1, 256, 65536])
PHRASES = st.lists(st.lists(TOKEN, max_size=30), min_size=1, max_size=5)
TEXT = st.lists(TOKEN, max_size=40)
Path = tuple[int, ...]


def occurrences(phrases: list[list[int]], trigger: int, text: list[int]) -> list[tuple[int, list[int]]]:
    """Match length and rest of the phrase wherever the text's end triggers."""
    found = []
    for phrase in phrases:
        for at in range(len(phrase) + 1):
            known = 0
            while known < min(at, len(text), LONGEST) and phrase[at - known - 1] == text[-known - 1]:
                known += 1
            if len(phrase) >= SHORTEST and (known >= trigger or known == at >= 2):
                found.append((known, phrase[at:]))
    return found


def tree(found: list[tuple[int, list[int]]]) -> dict[Path, tuple[float, int]]:
    """Probability and match length of every path that continues the text."""
    out = {}
    for path in {tuple(rest[:size]) for _, rest in found for size in range(1, len(rest) + 1)}:
        parent = [known for known, rest in found if tuple(rest[: len(path) - 1]) == path[:-1]]
        child = [known for known, rest in found if tuple(rest[: len(path)]) == path]
        share = sum(2.0 ** min(known, CAP) for known in child) / sum(
            2.0 ** min(known, CAP) for known in parent
        )
        depth = len(path) - 1
        out[path] = (share * SURE[min(max(parent) + depth, CAP)], max(child) + depth)
    return out


def nodes(proposal: Proposal) -> dict[Path, tuple[float, int]]:
    paths: list[Path] = []
    for token, parent in zip(proposal.tokens.tolist(), proposal.parents.tolist(), strict=True):
        assert -1 <= parent < len(paths)
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    values = zip(proposal.probs.tolist(), proposal.match_lengths.tolist(), strict=True)
    out = dict(zip(paths, values, strict=True))
    assert len(out) == len(paths), "siblings differ"
    return out


def path_probs(tree: dict[Path, tuple[float, int]]) -> list[float]:
    return [float(np.prod([tree[path[:size]][0] for size in range(1, len(path) + 1)])) for path in tree]


@st.composite
def tables_and_texts(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Half of the texts end inside a phrase, or chance would seldom find a long match."""
    phrases, text = draw(PHRASES), draw(TEXT)
    phrase = draw(st.sampled_from(phrases))
    return phrases, text + phrase[: draw(st.integers(0, len(phrase)))]


@given(tables_and_texts(), st.integers(2, 5), st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_proposes_what_a_search_finds(
    case: tuple[list[list[int]], list[int]], trigger: int, budget: int
) -> None:
    phrases, text = case
    found = occurrences(phrases, trigger, text)
    table = PhraseTable([np.array(phrase, np.int32) for phrase in phrases], trigger)
    session = PhraseSource(table).open(np.array(text, np.int32))
    expected = tree(found)
    whole = nodes(session.propose(1000))
    if len(found) > KEPT:
        assert set(whole) <= set(expected)
        return
    assert set(whole) == set(expected)
    for path, (prob, length) in whole.items():
        assert prob == pytest.approx(expected[path][0], rel=1e-5)
        assert length == expected[path][1]
    best = nodes(session.propose(budget))
    assert set(best) <= set(expected)
    top = sorted(path_probs(expected), reverse=True)[:budget]
    np.testing.assert_allclose(path_probs(best), top, rtol=1e-4)


@given(PHRASES, TEXT, st.lists(st.integers(0, 4), max_size=20))
@settings(max_examples=100, deadline=None)
def test_steps_do_not_matter(phrases: list[list[int]], text: list[int], steps: list[int]) -> None:
    table = PhraseTable([np.array(phrase, np.int32) for phrase in phrases])
    tokens = np.array(text, np.int32)
    session = PhraseSource(table).open(tokens[:0])
    done = 0
    for step in [*steps, len(tokens)]:
        session.observe(tokens[done : done + step])
        done = min(done + step, len(tokens))
        expected = PhraseSource(table).open(tokens[:done]).propose(20)
        assert nodes(session.propose(20)) == nodes(expected)
