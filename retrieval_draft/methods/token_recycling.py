"""Token Recycling: the target's earlier predictions after a token are drafted after it again.

Luo et al. (2024), "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
Recycling" (arXiv:2408.08696): a matrix of the 8 most probable next tokens of each token, overwritten at every
verified node, and one fixed tree of ranks with 8, 21, 25, 15, 8 and 3 nodes in its levels.

Their tree's branches are not under a licence, so this one is grown by a rule of this project, see `template`.
Two more differences: rows start empty, not as eight times token 0, and predictions at the prompt fill rows
too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._forks import lock_for_moments
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray
from retrieval_draft.methods.lookup import Guesses, GuessTree, LookupSession, MethodSource, fill_shape
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["METHOD", "RecycledTokens", "TokenRecyclingSession", "template"]

BREADTH = 8
LEVELS = (8, 21, 25, 15, 8, 3)
MAX_TOKENS = 1 << 20
"""Limit of ids with a row. No vocabulary is as large, and an invalid id must not allocate gigabytes."""

ZIPF = tuple(1 / (rank + 1) / sum(1 / (other + 1) for other in range(BREADTH)) for rank in range(BREADTH))
"""Assumed probability that each rank is the next token."""


def template() -> tuple[tuple[int, int], ...]:
    """The tree of ranks as (parent, rank): in each level the most probable paths of ranks under Zipf's law.

    A path of ranks (0 is the best) has the product of its ranks' chances. Each level keeps as many of the
    best paths below the level before as the published tree has nodes there; ties go to the path whose first
    ranks are better. Nodes are ordered by the path's chance, so a smaller tree is a prefix.

    Example:
        the first nodes: rank 0; rank 1; below rank 0 rank 0; ...
    """
    kept: list[tuple[float, tuple[int, ...]]] = []
    level: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    for size in LEVELS:
        grown = [(chance * ZIPF[rank], (*path, rank)) for chance, path in level for rank in range(BREADTH)]
        level = sorted(grown, key=lambda entry: (-round(entry[0], 12), entry[1]))[:size]
        kept += level
    kept.sort(key=lambda entry: (-round(entry[0], 12), len(entry[1]), entry[1]))
    node_of = {path: node for node, (_, path) in enumerate(kept)}
    return tuple((node_of.get(path[:-1], -1), path[-1]) for _, path in kept)


TEMPLATE = template()


class RecycledTokens:
    """The matrix: for each token the most probable next ones when it was last verified, best first, or -1.

    Safe for sessions in several threads.

    Args:
        vocabulary: Rows to start with. Ids beyond it add rows.

    Example:
        learn context [.., 7] -> tokens [9, 4]; row(7)  ->  [9, 4]; row(9)  ->  []
    """

    def __init__(self, vocabulary: int) -> None:
        self._rows: NDArray[np.int32] = np.full((max(vocabulary, 1), BREADTH), -1, np.int32)
        self._lock = lock_for_moments()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._rows.nbytes

    def learn(self, logits: NodeLogits) -> None:
        """Overwrites the row of each node's token; of equal tokens the last node stays."""
        tokens = np.asarray(logits.contexts[:, -1], np.int64)
        known = (tokens >= 0) & (tokens < MAX_TOKENS)
        if not known.any():
            return
        tokens, best = tokens[known], np.asarray(logits.top_tokens)[known, :BREADTH]
        # Indexing with repeated tokens leaves open which row wins, so earlier ones are left out.
        _, last = np.unique(tokens[::-1], return_index=True)
        last = len(tokens) - 1 - last
        with self._lock:
            missing = int(tokens.max()) + 1 - len(self._rows)
            if missing > 0:
                more = np.full((missing, BREADTH), -1, np.int32)
                self._rows = np.concatenate((self._rows, more))
            self._rows[tokens[last]] = -1
            self._rows[tokens[last], : best.shape[1]] = best[last]

    def row(self, token: int) -> list[int]:
        """The next tokens of `token`, best first; empty if it was never verified."""
        with self._lock:
            found = self._rows[token].tolist() if 0 <= token < len(self._rows) else []
        return [int(following) for following in found if following >= 0]

    def propose(self, token: int, budget: int, name: str) -> Proposal:
        """The template below `token`, filled from the rows. Ranks that a row does not have are left out.

        Args:
            token: The last accepted token.
            budget: The most nodes.
            name: The source's name.
        """

        def row(path: list[int]) -> Guesses:
            return self.row(path[-1] if path else token), ZIPF, 1

        return fill_shape(GuessTree(name), TEMPLATE, budget, row)


class TokenRecyclingSession(LookupSession):
    """One request's last token.

    Args:
        matrix: Shared by all requests.
        prompt: int32, shape (length,).
        name: The source's.

    Example:
        rows 7: 9 4 and 9: 2, text .. 7, budget 3  ->  tokens [9, 4, 2], parents [-1, -1, 0]
    """

    def __init__(self, matrix: RecycledTokens, prompt: TokenArray, name: str = "token_recycling") -> None:
        super().__init__(prompt[-1:])
        self._matrix, self._name = matrix, name

    def propose(self, budget: int) -> Proposal:
        """The template, filled."""
        return self._matrix.propose(self.text[-1] if self.text else -1, budget, self._name)

    def observe(self, tokens: TokenArray) -> None:
        """Moves to the last of the accepted tokens, int32, shape (m,)."""
        if len(tokens):
            self.text = [int(tokens[-1])]

    def learn(self, logits: NodeLogits) -> None:
        """Overwrites the rows of every verified node."""
        self._matrix.learn(logits)


def _sources(parts: MethodContext) -> Sequence[MethodSource]:
    matrix = RecycledTokens(parts.stores.vocabulary)

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> TokenRecyclingSession:
        return TokenRecyclingSession(matrix, prompt)

    return [MethodSource("token_recycling", opened, lambda: matrix.nbytes)]


METHOD = Method(
    name="token_recycling",
    paper="Luo et al. 2024, arXiv:2408.08696",
    sources=_sources,
    tree=as_proposed,
    nodes=sum(LEVELS),
    reads_text=False,
)
