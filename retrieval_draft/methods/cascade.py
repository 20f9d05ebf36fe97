"""Cascade speculative drafting: cheap guesses reviewed by a draft model, then more cheap guesses.

Chen et al. (NeurIPS 2024, arXiv:2312.11462), the setting of LLaMA-7B with a 160M draft model: the base
copies 10 tokens after the longest earlier occurrence of the text's end, or takes them from a table of
bigrams. The draft model reviews them (vertical cascade, lenience 3: a token is kept while its probability
is more than a third of the best one's) and adds its own after the last one kept, until there are 13 tokens;
later positions, less likely to be reached, are the base's only (horizontal cascade): 10 more. The target
reviews with lenience 1, which is the verification of this engine. Bigrams are those of earlier text here, the
newest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_draft.engine.draft_models.expansion import Expansion, ExpansionLimits
from retrieval_draft.index.source import DraftSource, Proposal, TokenArray
from retrieval_draft.methods.drafted import expansions
from retrieval_draft.methods.lookup import GuessTree, LookupSession, MethodSource, after_references
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["METHOD", "CascadeSession"]

COPIED = 10
REVIEWED = 13
BEHIND = 10
LENIENCE = 3.0
LONGEST = 10
"""Limit of the text's end that is looked up; the paper has none, and longer ends find the same."""


class CascadeSession(LookupSession):
    """The text's n-grams, and the draft model.

    Example:
        text 7 8 9 4 7 8: the base copies 9 4 7 8; the model keeps 9 4, adds 5, ...
    """

    def __init__(
        self, expansion: Expansion, prompt: TokenArray, references: Sequence[TokenArray] = ()
    ) -> None:
        super().__init__(prompt)
        self._expansion = expansion
        self._copied: list[int] = after_references(prompt, references).tolist()
        self._last: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, budget: int) -> Proposal:
        """Proposes one chain."""
        tree = GuessTree("cascade", "model")
        if not self.text or budget <= 0:
            return tree.proposal(0)
        self._index()
        chain: list[int] = []
        wanted = min(REVIEWED, budget)
        while len(chain) < wanted:
            cheap = self.base(chain, wanted - len(chain))
            chain += self._review(chain, cheap)
        tree.add_path(chain[:wanted])
        tree.add_path([*chain[:wanted], *self.base(chain[:wanted], BEHIND)])
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

    def _review(self, chain: Sequence[int], cheap: Sequence[int]) -> list[int]:
        """The part of `cheap` that the draft model keeps, and its own token after it."""
        guesses = np.array([*chain, *cheap], np.int32)
        logs = self._expansion.review(np.array(self.text, np.int32), guesses)[len(chain) :]
        best, tokens = logs.max(-1)
        kept: list[int] = []
        for index, token in enumerate(cheap):
            if float(logs[index, token]) <= float(best[index]) - np.log(LENIENCE):
                break
            kept.append(int(token))
        return [*kept, int(tokens[len(kept)])]

    def close(self) -> None:
        """Frees the draft model's cache."""
        self._expansion.close()


def _sources(parts: MethodContext) -> Sequence[DraftSource]:
    start = expansions(parts, "cascade", ExpansionLimits(top_k=1))

    def open_session(prompt: TokenArray, references: Sequence[TokenArray]) -> CascadeSession:
        return CascadeSession(start(), prompt, references)

    return [MethodSource("cascade", open_session)]


METHOD = Method(
    "cascade",
    "Chen et al. 2024, arXiv:2312.11462",
    _sources,
    as_proposed,
    nodes=REVIEWED + BEHIND,
    needs_model=True,
)
