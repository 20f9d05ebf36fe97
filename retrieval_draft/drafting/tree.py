"""The draft tree that one forward pass verifies, as flat arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.index.source import CONTEXT, TokenArray

__all__ = ["DraftTree"]

_kernels = LazyKernels("retrieval_draft.drafting._kernels.tree")


@dataclass(frozen=True, slots=True)
class DraftTree:
    """A draft tree: node 0 is the last accepted token, the root; every other node is a guess below it.

    Parents come before their children, siblings hold different tokens, and path probabilities do
    not increase along the arrays. So every prefix of the arrays is again a tree, and the best one
    of its size: `truncate` only slices.

    Attributes:
        tokens: int32, shape (n + 1,).
        parents: int32, shape (n + 1,). -1 for the root.
        depths: int32, shape (n + 1,). 0 for the root.
        probs: float32, shape (n + 1,). P(accepted | parent accepted); 1 for the root.
        path_probs: float32, shape (n + 1,). Product of probs from the root.
        sources: int64, shape (n + 1,). Bit s is set where proposal s named the node.
        evidence: float32, shape (n + 1, columns). Features that calibration learns from, where there are any.

    Example:
        root 8, guesses "9 4" (0.8, 0.5) and "3" (0.1):
        tokens [8, 9, 4, 3], parents [-1, 0, 1, 0], depths [0, 1, 2, 1], path_probs [1, .8, .4, .1]
    """

    tokens: TokenArray
    parents: NDArray[np.int32]
    depths: NDArray[np.int32]
    probs: NDArray[np.float32]
    path_probs: NDArray[np.float32]
    sources: NDArray[np.int64]
    evidence: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Nodes, the root included."""
        return len(self.tokens)

    @property
    def num_draft_tokens(self) -> int:
        """Nodes, the root not included."""
        return len(self.tokens) - 1

    @classmethod
    def root(cls, token: int) -> DraftTree:
        """A tree without guesses: plain decoding of one token."""
        return cls(
            tokens=np.array([token], np.int32),
            parents=np.array([-1], np.int32),
            depths=np.zeros(1, np.int32),
            probs=np.ones(1, np.float32),
            path_probs=np.ones(1, np.float32),
            sources=np.zeros(1, np.int64),
        )

    def truncate(self, nodes: int) -> DraftTree:
        """The tree of the `nodes` most probable guesses (views, nothing is copied)."""
        if nodes >= self.num_draft_tokens:
            return self
        end = nodes + 1
        return DraftTree(
            self.tokens[:end],
            self.parents[:end],
            self.depths[:end],
            self.probs[:end],
            self.path_probs[:end],
            self.sources[:end],
            None if self.evidence is None else self.evidence[:end],
        )

    def path(self, nodes: NDArray[np.int32]) -> DraftTree:
        """The chain of the root and one path below it.

        Args:
            nodes: int32, shape (n,). Nodes of the path from a child of the root on.
        """
        kept = np.concatenate((np.zeros(1, np.int32), nodes))
        return DraftTree(
            self.tokens[kept],
            np.arange(-1, len(kept) - 1, dtype=np.int32),
            self.depths[kept],
            self.probs[kept],
            self.path_probs[kept],
            self.sources[kept],
        )

    def best_path(self, max_depth: int, min_prob: float = 0.0) -> NDArray[np.int32]:
        """Nodes of the path with the most accepted tokens on average: int32, root excluded.

        Args:
            max_depth: Largest length of it.
            min_prob: Smallest path probability of its nodes.
        """
        from retrieval_draft.drafting._kernels.chain import best_chain

        chain = np.empty(min(max_depth, self.num_draft_tokens), np.int32)
        gains = np.empty(len(self.tokens), np.float32)
        size = best_chain(self.parents, self.depths, self.path_probs, len(chain), min_prob, gains, chain)
        return chain[:size]

    def contexts(self, tail: TokenArray) -> NDArray[np.int32]:
        """The last `CONTEXT` tokens at every node, the node's own token last.

        Args:
            tail: int32, shape (length,). Committed text before the root, the root not included.

        Returns:
            int32, shape (n + 1, CONTEXT), -1 where the text is shorter.

        Example:
            tail [5, 6], root 8 with child 9  ->  [[-1, 5, 6, 8], [5, 6, 8, 9]]
        """
        out = np.empty((len(self.tokens), CONTEXT), np.int32)
        _kernels.write_contexts(self.tokens, self.parents, tail, out)
        return out

    def walk(self, tokens: TokenArray) -> list[int]:
        """Follows `tokens` down from the root as far as the tree goes.

        Args:
            tokens: int32, shape (length,). Tokens that the target emitted after the root.

        Returns:
            Nodes passed, root first.

        Example:
            tokens [8, 9, 4, 3], parents [-1, 0, 1, 0]; walk [9, 7]  ->  [0, 1]
        """
        path = [0]
        node = 1
        for token in tokens:
            while node < len(self.tokens) and not (
                self.parents[node] == path[-1] and self.tokens[node] == token
            ):
                node += 1
            if node == len(self.tokens):
                break
            path.append(node)
        return path
