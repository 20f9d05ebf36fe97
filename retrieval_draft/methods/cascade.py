"""Cascade speculative drafting: cheap guesses reviewed by draft models in a row, then more cheap guesses.

Chen et al. (NeurIPS 2024, arXiv:2312.11462): the base copies 10 tokens after the longest earlier occurrence
of the text's end, or takes them from a table of bigrams. A draft model reviews the guesses of what is cheaper
(vertical cascade: a token is kept while its probability is more than that of the best one divided by the
lenience) and adds its own after the last one kept; later positions, less likely to be reached, are left to
cheaper ones (horizontal cascade). Sizes are published for one draft model (LLaMA-7B with one of 160M: 13
reviewed, 10 of the base, lenience 3) and for two (FLAN-T5 base and small: 5, 14 and 10, lenience 2; what the
first reviews is one token of the second and 10 of the base). The target reviews with lenience 1, which is the
verification of this engine. Bigrams are those of earlier text here, the newest first; of more than two draft
models the best two are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_draft.index.source import DraftSource, Proposal, TokenArray
from retrieval_draft.methods.drafted import DraftedSession, Drafter, drafters
from retrieval_draft.methods.lookup import GuessTree, MethodSource, after_references
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["METHOD", "CascadeSession"]

COPIED = 10
SIZES = {1: ((13, 10), (0, 10)), 2: ((5, 14, 10), (0, 1, 10), (0, 0, 10))}
"""By the number of draft models: tokens of each model and of the base, last, in the draft (first row), and in
what the first, the second model reviews."""

LENIENCES = {1: 3.0, 2: 2.0}
LONGEST = 10
"""Limit of the text's end that is looked up; the paper has none, and longer ends find the same."""


class CascadeSession(DraftedSession):
    """The text's n-grams, and the draft models.

    Args:
        models: One or two draft models, the better first.
        prompt: int32, shape (length,).
        references: Texts that the base copies from too.

    Example:
        text 7 8 9 4 7 8: the base copies 9 4 7 8; the model keeps 9 4, adds 5, ...
    """

    def __init__(
        self,
        models: Sequence[Drafter],
        prompt: TokenArray,
        references: Sequence[TokenArray] = (),
    ) -> None:
        super().__init__(models, prompt)
        self._sizes, self._lenience = SIZES[len(models)], LENIENCES[len(models)]
        self._copied: list[int] = after_references(prompt, references).tolist()
        self._last: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, budget: int) -> Proposal:
        """Proposes one chain."""
        tree = GuessTree("cascade", "model")
        if not self.text or budget <= 0:
            return tree.proposal(0)
        self._index()
        tree.add_path(self._drafted(0, (), budget))
        return tree.proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        super().observe(tokens)
        self._copied.extend(tokens.tolist())

    def base(self, chain: Sequence[int], size: int) -> list[int]:
        """At most `size` and 10 tokens after the longest earlier occurrence of text and chain."""
        end = [*self.text[-LONGEST:], *chain][-LONGEST:]
        for length in range(len(end), 0, -1):
            begin = self._last.get(tuple(end[-length:]))
            if begin is not None:
                return self._copied[begin : begin + min(size, COPIED)]
        return []

    def _index(self) -> None:
        for end in range(self._indexed + 1, len(self._copied)):
            for size in range(1, min(LONGEST, end) + 1):
                self._last[tuple(self._copied[end - size : end])] = end
        self._indexed = max(self._indexed, len(self._copied) - 1)

    def _drafted(self, row: int, chain: Sequence[int], most: int) -> list[int]:
        """At most `most` guesses after text and chain, by a row of sizes."""
        grown: list[int] = []
        for model, size in enumerate(self._sizes[row]):
            end = min(len(grown) + size, most)
            if model == len(self.inner):
                grown += self.base([*chain, *grown], end - len(grown))
            while model < len(self.inner) and len(grown) < end:
                before = [*chain, *grown]
                cheap = self._drafted(model + 1, before, end - len(grown))
                kept = self._review(model, before, cheap)[: end - len(grown)]
                if not kept:  # a head that sees no further
                    break
                grown += kept
        return grown

    def _review(self, model: int, chain: Sequence[int], cheap: Sequence[int]) -> list[int]:
        """The part of `cheap` that a draft model keeps, and its own token after it, as far as it sees."""
        logs = self.inner[model].review(np.array([*chain, *cheap], np.int32))[len(chain) :]
        if not len(logs):
            return []
        best, tokens = logs.max(-1)
        kept: list[int] = []
        for index, token in enumerate(cheap[: len(logs)]):
            known = token < logs.shape[1]
            if not known or float(logs[index, token]) <= float(best[index]) - np.log(self._lenience):
                break
            kept.append(int(token))
        return [*kept, *(int(token) for token in tokens[len(kept) : len(kept) + 1])]


def _sources(parts: MethodContext) -> Sequence[DraftSource]:
    models = drafters(parts, "cascade")[: max(SIZES)]

    def open_session(prompt: TokenArray, references: Sequence[TokenArray]) -> CascadeSession:
        return CascadeSession([model.session(prompt) for model in models], prompt, references)

    return [MethodSource("cascade", open_session)]


METHOD = Method(
    "cascade",
    "Chen et al. 2024, arXiv:2312.11462",
    _sources,
    as_proposed,
    nodes=max(sum(sizes[0]) for sizes in SIZES.values()),
    needs_model=True,
)
