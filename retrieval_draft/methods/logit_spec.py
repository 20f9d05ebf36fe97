"""LogitSpec: the logits that chose the last token also rank guesses for the token after it.

"LogitSpec" (2025, arXiv:2507.01449): first the continuation of the longest n-gram (3, 2, 1 tokens) that ends
in the last accepted token; then, best first, each other token of the logits that chose it, as a guess of the
token after it, with the continuation of the longest n-gram that ends in the guess: 4 tokens in all for the
ranks up to 8, 3 up to 32, 1 after that; until there are 64 nodes. Continuations are of 20 tokens at most.

Differences: equal branches are one node; there are as many ranks as the decoding loop reads (``top_k``, their
64 where it is that large). A later occurrence replaces one whose continuation is not longer, so the last
occurrence with 20 tokens after it counts, or else the first one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_draft.index.source import CONTEXT, NodeLogits, Proposal, TokenArray
from retrieval_draft.methods.lookup import GuessTree, LookupSession, text_source
from retrieval_draft.methods.method import Method, as_proposed

__all__ = ["METHOD", "LogitSpecSession"]

LONGEST = 3
COPIED = 20
RANKS = 64
NODES = 64


class LogitSpecSession(LookupSession):
    """Ends of the text's n-grams, and the target's last predictions.

    Args:
        prompt: int32, shape (length,).

    Example:
        text 7 8 9 4 7, its last token chosen from the ranking 7, 8, 4: "7" was followed by 8 9 4 7;
        8 is rank 1: "7 8" by 9 4 7; 4 is rank 2: by 7  ->  branches 8 9 4 7 (twice, merged) and 4 7
    """

    def __init__(self, prompt: TokenArray) -> None:
        super().__init__(prompt)
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._logits: NodeLogits | None = None

    def propose(self, budget: int) -> Proposal:
        """The copied branch, then a branch for each rank."""
        tree = GuessTree("logit_spec")
        if not self.text:
            return tree.proposal(budget)
        young = self._index()
        copied, size = self._continuation(self.text[-LONGEST:], young)
        tree.add_path(copied, match_length=size)
        for rank, token, prob in self._ranking():
            if len(tree) >= NODES:
                break
            copied, size = self._continuation([*self.text[1 - LONGEST :], token], young)
            kept = 4 if rank <= 8 else 3 if rank <= 32 else 1
            guess = tree.add(-1, token, prob)
            tree.add_path(copied[: kept - 1], guess, match_length=size)
        return tree.proposal(min(budget, NODES))

    def learn(self, logits: NodeLogits) -> None:
        """Keeps the predictions until the next step shows which node was accepted last."""
        self._logits = logits

    def _index(self) -> dict[tuple[int, ...], int]:
        """Indexes n-grams with a full continuation; returns the first ends of those without, by n-gram."""
        text, full = self.text, len(self.text) - COPIED
        for end in range(self._indexed + 1, full + 1):
            for size in range(1, min(LONGEST, end) + 1):
                self._ends[tuple(text[end - size : end])] = end
        self._indexed = max(self._indexed, full)
        young: dict[tuple[int, ...], int] = {}
        for end in range(max(full, 0) + 1, len(text)):
            for size in range(1, min(LONGEST, end) + 1):
                young.setdefault(tuple(text[end - size : end]), end)
        return young

    def _continuation(self, tail: Sequence[int], young: dict[tuple[int, ...], int]) -> tuple[list[int], int]:
        """Tokens after the longest n-gram at the end of `tail`, and the length of the n-gram."""
        for size in range(min(LONGEST, len(tail)), 0, -1):
            gram = tuple(tail[len(tail) - size :])
            end = self._ends.get(gram, young.get(gram))
            if end is not None:
                return self.text[end : end + COPIED], size
        return [], 0

    def _ranking(self) -> list[tuple[int, int, float]]:
        """Rank, token and probability of the last token's alternatives."""
        if self._logits is None:
            return []
        before = ([-1] * CONTEXT + self.text[:-1])[-CONTEXT:]
        rows = np.flatnonzero((self._logits.contexts == before).all(axis=1))
        if not len(rows):
            return []
        best = self._logits.top_tokens[rows, :RANKS]
        # Nodes of a run of one token have equal contexts: the accepted one is most likely the one that
        # chose the last token, of several the deepest.
        chose = np.flatnonzero(best[:, :1] == self.text[-1])
        row = int(chose[-1]) if len(chose) else len(rows) - 1
        probs = self._logits.top_probs[rows[row]]
        return [
            (rank, int(token), float(probs[rank]))
            for rank, token in enumerate(best[row].tolist())
            if token >= 0 and token != self.text[-1]
        ]


METHOD = Method(
    name="logit_spec",
    paper="LogitSpec 2025, arXiv:2507.01449",
    sources=lambda parts: [text_source("logit_spec", LogitSpecSession)],
    tree=as_proposed,
    nodes=NODES,
)
