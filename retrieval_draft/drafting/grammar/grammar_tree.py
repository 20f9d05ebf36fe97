"""Draft trees under a grammar: what it forbids is cut off, and what it forces is grafted on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_draft.drafting.grammar.grammar_text import GrammarText
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.source import Proposal

__all__ = ["CERTAIN", "LIKELY", "certain_tokens", "constrain", "forced_proposal"]

CERTAIN = 0.999
LIKELY = 0.8
"""Probabilities of the only token allowed, and of the usual one of several for a text that is forced."""

_SOURCE, _LEVEL = "grammar", "request"


def forced_proposal(tokens: Sequence[int]) -> Proposal:
    """Tokens that a grammar forces, one after the other, as a source's proposal."""
    size = len(tokens)
    return Proposal(
        np.array(tokens, np.int32),
        np.arange(-1, size - 1, dtype=np.int32),
        np.full(size, CERTAIN, np.float32),
        np.zeros(size, np.int32),
        _SOURCE,
        _LEVEL,
    )


def certain_tokens(text: GrammarText, most: int) -> list[int]:
    """Tokens that must follow a reply, `most` at most.

    Args:
        text: The reply.
        most: Tokens at most.
    """
    found: list[int] = []
    while len(found) < most and (forced := text.certain()):
        for token in forced[: most - len(found)]:
            if not text.enter(token):
                text.go_back(len(found))
                return found
            found.append(token)
    text.go_back(len(found))
    return found


def constrain(
    root: int,
    ahead: Sequence[int],
    tree: DraftTree,
    text: GrammarText,
    most: int,
    max_depth: int,
    source: int,
) -> DraftTree:
    """The tree without what the grammar forbids, and with what it forces at every node, best nodes first.

    The grammar follows each path from the reply on: entered token by token, and left where the path ends. A
    node at which a token is certain keeps that child alone; one at which text is forced that could be cut
    into tokens in several ways gets its usual tokens as a guess.

    Args:
        root: The last token of the reply.
        ahead: Certain tokens after it.
        tree: Its root is the last token of `ahead`, or `root` without any.
        text: The reply.
        most: Draft nodes at most.
        max_depth: Of the result, `ahead` included.
        source: Bit of the grammar's proposal in `sources`.

    Returns:
        A tree whose root is `root`.

    Example:
        root ``{``, ahead ``"age": ``, tree ``: `` -> ``7``, ``x``: the digit alone is left below ``: ``
    """
    grown = _Growth(root, tree, text, source)
    at = 0
    for token in ahead:
        at = grown.add(at, token, CERTAIN, source)
    entered = 0
    for token in ahead:
        if not text.enter(token):
            break
        entered += 1
    if entered == len(ahead) and text.can_look_ahead:
        grown.grow(at, 4 * most, max_depth)
    text.go_back(entered)
    return grown.tree(most)


_Step = tuple[int, int, float, int, int, Sequence[int]]
"""A node to enter: its parent, token, probability and sources, its node in the old tree or -1, and the tokens
that are likely after it."""


class _Growth:
    """Nodes of the new tree, parents first."""

    def __init__(self, root: int, tree: DraftTree, text: GrammarText, source: int) -> None:
        self._tokens, self._parents, self._depths = [root], [-1], [0]
        self._probs, self._paths, self._sources = [1.0], [1.0], [0]
        self._text, self._source = text, source
        self._old_tokens, self._old_probs = tree.tokens.tolist(), tree.probs.tolist()
        self._old_sources = tree.sources.tolist()
        self._children: list[list[int]] = [[] for _ in self._old_tokens]
        for node, parent in enumerate(tree.parents.tolist()):
            if parent >= 0:
                self._children[parent].append(node)

    def add(self, parent: int, token: int, prob: float, sources: int) -> int:
        self._tokens.append(token)
        self._parents.append(parent)
        self._depths.append(self._depths[parent] + 1)
        self._probs.append(prob)
        self._paths.append(self._paths[parent] * prob)
        self._sources.append(sources)
        return len(self._tokens) - 1

    def grow(self, root: int, most: int, max_depth: int) -> None:
        """Adds nodes below `root`, to which the grammar was led already."""
        first = depth = self._depths[root]
        waiting = self._next(root, 0, ()) if depth < max_depth else []
        while waiting and len(self._tokens) <= most:
            parent, token, prob, sources, old, guess = waiting.pop()
            above = self._depths[parent]
            self._text.go_back(depth - above)
            depth = above
            if self._text.enter(token):
                depth += 1
                node = self.add(parent, token, prob, sources)
                if depth < max_depth:
                    waiting += self._next(node, old, guess)
        self._text.go_back(depth - first)

    def _next(self, node: int, old: int, guess: Sequence[int]) -> list[_Step]:
        """Children of a node that the grammar was led to, the best last."""
        given = {self._old_tokens[each]: each for each in self._children[old]} if old >= 0 else {}
        certain = self._text.certain()
        if certain:
            token = certain[0]
            each = given.get(token, -1)
            sources = self._source | (self._old_sources[each] if each >= 0 else 0)
            return [(node, token, CERTAIN, sources, each, ())]
        guess = guess or self._text.likely()
        found: list[_Step] = []
        for token, each in given.items():
            if not guess or token != guess[0]:
                found.append((node, token, self._old_probs[each], self._old_sources[each], each, ()))
        found.reverse()
        if guess:
            each = given.get(guess[0], -1)
            known = self._old_probs[each] if each >= 0 else 0.0
            sources = self._source | (self._old_sources[each] if each >= 0 else 0)
            found.append((node, guess[0], max(LIKELY, known), sources, each, guess[1:]))
        return found

    def tree(self, most: int) -> DraftTree:
        paths = np.array(self._paths, np.float32)
        # Stable, and parents were added first: they stay in front of their children.
        order = np.argsort(-paths, kind="stable")[: most + 1]
        index = np.empty(len(paths), np.int32)
        index[order] = np.arange(len(order), dtype=np.int32)
        parents = np.array(self._parents, np.int32)[order]
        parents[1:] = index[parents[1:]]
        return DraftTree(
            np.array(self._tokens, np.int32)[order],
            parents,
            np.array(self._depths, np.int32)[order],
            np.array(self._probs, np.float32)[order],
            paths[order],
            np.array(self._sources, np.int64)[order],
        )
