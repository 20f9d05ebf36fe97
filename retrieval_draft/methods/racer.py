"""RACER: the most frequent continuations of every matched suffix, then a tree of recycled tokens.

"RACER" (2026, arXiv:2604.14885): a trie of all 10-grams of prompts and replies with their counts, of at most
10,000 nodes, the least recently used ones evicted; of the continuations of the matched suffixes of 2 tokens
and more the 64 most frequent nodes, merged; the rest of 64 nodes is a tree from the adjacency matrix.

Differences: their fail links point to the root after an insertion or a lookup, so that shorter suffixes are
lost during generation; here each suffix is walked from the root, which finds all of them. Not public, and
chosen here: among equal counts the longer suffix, then the shallower node is first; the adjacency tree is
filled level by level, the root being depth 0; rows hold the 8 best tokens.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence

from retrieval_draft._forks import lock_for_moments
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray
from retrieval_draft.methods.lookup import GuessTree, LookupSession, MethodSource
from retrieval_draft.methods.method import Method, MethodContext, as_proposed
from retrieval_draft.methods.token_recycling import ZIPF, RecycledTokens

__all__ = ["METHOD", "GramTrie", "RacerSession", "breadths"]

GRAM = 10
SHORTEST = 2
MAX_NODES = 10_000
NODES = 64
BREADTH = 8
NODE_BYTES = 400
"""Approximate bytes of a trie node in CPython, its entries in two dicts included."""


class _Node:
    __slots__ = ("children", "count", "parent", "token")

    def __init__(self, token: int, parent: _Node | None) -> None:
        self.token, self.parent, self.count = token, parent, 0
        self.children: dict[int, _Node] = {}


class GramTrie:
    """10-grams with counts. Safe for sessions in several threads.

    Args:
        most: Limit of nodes, the root not counted.

    Example:
        with 3-grams of 7 8 9 7 8 5: after "7 8" come 9 and 5, after "8" too; counts 7: 2, 7 8: 2, 7 8 9: 1
    """

    def __init__(self, most: int = MAX_NODES) -> None:
        self._most = most
        self._root = _Node(-1, None)
        # Least recently used first. A path is touched from its end to its start, so the first one is a leaf.
        self._nodes: OrderedDict[_Node, None] = OrderedDict()
        self._lock = lock_for_moments()

    def __len__(self) -> int:
        return len(self._nodes)

    def insert(self, gram: Sequence[int]) -> None:
        """Counts one n-gram and its prefixes."""
        with self._lock:
            node, path = self._root, []
            for token in gram:
                child = node.children.get(token)
                if child is None:
                    child = node.children[token] = _Node(token, node)
                child.count += 1
                path.append(child)
                node = child
            self._touch(path)
            while len(self._nodes) > self._most:
                oldest, _ = self._nodes.popitem(last=False)
                assert oldest.parent is not None
                del oldest.parent.children[oldest.token]

    def continuations(self, text: Sequence[int], most: int, tree: GuessTree) -> None:
        """Adds the `most` most frequent nodes below every suffix of 2 to 9 tokens to a tree.

        Args:
            text: Ends with the last accepted token.
            most: Nodes to take; merged ones count too.
            tree: Gets the nodes.
        """
        with self._lock:
            waiting: list[tuple[int, int, int, int, int, _Node]] = []
            added = 0
            for length in range(min(GRAM - 1, len(text)), SHORTEST - 1, -1):
                node, path = self._root, []
                for token in text[-length:]:
                    if token not in node.children:
                        break
                    node = node.children[token]
                    path.append(node)
                self._touch(path)
                if len(path) == length:
                    for child in node.children.values():
                        heapq.heappush(waiting, (-child.count, -length, 1, added, -1, child))
                        added += 1
            for _ in range(most):
                if not waiting:
                    break
                count, length_, depth, _, parent, node = heapq.heappop(waiting)
                above = node.parent.count if node.parent is not None else 0
                index = tree.add(parent, node.token, -count / max(above, 1), depth - 1 - length_)
                for child in node.children.values():
                    heapq.heappush(waiting, (-child.count, length_, depth + 1, added, index, child))
                    added += 1

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._nodes[node] = None
            self._nodes.move_to_end(node)


def breadths(breadth: int, depth: int) -> list[int]:
    """Breadths of the children of a node, as many as its own breadth.

    Example:
        the root, depth 0, breadth 8  ->  [4, 2, 1, 1, 1, 1, 1, 1]; its first child  ->  [4, 2, 1, 1]
    """
    widest = breadth if depth == 1 else breadth // 2
    return [max(1, widest >> rank) for rank in range(breadth)]


class RacerSession(LookupSession):
    """A request's text beside the shared trie and matrix.

    Args:
        trie: Shared by all requests.
        matrix: Shared by all requests.
        prompt: int32, shape (length,).
        references: Texts of this request only, whose 10-grams take precedence.

    Example:
        the trie has 7 8 9 .. twice and 7 8 5 .. once, the row of 8 is 5 6, text .. 7 8
        ->  9 and 5 with their continuations, then 6
    """

    def __init__(
        self,
        trie: GramTrie,
        matrix: RecycledTokens,
        prompt: TokenArray,
        references: Sequence[TokenArray] = (),
    ) -> None:
        super().__init__(prompt)
        self._trie, self._matrix = trie, matrix
        self._quoted = GramTrie()
        for text in (tokens.tolist() for tokens in references):
            for start in range(len(text) - GRAM + 1):
                self._quoted.insert(text[start : start + GRAM])
        self._inserted = 0
        self._insert()

    def propose(self, budget: int) -> Proposal:
        """Continuations by count, then the adjacency tree."""
        tree = GuessTree("racer")
        for trie in (self._quoted, self._trie):
            trie.continuations(self.text[-GRAM:], NODES - len(tree), tree)
        if self.text:
            self._recycle(tree)
        return tree.proposal(min(budget, NODES))

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,), and counts the 10-grams that they complete."""
        super().observe(tokens)
        self._insert()

    def learn(self, logits: NodeLogits) -> None:
        """Overwrites the rows of every verified node."""
        self._matrix.learn(logits)

    def _insert(self) -> None:
        for start in range(self._inserted, len(self.text) - GRAM + 1):
            self._trie.insert(self.text[start : start + GRAM])
            self._inserted = start + 1

    def _recycle(self, tree: GuessTree) -> None:
        waiting = deque([(-1, self.text[-1], BREADTH, 0)])
        while waiting and len(tree) < NODES:
            parent, token, breadth, depth = waiting.popleft()
            row = self._matrix.row(token)
            for child, below, chance in zip(row, breadths(breadth, depth), ZIPF, strict=False):
                if len(tree) < NODES:
                    node = tree.add(parent, child, chance, 1)
                    waiting.append((node, child, below, depth + 1))


def _sources(parts: MethodContext) -> Sequence[MethodSource]:
    trie, matrix = GramTrie(), RecycledTokens(parts.stores.vocabulary)

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> RacerSession:
        return RacerSession(trie, matrix, prompt, references)

    return [MethodSource("racer", opened, lambda: len(trie) * NODE_BYTES + matrix.nbytes)]


METHOD = Method(
    name="racer",
    paper="RACER 2026, arXiv:2604.14885",
    sources=_sources,
    tree=as_proposed,
    nodes=NODES,
)
