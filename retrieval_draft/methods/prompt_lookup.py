"""Prompt lookup decoding: copies the tokens after an earlier occurrence of the text's last tokens.

Saxena (2023), "Prompt Lookup Decoding", as in Spec-Bench's implementation: of the last 3, 2 and 1 tokens, the
first that occurred before; its left-most occurrence; the next 10 tokens as one chain.
"""

from __future__ import annotations

from retrieval_draft.index.source import Proposal, TokenArray
from retrieval_draft.methods.lookup import GuessTree, LookupSession, text_source
from retrieval_draft.methods.method import Method, as_proposed

__all__ = ["METHOD", "PromptLookupSession"]

LONGEST = 3
COPIED = 10


class PromptLookupSession(LookupSession):
    """First end of each n-gram of the text.

    Example:
        prompt 7 8 9 4 7 8: the last 3 tokens are new, "7 8" occurred at the start  ->  9 4 7 8
    """

    def __init__(self, prompt: TokenArray) -> None:
        super().__init__(prompt)
        self._first: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, budget: int) -> Proposal:
        """The tokens after the left-most earlier occurrence."""
        text, tree = self.text, GuessTree("prompt_lookup")
        for end in range(self._indexed + 1, len(text)):  # the text's own end is not an earlier occurrence
            for size in range(1, LONGEST + 1):
                if size <= end:
                    self._first.setdefault(tuple(text[end - size : end]), end)
        self._indexed = max(self._indexed, len(text) - 1)
        for size in range(LONGEST, 0, -1):
            begin = self._first.get(tuple(text[-size:])) if size <= len(text) else None
            if begin is not None:
                tree.add_path(text[begin : begin + COPIED], match_length=size)
                break
        return tree.proposal(budget)


METHOD = Method(
    name="prompt_lookup",
    paper="Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding",
    sources=lambda parts: [text_source("prompt_lookup", PromptLookupSession)],
    tree=as_proposed,
    nodes=COPIED,
)
