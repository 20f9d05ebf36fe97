"""ANPD: the most frequent next token of the last n-gram, repeatedly.

Ou et al. (2024), "Lossless Acceleration of Large Language Model via Adaptive N-gram Parallel Decoding"
(arXiv:2404.08698): levels of n = 3 and 2 tokens count the tokens after each context of n-1 in the request's
own text; the highest level with the context predicts its most frequent next token; K predictions are a chain.
Accepted tokens are counted at once.

K of the published runs could not be found; here it is 10, as in prompt lookup. The rule for ties is not
published either: here the token that reached the count first stays.
"""

from __future__ import annotations

from retrieval_draft.index.source import Proposal, TokenArray
from retrieval_draft.methods.lookup import GuessTree, LookupSession, text_source
from retrieval_draft.methods.method import Method, as_proposed

__all__ = ["METHOD", "AnpdSession"]

HIGHEST = 3
PREDICTED = 10


class AnpdSession(LookupSession):
    """Counts of next tokens by the one or two tokens before.

    Args:
        prompt: int32, shape (length,).

    Example:
        text 7 8 9 7 8 4 7 8 4 5 8: "5 8" is new, after "8" came 4 twice and 9 once; after "8 4" came 7 first,
        5 as often  ->  4 7 8 4 7 8 ..
    """

    def __init__(self, prompt: TokenArray) -> None:
        super().__init__(prompt)
        self._counts: dict[tuple[int, ...], dict[int, int]] = {}
        self._best: dict[tuple[int, ...], int] = {}
        self._count(0)

    def propose(self, budget: int) -> Proposal:
        """A chain of predictions, each made from the ones before."""
        tree, tail, node = GuessTree("anpd"), self.text[1 - HIGHEST :], -1
        for _ in range(min(PREDICTED, budget)):
            for size in range(len(tail), 0, -1):
                context = tuple(tail[-size:])
                if context in self._best:
                    break
            else:
                break
            token, counts = self._best[context], self._counts[context]
            node = tree.add(node, token, counts[token] / sum(counts.values()), size)
            tail = [*tail, token][1 - HIGHEST :]
        return tree.proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Counts accepted tokens, int32, shape (m,)."""
        known = len(self.text)
        super().observe(tokens)
        self._count(known)

    def _count(self, start: int) -> None:
        text = self.text
        for index in range(start, len(text)):
            token = text[index]
            for size in range(1, min(HIGHEST - 1, index) + 1):
                context = tuple(text[index - size : index])
                counts = self._counts.setdefault(context, {})
                counts[token] = counts.get(token, 0) + 1
                if counts[token] > counts.get(self._best.get(context, -1), 0):
                    self._best[context] = token


METHOD = Method(
    name="anpd",
    paper="Ou et al. 2024, arXiv:2404.08698",
    sources=lambda parts: [text_source("anpd", AnpdSession)],
    tree=as_proposed,
    nodes=PREDICTED,
)
