"""STAND: n-gram rows of averaged next-token distributions, drafted as one fixed tree of ranks or of draws.

Song et al. (2025), "Accelerated Test-Time Scaling with Model-Free Speculative Sampling" (arXiv:2506.04708):
the target's distributions at verified nodes are averaged by their last 4, 3 and 2 tokens, one that follows k
others with a weight of 1/(k+1), the top 10 kept; children of a node come from the longest n-gram that has a
row, and are drawn without replacement where text is sampled: the best by log probability and Gumbel noise.

Differences: greedy requests get the most probable children. The noise of a node's children is the one that
the target draws that token with, so that draws agree where row and distribution do, and a seed gives the same
text with any drafts; published is a cache of noise, and acceptance by min(1, p/q), q being the row. Rows hold
probabilities at a temperature of 1, not at that of the request. The published tree of 80 nodes was cut from
625 on AIME samples and is not public, so this one follows a rule, see `shape`. The drafting of an unseen
n-gram is not public either: here its node stays a leaf. Rows stay for later requests, and the least recently
written ones are evicted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.adjacency import AdjacencyMatrix
from retrieval_draft.index.source import CONTEXT, NodeLogits, Proposal, TokenArray
from retrieval_draft.methods.lookup import Guesses, GuessTree, LookupSession, MethodSource, fill_shape
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["METHOD", "RowsProposal", "StandSession", "StandTable", "drawn_tree", "shape"]

KEPT = 10
NODES = 80
ORDERS = (4, 3, 2)
EXPONENT = 2.3
"""Exponent, to a tenth, with which the 80 nodes of `shape` reach the published depth of 13."""

NO_CAP = 2**31 - 1


def shape() -> tuple[tuple[int, int], ...]:
    """The tree of ranks as (parent, rank): the 80 most probable paths if rank r has chance ~ (r+1)^-2.3.

    Chances add up to 1 over the ten ranks, which gives the best one .716. Nodes are ordered by the path's
    chance, so a smaller tree is a prefix.

    Example:
        the first nodes: rank 0; below it rank 0; below that rank 0; ...
    """
    total = sum((rank + 1) ** -EXPONENT for rank in range(KEPT))
    chances = [(rank + 1) ** -EXPONENT / total for rank in range(KEPT)]
    waiting: list[tuple[float, tuple[int, ...], int]] = [
        (-chance, (rank,), -1) for rank, chance in enumerate(chances)
    ]
    heapq.heapify(waiting)
    nodes: list[tuple[int, int]] = []
    while len(nodes) < NODES:
        chance, path, parent = heapq.heappop(waiting)
        for rank, below in enumerate(chances):
            heapq.heappush(waiting, (chance * below, (*path, rank), len(nodes)))
        nodes.append((parent, path[-1]))
    return tuple(nodes)


SHAPE = shape()


class StandTable(AdjacencyMatrix):
    """Rows of n-grams that average everything they have seen. Safe for sessions in several threads.

    Its rows of one token are not looked up.

    Args:
        rows: Limit of rows; 100 bytes each.

    Example:
        after 5 7 the target predicts 9 with .6, then 9 with .2 and 4 with .5: the row of "5 7" is 9 .4, 4 .25
    """

    def __init__(self, rows: int) -> None:
        super().__init__(rows, KEPT, NO_CAP)

    def learn(self, logits: NodeLogits) -> None:
        """Averages the distribution of every node into the rows of its last 4, 3 and 2 tokens."""
        with self._lock:
            self._average(
                np.array(logits.contexts, np.int32),
                np.array(logits.top_tokens, np.int32),
                np.array(logits.top_probs, np.float32),
            )

    def longest(self, context: Sequence[int]) -> tuple[list[int], list[float], int]:
        """Next tokens, their probabilities and the order of the longest n-gram that has a row."""
        for order in ORDERS:
            if len(context) >= order:
                with self._lock:
                    tokens, probs, _ = self.row(np.array(context[-order:], np.int32))
                if len(tokens):
                    return tokens.tolist(), probs.tolist(), order
        return [], [], 0


class _Noise(Protocol):
    """The Gumbel noise that a request's tokens are drawn with (`engine.sampling.noise.GumbelNoise`)."""

    def of(self, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class RowsProposal(Proposal):
    """The most probable children, and a function that draws children instead.

    Attributes:
        drawn: Makes the proposal of a request's noise, and the position of its first drafted token.
    """

    drawn: Callable[[_Noise, int], Proposal]


def drawn_tree(root_token: int, proposals: Sequence[Proposal], calibration: Any, max_nodes: int) -> DraftTree:
    """The proposal itself; for a sampled request one of drawn children.

    Args:
        root_token: The last accepted token.
        proposals: The session's.
        calibration: Has the request's noise, None for greedy, and the position of the first drafted token.
        max_nodes: The most draft nodes to keep.
    """
    noise = getattr(calibration, "noise", None)
    if noise is not None and proposals and isinstance(proposals[0], RowsProposal):
        proposals = [proposals[0].drawn(noise, calibration.position)]
    return as_proposed(root_token, proposals, calibration, max_nodes)


class StandSession(LookupSession):
    """One request's last tokens.

    Args:
        table: Shared by all requests.
        prompt: int32, shape (length,).

    Example:
        rows "5 7": 9 4 and "7 9": 2, text .. 5 7, budget 3  ->  tokens [9, 2, 4], parents [-1, 0, -1]
    """

    def __init__(self, table: StandTable, prompt: TokenArray) -> None:
        super().__init__(prompt[-CONTEXT:])
        self._table = table

    def propose(self, budget: int) -> RowsProposal:
        """The shape, filled from the rows; ranks that a row does not have stay out."""
        best = self._filled(budget)
        return RowsProposal(
            best.tokens,
            best.parents,
            best.probs,
            best.match_lengths,
            best.source,
            best.level,
            partial(self._filled, budget),
        )

    def _filled(self, budget: int, noise: _Noise | None = None, position: int = 0) -> Proposal:
        def row(path: list[int]) -> Guesses:
            """A row's tokens, probabilities and order: best first, or as drawn for a position."""
            tokens, probs, order = self._table.longest([*self.text, *path][-CONTEXT:])
            if noise is not None and tokens:
                noisy = np.log(np.maximum(probs, 1e-9))
                noisy += noise.of(position + len(path), np.array(tokens, np.int64))
                turns = np.argsort(-noisy).tolist()
                tokens, probs = [tokens[turn] for turn in turns], [probs[turn] for turn in turns]
            return tokens, probs, order

        return fill_shape(GuessTree("stand"), SHAPE, budget, row)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,), to the context. Rows learn in `learn`."""
        super().observe(tokens[-CONTEXT:])
        self.text = self.text[-CONTEXT:]

    def learn(self, logits: NodeLogits) -> None:
        """Averages the predictions of every verified node into its rows."""
        self._table.learn(logits)


def _sources(parts: MethodContext) -> Sequence[MethodSource]:
    table = StandTable(parts.config.adjacency_rows)

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> StandSession:
        return StandSession(table, prompt)

    return [MethodSource("stand", opened, lambda: table.nbytes)]


METHOD = Method(
    name="stand",
    paper="Song et al. 2025, arXiv:2506.04708",
    sources=_sources,
    tree=drawn_tree,
    nodes=NODES,
    reads_text=False,
)
