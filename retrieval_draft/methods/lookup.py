"""Shared parts of the published lookup methods: a source with one session a request, and a small tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from retrieval_draft.index.source import BaseSession, BaseSource, Proposal, SourceSession, TokenArray

__all__ = [
    "GuessTree",
    "Guesses",
    "LookupSession",
    "MethodSource",
    "after_references",
    "fill_shape",
    "text_source",
]


class GuessTree:
    """Guesses of one step, grown node by node; equal tokens below one parent are one node.

    Args:
        source: The method's name.
        level: Locality of the looked-up text.

    Example:
        add_path([9, 4]); add_path([9, 3])  ->  tokens [9, 4, 3], parents [-1, 0, 0]
    """

    def __init__(self, source: str, level: str = "request") -> None:
        self.source = source
        self.level = level
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.probs: list[float] = []
        self.lengths: list[int] = []
        self._nodes: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, prob: float = 1.0, match_length: int = 0) -> int:
        """The node of `token` below `parent` (-1 for the root), made if new."""
        node = self._nodes.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.probs.append(prob)
            self.lengths.append(match_length)
        return node

    def find(self, parent: int, token: int) -> int | None:
        """The node of `token` below `parent`, if there is one."""
        return self._nodes.get((parent, token))

    def add_path(
        self, tokens: Iterable[int], parent: int = -1, prob: float = 1.0, match_length: int = 0
    ) -> int:
        """Adds a chain below `parent` and returns its last node."""
        for token in tokens:
            parent = self.add(parent, int(token), prob, match_length)
        return parent

    def proposal(self, budget: int) -> Proposal:
        """The first `budget` nodes, in the order in which they were added."""
        size = min(budget, len(self.tokens))
        return Proposal(
            np.array(self.tokens[:size], np.int32),
            np.array(self.parents[:size], np.int32),
            np.clip(np.array(self.probs[:size], np.float32), 1e-6, 1.0),
            np.array(self.lengths[:size], np.int32),
            self.source,
            self.level,
        )


Guesses = tuple[Sequence[int], Sequence[float], int]
"""Next tokens, the best first, their probabilities, and the length of the match."""


def fill_shape(
    tree: GuessTree, shape: Sequence[tuple[int, int]], budget: int, row: Callable[[list[int]], Guesses]
) -> Proposal:
    """Fills a tree of fixed shape; ranks that a row does not have stay out, with all below them.

    Args:
        tree: Empty.
        shape: Parent (-1 for the root) and rank of each node.
        budget: The most nodes.
        row: The guesses after a path of tokens from the root.

    Example:
        shape (-1, 0), (-1, 1), (0, 0), rows 9 4 and after 9: 2  ->  tokens [9, 4, 2], parents [-1, -1, 0]
    """
    nodes: dict[int, int] = {-1: -1}
    paths: dict[int, list[int]] = {-1: []}
    rows: dict[int, Guesses] = {}
    for number, (parent, rank) in enumerate(shape):
        if len(tree) >= budget:
            break
        if parent not in nodes:
            continue
        if parent not in rows:
            rows[parent] = row(paths[parent])
        tokens, probs, length = rows[parent]
        if rank < len(tokens):
            nodes[number] = tree.add(nodes[parent], tokens[rank], probs[rank], length)
            paths[number] = [*paths[parent], tokens[rank]]
    return tree.proposal(budget)


def after_references(prompt: TokenArray, references: Sequence[TokenArray]) -> TokenArray:
    """The reference texts and then the prompt as one text: int32, shape (length of all,).

    A match across the border of two texts only gives a wrong draft.
    """
    return np.concatenate([*references, prompt]) if references else prompt


class LookupSession(BaseSession):
    """A request's text as a list, for methods that look it up. Subclasses propose.

    Args:
        prompt: int32, shape (length,).
    """

    def __init__(self, prompt: TokenArray) -> None:
        self.text: list[int] = [int(token) for token in prompt]

    def propose(self, budget: int) -> Proposal:
        """At most `budget` nodes that may follow the text."""
        raise NotImplementedError

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        self.text.extend(int(token) for token in tokens)


class MethodSource(BaseSource):
    """A source without state of its own; its sessions share the state that `open_session` closes over.

    Args:
        name: The method's name.
        open_session: Makes a request's session from its prompt and reference texts.
        nbytes: Bytes held between requests.
    """

    def __init__(
        self,
        name: str,
        open_session: Callable[[TokenArray, Sequence[TokenArray]], SourceSession],
        nbytes: Callable[[], int] = lambda: 0,
    ) -> None:
        self.name = name
        self._open = open_session
        self._nbytes = nbytes

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SourceSession:
        """Starts a request with `prompt`, int32, shape (length,), and reference texts, int32 each."""
        return self._open(prompt, references)

    @property
    def nbytes(self) -> int:
        """Bytes held between requests."""
        return self._nbytes()


def text_source(name: str, open_session: Callable[[TokenArray], SourceSession]) -> MethodSource:
    """A source whose sessions read the reference texts and then the prompt as one text."""
    return MethodSource(name, lambda prompt, references: open_session(after_references(prompt, references)))
