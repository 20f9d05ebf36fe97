"""Drafts from a model with another tokenizer.

Drafts never decide the output: the target's own tokens are emitted, and drafts count where they match (rule B
of sample-and-match verification). So a wrong translation does no harm to the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.model_draft import ModelDraft
from retrieval_draft.engine.draft_models.vocabulary import VocabularyMap
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray, empty_proposal

__all__ = ["ForeignModelDraft", "ForeignSession"]

SLACK = 8
"""Last draft tokens that are not cached: with more text they may be tokenized differently."""

LOOK_BEHIND = 8
"""Tokens of the target before a draft, tokenized together with its text."""

TEXT_DEPTH = 10


class ForeignSession:
    """One request: the text so far, in the target's tokens."""

    def __init__(self, source: ForeignModelDraft, prompt: TokenArray) -> None:
        self._source = source
        self._text = np.array(prompt, np.int32)
        self._expansion = source.expansion()

    def propose(self, budget: int) -> Proposal:
        """The draft model's guesses after the same text, in the target's tokens."""
        if budget <= 0 or not len(self._text):
            return empty_proposal("model", "model")
        own = self._source.to_draft(self._text)
        if not len(own):
            return empty_proposal("model", "model")
        if self._source.mode == "intersection":
            tree = self._expansion.grow(own, budget, self._source.allowed)
            tokens = self._source.map.to_target[tree.tokens]
            return _proposal(tokens, tree.parents, tree.probs)
        tree = self._expansion.grow(own, TEXT_DEPTH)
        tokens = self._source.to_target(self._text[-LOOK_BEHIND:], own, tree.tokens)[:budget]
        # The draft tokens' probabilities, spread over as many tokens of the target.
        whole = float(np.prod(np.clip(tree.probs, 1e-6, 1.0)))
        each = whole ** (1.0 / max(len(tokens), 1))
        parents = np.arange(len(tokens), dtype=np.int32) - 1
        return _proposal(tokens, parents, np.full(len(tokens), each, np.float32))

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        self._text = np.concatenate((self._text, np.asarray(tokens, np.int32)))

    def learn(self, logits: NodeLogits) -> None:
        """Does nothing: the model does not learn."""

    def close(self) -> None:
        """Frees the cache."""
        self._expansion.close()


def _proposal(tokens: TokenArray, parents: np.ndarray[Any, Any], probs: np.ndarray[Any, Any]) -> Proposal:
    size = len(tokens)
    return Proposal(
        tokens.astype(np.int32),
        parents.astype(np.int32),
        np.clip(probs, 1e-6, 1.0).astype(np.float32),
        np.zeros(size, np.int32),
        "model",
        "model",
    )


class ForeignModelDraft:
    """Drafts with a causal model whose tokenizer is not the target's.

    "intersection" drafts trees of tokens that both vocabularies have, to which the other tokens' probability
    is distributed (TLI, arXiv:2502.05202); "text" drafts a chain in the draft model's own tokens, decodes it
    and tokenizes the text again with the target's tokenizer, together with the last tokens before it (SLEM,
    same paper).

    Args:
        model: The draft model.
        draft_tokenizer: Its tokenizer.
        target_tokenizer: The target's.
        mode: "intersection" or "text".
        limits: Limits on the growth of its trees.

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
        mode: Literal["intersection", "text"] = "intersection",
        limits: ExpansionLimits | None = None,
    ) -> None:
        if mode not in ("intersection", "text"):
            raise InvalidInputError(f"mode is {mode!r}.", 'Choose "intersection" or "text".')
        self.mode = mode
        self._draft_tokenizer = draft_tokenizer
        self._target_tokenizer = target_tokenizer
        limits = limits or ExpansionLimits()
        if mode == "text":
            limits = replace(limits, top_k=1, depth=TEXT_DEPTH)
        self._model = ModelDraft(model, int(model.get_input_embeddings().weight.shape[0]), limits)
        if mode == "intersection":
            self.map = VocabularyMap(target_tokenizer, draft_tokenizer)
            target = self._model.target
            self.allowed = self.map.allowed(target.embedding_rows).to(target.device)

    def expansion(self) -> Any:
        """The draft model with an empty cache."""
        return self._model.expansion(slack=SLACK)

    def prepare(self) -> None:
        """Measures the fastest kernels for the draft model's layers, once."""
        self._model.prepare()

    def to_draft(self, text: TokenArray) -> TokenArray:
        """The text in the draft model's tokens.

        Args:
            text: int32, shape (length,), the target's tokens.
        """
        words = self._target_tokenizer.decode(text.tolist(), skip_special_tokens=True)
        ids = self._draft_tokenizer(words)["input_ids"]
        # A tokenizer that ends every text with a special token would make the model continue after it.
        ends = {getattr(self._draft_tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")}
        while len(ids) > 1 and ids[-1] in ends:
            ids = ids[:-1]
        return np.array(ids, np.int32)

    def to_target(self, behind: TokenArray, own: TokenArray, drafted: TokenArray) -> TokenArray:
        """Drafted tokens as the target would write them after its last ones.

        Args:
            behind: int32. The target's last tokens.
            own: int32. The text in draft tokens, to which the drafted tokens are appended for decoding.
            drafted: int32. Draft tokens.
        """
        decode = self._draft_tokenizer.decode
        start = max(0, len(own) - LOOK_BEHIND)
        before = decode(own[start:].tolist(), skip_special_tokens=True)
        after = decode([*own[start:].tolist(), *drafted.tolist()], skip_special_tokens=True)
        if not after.startswith(before):
            return np.empty(0, np.int32)
        context = self._target_tokenizer.decode(behind.tolist(), skip_special_tokens=True)
        ids = self._target_tokenizer(context + after[len(before) :], add_special_tokens=False)["input_ids"]
        cut = np.array(ids, np.int32)
        if np.array_equal(cut[: len(behind)], behind):
            return cut[len(behind) :]
        # The first of the look-behind tokens may differ, as the text before them is missing.
        for end in range(len(cut) - 1, 0, -1):
            if end >= 2 and np.array_equal(cut[end - 2 : end], behind[-2:]):
                return cut[end:]
        return np.empty(0, np.int32)

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> ForeignSession:
        """Starts a request with `prompt`, int32, shape (length,); reference texts are not read."""
        return ForeignSession(self, prompt)

    def flush(self) -> None:
        """Does nothing: no text waits to be looked up."""

    def close(self) -> None:
        """Does nothing: there is no thread or file to close."""

    @property
    def nbytes(self) -> int:
        """Bytes of the map between the vocabularies."""
        return self.map.to_target.nbytes if self.mode == "intersection" else 0
