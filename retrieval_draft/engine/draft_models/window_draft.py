"""Drafts of the target itself after the beginning and the end of a long text: all layers, few keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retrieval_draft.engine.cache.kv_cache import (
    SpeculativeCache,
    SpeculativeLayer,
    layer_windows,
)
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, LentExpansion
from retrieval_draft.engine.draft_models.heads import RERANKED
from retrieval_draft.engine.draft_models.model_draft import ModelDraft, ModelSession
from retrieval_draft.engine.draft_models.vocab_trim import VocabTrims
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import Proposal, TokenArray, empty_proposal

__all__ = ["SINKS", "WINDOW", "CacheWindow", "WindowDraft", "WindowSession"]

SINKS = 4
"""First tokens whose keys stay (StreamingLLM, arXiv:2309.17453, section 3.2)."""

WINDOW = 512
"""Last tokens whose keys stay at least. MagicDec (arXiv:2408.11049) has 256 to 1024 in all."""


class CacheWindow:
    """A copy of the keys and values of a text's first and last tokens, which follows another cache.

    Keys keep the positions that they have in the text. The copy grows with the text; where it has twice the
    window, it is made again.

    Args:
        target: The model.
        window: Last tokens that are copied, at least; those that a layer with a window reads always are.

    Example:
        window 3, 10 tokens in the text: copies keys 0 1 2 3 7 8 9; after two more tokens, 10 and 11 as well
    """

    def __init__(self, target: Target, window: int) -> None:
        self._target = target
        self._window = max(window, *(size or 0 for _, size in layer_windows(target.model.config)))
        self._copy: SpeculativeCache | None = None
        self._end = 0

    @torch.no_grad()
    def follow(self, cache: SpeculativeCache) -> SpeculativeCache:
        """The copy, up to the last token that `cache` holds: as before, and of the same text, or longer."""
        end = cache.get_seq_length()
        copied, new = self._copy, end - self._end
        layers = [layer for layer in cache.attention_layers if layer.is_initialized]
        is_kept = new >= 0 and all(layer.start <= self._end for layer in layers)
        if copied is None or not is_kept or copied.get_seq_length() + new > SINKS + 2 * self._window:
            copied = self._copied(cache, end)
        elif new:
            for mine, its in zip(copied.attention_layers, cache.attention_layers, strict=True):
                if its.is_initialized:
                    added = its.slots(self._end, end)
                    mine.update(added[0][0], added[-1][-1])
        self._copy, self._end = copied, end
        return copied

    def _copied(self, cache: SpeculativeCache, end: int) -> SpeculativeCache:
        size = min(end, SINKS + self._window)
        cut = end - size
        copied: SpeculativeCache = self._target.cache(SINKS + 2 * self._window)
        for mine, its in zip(copied.attention_layers, cache.attention_layers, strict=True):
            if its.is_initialized:
                mine.fill(*_runs(its, cut, end))
        copied.shift = cache.shift + cut
        return copied


def _runs(layer: SpeculativeLayer, cut: int, end: int) -> tuple[list[list[Tensor]], int]:
    """Slots of a layer without `cut` tokens after the first ones, and the index of the first of them."""
    if layer.start or not cut:
        first = max(layer.start, cut + SINKS if cut else 0)
        return [layer.slots(first, end)], first - cut
    return [layer.slots(0, SINKS), layer.slots(SINKS + cut, end)], 0


class WindowSession(ModelSession):
    """The target's view of a request for which it drafts after some of its keys; see `WindowDraft`."""

    wants_cache = True

    def __init__(
        self,
        expansion: LentExpansion,
        window: CacheWindow,
        prompt: TokenArray,
        reranked: int = RERANKED,
        trims: VocabTrims | None = None,
    ) -> None:
        super().__init__(expansion, prompt, None, reranked, trims)
        self._drafts, self._window = expansion, window
        self._lent: SpeculativeCache | None = None

    def lend_cache(self, cache: Any) -> None:
        """Takes the target's cache of the text but for its last token, until that is observed."""
        self._lent = cache

    def propose(self, budget: int) -> Proposal:
        """The model's most probable paths; none where a step lends no cache."""
        if budget <= 0 or self._lent is None:
            return empty_proposal("model", "model")
        self._drafts.cache = self._window.follow(self._lent)
        return super().propose(budget)

    def review(self, chain: TokenArray) -> Tensor:
        """As of `ModelSession`; after the whole text, in a cache of its own, where a step lends none."""
        self._drafts.cache = None if self._lent is None else self._window.follow(self._lent)
        return super().review(chain)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        super().observe(tokens)
        self._lent = None


class WindowDraft(ModelDraft):
    """The target drafts for itself after a long text's first and last tokens; nothing trained.

    As in MagicDec (arXiv:2408.11049) with StreamingLLM's keys (arXiv:2309.17453): in a long text, a pass
    over few keys takes less memory traffic than one over all, and mostly predicts the same. All layers run.

    Args:
        model: The target.
        window: Last tokens whose keys are read, at least; beside them the first `SINKS`.
        limits: Limits on the growth of its trees.

    Raises:
        InvalidInputError: The window is empty.
    """

    def __init__(self, model: Any, window: int = WINDOW, limits: ExpansionLimits | None = None) -> None:
        if window < 1:
            raise InvalidInputError(f"window is {window}; it must be at least 1.")
        super().__init__(model, int(model.get_input_embeddings().weight.shape[0]), limits)
        self._window = window

    def _session(self, prompt: TokenArray, limits: ExpansionLimits | None, reranked: int) -> WindowSession:
        expansion = LentExpansion(self.target, limits or self.limits, self.applied, lambda: None)
        window = CacheWindow(self.target, self._window)
        return WindowSession(expansion, window, prompt, reranked, self.trims)
