"""Splits draft nodes between the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.drafting.tree import DraftTree

__all__ = ["MOST_CARRIED", "Budget", "Costs"]


MOST_CARRIED = 64
"""Repeated tokens at which a step goes without drafts, after which none are left, at any budget."""


class Costs(Protocol):
    """Interface of a cost model, as a budget uses it."""

    def choose(
        self,
        path_probs: NDArray[np.float32],
        context_length: int,
        rows: int = 1,
        carried: int | None = None,
        passed: NDArray[np.int64] | None = None,
    ) -> int:
        """The number of draft nodes with the most expected tokens a second.

        Args:
            path_probs: float32, shape (n,). Path probabilities of the draft nodes, best first.
            context_length: Tokens in the cache.
            rows: Rows that share the pass.
            carried: Accepted tokens that the pass repeats in front of a chain, and the next one with what is
                accepted of it in part; None where no pass repeats any.
            passed: int64, shape (n + 1,). Tokens of the pass over the first 0, 1, ... nodes, padding
                included; None where each node is a token more.
        """
        ...

    def best(self, path_probs: NDArray[np.float32]) -> int:
        """As `choose` of one row, for a tree that no pass verifies: nothing is noted or tried."""
        ...

    def observe(self, nodes: int, context_length: int, seconds: float) -> None:
        """Records the time of a pass over `nodes` nodes, the roots included."""
        ...

    def note_step(self, emitted: int, seconds: float, forward_seconds: float) -> None:
        """Records tokens and time of a whole step."""
        ...

    def for_rows(self, rows: int) -> Costs:
        """The costs of passes over so many rows, which start from these."""
        ...

    def seconds(self, tokens: int) -> float:
        """Seconds of a pass over so many tokens."""
        ...


class Budget:
    """Number of nodes of each row's tree that a step verifies.

    A node yields its path probability in tokens, in whichever row, and costs the time of one more node in a
    pass over all rows. So the nodes of all rows compete, and the measured cost of passes with that many rows
    sets their number. Costs are kept by number of rows, rounded up to a power of two.

    Trees of captured passes are padded, all of a pass to one of few sizes. Then a node costs nothing once
    some row has paid for its size: a size is chosen, and every row fills it.

    Args:
        cost: Of a pass over one row's tree; None to verify all of every tree.

    Example:
        path probabilities [.9, .8, .1] and [.5]: of three nodes two go to the first row, one to the second
    """

    def __init__(self, cost: Costs | None = None) -> None:
        self._costs: dict[int, Costs] = {} if cost is None else {1: cost}

    def share(
        self, trees: Sequence[DraftTree], lengths: Sequence[int], sizes: Sequence[int] = ()
    ) -> list[int]:
        """Draft nodes of each tree to verify, best first.

        Args:
            trees: One for each row, its nodes best first.
            lengths: Committed tokens of each row.
            sizes: Those that trees are padded to, ascending, all of a pass to one; none where they are not.

        Example:
            sizes 1, 4 and 8, two rows with 5 and 2 nodes: [0, 0], [3, 2] or [5, 2]
        """
        most = [tree.num_draft_tokens for tree in trees]
        if not self._costs or not any(most):
            return most
        cost = self._cost(len(trees))
        if sizes:
            return self._fill(cost, [tree.path_probs[1 : sizes[-1]] for tree in trees], lengths, sizes)
        if len(trees) == 1:
            return [cost.choose(trees[0].path_probs[1:], lengths[0])]
        probs = np.concatenate([tree.path_probs[1:] for tree in trees])
        # Equal ones in the order of their numbers, so that every row's share is a prefix of its tree.
        order = np.argsort(-probs, kind="stable")
        return _shares(order[: cost.choose(probs[order], max(lengths), len(trees))], most)

    def _fill(
        self,
        cost: Costs,
        rows: Sequence[NDArray[np.float32]],
        lengths: Sequence[int],
        sizes: Sequence[int],
    ) -> list[int]:
        """`share` for few sizes: nodes of the smallest one first, of all rows."""
        probs = np.concatenate(rows)
        size = np.concatenate([np.searchsorted(sizes, np.arange(2, len(row) + 2)) for row in rows])
        order = np.lexsort((-probs, size))
        lanes = 1 << (len(rows) - 1).bit_length()
        passed = lanes * np.array(sizes, np.int64)[np.concatenate([[0], size[order]])]
        count = cost.choose(probs[order], max(lengths), len(rows), passed=passed)
        return _shares(order[:count], [len(row) for row in rows])

    def alone(
        self, chains: Sequence[DraftTree], lengths: Sequence[int], carried: Sequence[int | None]
    ) -> list[int]:
        """Draft nodes of each chain to verify, in a pass of its own.

        Args:
            chains: One for each row.
            lengths: Committed tokens of each row.
            carried: Accepted tokens that each row's pass repeats in front of its chain; None where no pass
                repeats any.
        """
        sizes = []
        for chain, length, repeated in zip(chains, lengths, carried, strict=True):
            size = chain.num_draft_tokens
            if repeated is not None and repeated > MOST_CARRIED:
                size = 0
            elif self._costs and size:
                size = self._cost(1).choose(chain.path_probs[1:], length, 1, repeated)
            sizes.append(size)
        return sizes

    def beyond(self, verified: DraftTree, other: DraftTree) -> tuple[int, float]:
        """Nodes of another tree that would be verified, and seconds that the pass takes beyond one over them.

        Args:
            verified: The tree that a pass verifies, of one row.
            other: Its nodes best first: those pay that are as likely as the last of `verified`, and no more
                than would be verified without a source that made the nodes of `verified` less likely.
        """
        nodes = verified.num_draft_tokens
        if not self._costs:
            return min(nodes, other.num_draft_tokens), 0.0
        cost = self._cost(1)
        as_likely = int((other.path_probs[1:] >= verified.path_probs[-1]).sum()) if nodes else 0
        fewer = min(as_likely, cost.best(other.path_probs[1:]))
        return fewer, cost.seconds(nodes + 1) - cost.seconds(fewer + 1)

    def timed(self, rows: int, nodes: int, length: int, seconds: float) -> None:
        """Records the time of a pass over `rows` rows and `nodes` nodes, roots included."""
        if self._costs:
            self._cost(rows).observe(nodes, length, seconds)

    def note_step(self, rows: int, emitted: int, seconds: float, forward_seconds: float) -> None:
        """Records tokens and time of a whole step."""
        if self._costs:
            self._cost(rows).note_step(emitted, seconds, forward_seconds)

    def plain_seconds(self, rows: int) -> float:
        """Seconds of a pass over one token of each of `rows` rows; 0 where nothing is measured."""
        return self._cost(rows).seconds(rows) if self._costs and rows else 0.0

    @property
    def cost_of_one(self) -> Costs | None:
        """Costs of passes over one row's tree; None without."""
        return self._costs.get(1)

    def _cost(self, rows: int) -> Costs:
        bucket = 1 << (rows - 1).bit_length()
        if bucket not in self._costs:
            self._costs[bucket] = self._costs[1].for_rows(bucket)
        return self._costs[bucket]


def _shares(chosen: NDArray[np.intp], sizes: Sequence[int]) -> list[int]:
    """Number of chosen nodes in each row, of nodes that are numbered row by row."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    shares: list[int] = np.bincount(owner[chosen], minlength=len(sizes)).tolist()
    return shares
