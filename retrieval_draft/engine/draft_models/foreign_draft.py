"""Drafts from a model with another tokenizer.

Drafts never decide the output: the target's own tokens are emitted, and drafts count where they match (rule B
of sample-and-match verification). So a wrong translation does no harm to the output, and the acceptance test
of string-level rejection sampling, which compares with the probability of a drafted text, is not needed: that
probability orders the nodes and is calibrated like other evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from retrieval_draft.engine.draft_models.beside import BesideSession
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, ModelTree
from retrieval_draft.engine.draft_models.heads import proposal_of
from retrieval_draft.engine.draft_models.model_draft import ModelDraft
from retrieval_draft.engine.draft_models.spelling import LOOK_BEHIND, Speller, cut_off, joined_tree
from retrieval_draft.engine.draft_models.vocabulary import VocabularyMap, token_bytes
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray, empty_proposal

__all__ = ["ForeignModelDraft", "ForeignSession"]

SLACK = 8
"""Last draft tokens that are not cached: with more text they may be tokenized differently."""

TEXT_NODES = 2
"""Nodes of the draft model for each of the budget: several may be one token of the target."""

RECENT = 64
"""Last tokens of the target whose text tells how many draft tokens one of them takes."""

MOST_STRETCH = 4
"""Limit of the draft model's levels over the limit for a tokenizer that cuts alike."""


class ForeignSession:
    """One request: the text so far, in the target's tokens."""

    def __init__(self, source: ForeignModelDraft, prompt: TokenArray) -> None:
        self._source = source
        self._tokens = np.array(prompt, np.int32)
        self._text = source.speller.text(self._tokens)
        self._start = int(source.is_padded(self._tokens))
        self._expansion = source.expansion()

    def propose(self, budget: int) -> Proposal:
        """The draft model's guesses after the same text, in the target's tokens."""
        return self._grow(self._tokens, self._text, budget)

    def propose_after(self, tokens: TokenArray, budget: int, stop: Callable[[], bool]) -> Proposal:
        """As `propose`, one level deeper, after the text and `tokens`; see `PreparesDrafts`."""
        text = self._text + self._source.speller.text(tokens)
        return self._grow(np.concatenate((self._tokens, tokens)), text, budget, 1, stop)

    def _grow(
        self,
        tokens: TokenArray,
        text: bytes,
        budget: int,
        sure: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> Proposal:
        if budget <= 0 or not len(text):
            return empty_proposal("model", "model")
        source, allowed = self._source, self._source.allowed
        # The target may have emitted the first bytes of a character, of which the draft model knows nothing.
        end = len(text) - cut_off(text)
        own = source.to_draft(text[self._start : end].decode("utf-8", "replace"))
        if not len(own):
            return empty_proposal("model", "model")
        if source.mode == "intersection":
            if end < len(text):
                return empty_proposal("model", "model")
            tree = self._expansion.grow(own, budget, allowed, sure=sure, stop=stop)
            return proposal_of(replace(tree, tokens=source.map.to_target[tree.tokens]))
        depth = source.depth(tokens[-RECENT:], own)
        tree = self._expansion.grow(own, TEXT_NODES * budget, allowed, depth, sure=sure, stop=stop)
        return proposal_of(source.to_target(tokens[-LOOK_BEHIND:], text[end:], tree, budget))

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        tokens = np.asarray(tokens, np.int32)
        self._tokens = np.concatenate((self._tokens, tokens))
        self._text += self._source.speller.text(tokens)

    def learn(self, logits: NodeLogits) -> None:
        """Does nothing: the model does not learn."""

    def close(self) -> None:
        """Frees the cache."""
        self._expansion.close()


class ForeignModelDraft:
    """Drafts with a causal model whose tokenizer is not the target's.

    "text" drafts trees in the draft model's own tokens and tokenizes each path's text anew with the target's
    tokenizer, together with the last tokens before it (SLEM, arXiv:2502.05202, with trees): the draft model
    may split where the target joins, and join where it splits. Where it takes more tokens for a text than the
    target, its trees have as many more levels. "intersection" drafts trees of tokens that both vocabularies
    have, to which the other tokens' probability is distributed (TLI, same paper).

    Args:
        model: The draft model.
        draft_tokenizer: Its tokenizer.
        target_tokenizer: The target's.
        mode: "text" or "intersection".
        limits: Limits on the growth of its trees.

    Attributes:
        model: The draft model as a source of trees in its own tokens.

    Raises:
        InvalidInputError: `mode` is neither.
        TokenizerMismatchError: Nothing is shared, in the mode "intersection".
    """

    name = "model"
    level = "model"

    def __init__(
        self,
        model: Any,
        draft_tokenizer: Any,
        target_tokenizer: Any,
        mode: Literal["text", "intersection"] = "text",
        limits: ExpansionLimits | None = None,
    ) -> None:
        if mode not in ("text", "intersection"):
            raise InvalidInputError(f"mode is {mode!r}.", 'Choose "text" or "intersection".')
        self.mode = mode
        self.speller = Speller(target_tokenizer)
        self._draft_tokenizer = draft_tokenizer
        self._target_tokenizer = target_tokenizer
        rows = int(model.get_input_embeddings().weight.shape[0])
        self.model = ModelDraft(model, rows, limits, columns=0)
        target = self.model.target
        if mode == "intersection":
            self.map = VocabularyMap(target_tokenizer, draft_tokenizer)
            allowed = self.map.to_target >= 0
        else:
            self._texts = token_bytes(draft_tokenizer)
            self._sizes = np.array([len(text or b"") for text in self._texts], np.int64)
            allowed = np.array([text is not None for text in self._texts])
        self.allowed = torch.zeros(target.embedding_rows, dtype=torch.bool, device="cpu")
        self.allowed[: len(allowed)] = torch.from_numpy(allowed[: target.embedding_rows])
        self.allowed = self.allowed.to(target.device)

    def expansion(self) -> Any:
        """The draft model with an empty cache."""
        return self.model.expansion(slack=SLACK)

    def prepare(self) -> None:
        """Measures the fastest kernels for the draft model's layers, once."""
        self.model.prepare()

    def is_padded(self, tokens: TokenArray) -> bool:
        """True if a text's first token has a space that is not in the text, as SentencePiece puts there."""
        text = self.speller.text(tokens[:LOOK_BEHIND])
        return text[:1] == b" " and not self._target_tokenizer.decode(
            tokens[:LOOK_BEHIND].tolist(), skip_special_tokens=True
        ).startswith(" ")

    def depth(self, recent: TokenArray, own: TokenArray) -> int:
        """Levels of a tree of draft tokens as deep as the limit's in the target's tokens.

        Args:
            recent: int32. The target's last tokens.
            own: int32. The text in draft tokens.
        """
        sizes = np.cumsum(self._sizes[own[::-1][: MOST_STRETCH * len(recent)]])
        count = int(np.searchsorted(sizes, len(self.speller.text(recent)))) + 1
        stretch = min(max(count / len(recent), 1.0), MOST_STRETCH)
        return round(stretch * self.model.limits.depth)

    def to_draft(self, text: str) -> TokenArray:
        """A text in the draft model's tokens."""
        ids = self._draft_tokenizer(text)["input_ids"]
        # A tokenizer that ends every text with a special token would make the model continue after it.
        ends = {getattr(self._draft_tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")}
        while len(ids) > 1 and ids[-1] in ends:
            ids = ids[:-1]
        return np.array(ids, np.int32)

    def to_target(self, behind: TokenArray, begun: bytes, tree: ModelTree, most: int) -> ModelTree:
        """A tree of draft tokens as the target would write it after its last tokens.

        Args:
            behind: int32. The target's last tokens.
            begun: First bytes of a character at their end: only paths that begin with them are kept.
            tree: In draft tokens.
            most: The most nodes to return.
        """
        paths: list[bytes] = []
        for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
            paths.append((paths[parent] if parent >= 0 else b"") + (self._texts[token] or b""))
        size = len(begun)
        texts = [path[size:] if path.startswith(begun) else b"" for path in paths]
        return joined_tree(tree, self.speller.spell(behind, texts), most)

    def open(
        self, prompt: TokenArray, references: Sequence[TokenArray] = ()
    ) -> ForeignSession | BesideSession:
        """Starts a request with `prompt`, int32, shape (length,); reference texts are not read."""
        made = ForeignSession(self, prompt)
        return made if self.model.thread is None else BesideSession(made, self.model.thread)

    def flush(self) -> None:
        """Does nothing: no text waits to be looked up."""

    def close(self) -> None:
        """Ends the draft model's thread, if there is one."""
        self.model.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the map between the vocabularies."""
        return self.map.to_target.nbytes if self.mode == "intersection" else 0
