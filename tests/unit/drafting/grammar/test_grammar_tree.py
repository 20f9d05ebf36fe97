"""Draft trees under a grammar: forbidden nodes are cut off, forced ones grafted on."""

from __future__ import annotations

import random

import numpy as np
import pytest

from retrieval_draft import DraftTree, Grammar
from retrieval_draft.drafting.grammar.compiler import compiler_of
from retrieval_draft.drafting.grammar.grammar_text import GrammarText
from retrieval_draft.drafting.grammar.grammar_tree import (
    CERTAIN,
    certain_tokens,
    constrain,
    forced_proposal,
)
from tests.support.grammars import SHAPES, json_tokenizer

TOKENIZER = json_tokenizer()
EOS = TOKENIZER.eos_token_id
ROOT = 399


def text_of(grammar: Grammar) -> GrammarText:
    return compiler_of(TOKENIZER, [EOS], len(TOKENIZER)).compile(grammar).open()


def ids(text: str) -> list[int]:
    encoded: list[int] = TOKENIZER.encode(text)
    return encoded


def tree_of(root: int, *chains: list[int]) -> DraftTree:
    """A tree of chains, each less probable than the one before."""
    tokens, parents, depths, probs = [root], [-1], [0], [1.0]
    for number, chain in enumerate(chains):
        parent = 0
        for token in chain:
            found = [node for node, above in enumerate(parents) if above == parent and tokens[node] == token]
            if not found:
                tokens.append(token)
                parents.append(parent)
                depths.append(depths[parent] + 1)
                probs.append(0.6 - 0.1 * number if parent == 0 else 0.9)
            parent = found[0] if found else len(tokens) - 1
    path = np.ones(len(tokens), np.float32)
    for node in range(1, len(tokens)):
        path[node] = path[parents[node]] * probs[node]
    return DraftTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.array(depths, np.int32),
        np.array(probs, np.float32),
        path,
        np.ones(len(tokens), np.int64),
    )


def paths(tree: DraftTree) -> list[str]:
    """The text of every node's path, the root left out."""
    out = []
    for node in range(1, len(tree)):
        path: list[int] = []
        while node > 0:
            path.insert(0, int(tree.tokens[node]))
            node = int(tree.parents[node])
        out.append(TOKENIZER.decode(path))
    return out


def test_forbidden_branches_and_ends_are_cut_off() -> None:
    text = text_of(Grammar.regex("[ab]{3}c*"))
    tree = tree_of(ROOT, ids("a") + ids("b") + ids("a") + [EOS], ids("a") + ids("x"), ids("q"))
    made = constrain(ROOT, [], tree, text, 20, 9, 2)
    assert paths(made) == ["a", "ab", "aba"]
    assert made.probs.tolist() == pytest.approx([1, 0.6, 0.9, 0.9])
    assert made.sources.tolist()[1:] == [1, 1, 1]


def test_forced_tokens_are_grafted_below_any_node_and_replace_its_other_children() -> None:
    text = text_of(Grammar.regex("(a|b)-ZQXZ"))
    tree = tree_of(ROOT, ids("a") + ids("?"), ids("b") + ids("-") + ids("!"))
    made = constrain(ROOT, [], tree, text, 30, 20, 2)
    found = paths(made)
    assert "a-ZQXZ" in found
    assert "b-ZQXZ" in found
    assert not any("?" in each or "!" in each for each in found)
    shared = found.index("b-") + 1
    assert made.sources[shared] == 3, "both name it"
    assert made.probs[shared] == np.float32(CERTAIN)


def test_what_is_ahead_leads_to_the_tree() -> None:
    text = text_of(Grammar.regex("ZQXZ[ab]+"))
    ahead = certain_tokens(text, 10)
    assert TOKENIZER.decode(ahead) == "ZQXZ"
    made = constrain(ROOT, ahead, tree_of(ahead[-1], ids("a") + ids("b")), text, 30, 20, 2)
    assert made.tokens[0] == ROOT
    assert paths(made) == ["Z", "ZQ", "ZQX", "ZQXZ", "ZQXZa", "ZQXZab"]
    assert certain_tokens(text, 2) == ahead[:2]
    assert certain_tokens(text, 10) == ahead, "looking ahead moves nothing"


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_tree_is_in_order_within_its_limits_and_allowed(shape: str) -> None:
    draw = random.Random(shape)
    for _ in range(20):
        text = text_of(SHAPES[shape])
        reply = certain_tokens(text, draw.randrange(6))
        text.follow(np.array(reply, np.int32))
        most, depth = draw.randrange(1, 20), draw.randrange(1, 12)
        ahead = certain_tokens(text, min(most, depth, draw.randrange(5)))
        chains = [[draw.randrange(400) for _ in range(3)] for _ in range(6)]
        made = constrain(ROOT, ahead, tree_of((ahead or [ROOT])[-1], *chains), text, most, depth, 2)
        assert made.num_draft_tokens <= most
        assert made.depths.max() <= depth
        assert (np.diff(made.path_probs) <= 0).all()
        for node in range(1, len(made)):
            parent = int(made.parents[node])
            assert 0 <= parent < node
            path = [int(made.tokens[node])]
            while parent > 0:
                path.insert(0, int(made.tokens[parent]))
                parent = int(made.parents[parent])
            fresh = text_of(SHAPES[shape])
            fresh.follow(np.array(reply + path, np.int32))
        assert certain_tokens(text, 3) == certain_tokens(text, 3)


def test_the_proposal_is_a_chain() -> None:
    made = forced_proposal([4, 5])
    assert made.parents.tolist() == [-1, 0]
    assert (made.source, made.level) == ("grammar", "request")
    assert len(forced_proposal([])) == 0
