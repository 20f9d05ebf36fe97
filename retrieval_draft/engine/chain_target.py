"""A target model that verifies chains: through its own call, its own masks and its own cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.chain_inputs import ChainAttention
from retrieval_draft.engine.attention.tree_mask import TreeInputs
from retrieval_draft.engine.cache.chain_cache import ChainCache
from retrieval_draft.engine.compat import given_cache, limited_steps, own_cache, steps_as_alone
from retrieval_draft.engine.rope_switch import rope_switch
from retrieval_draft.engine.target import Target
from retrieval_draft.engine.verification import Verification
from retrieval_draft.engine.wrapped_models import check_decoder, check_layers, uncompiled
from retrieval_draft.errors import UnsupportedModelError

__all__ = ["ChainTarget"]

_AHEAD = 4096
"""Tokens that the mask makes room for at once."""


class ChainTarget(Target):
    """Forward passes over prompts and chains, one request at a time.

    Args:
        model: Any causal language model of transformers.

    Attributes:
        longest: Tokens that a text may have at most to be drafted for; None for any. A model that chooses
            keys beyond some length may choose others there for several tokens at once; of equal keys also
            where earlier ones, before that length, were passed several at once and are rounded otherwise.

    Raises:
        UnsupportedModelError: The model is no decoder alone, or a token depends on those beside it.
    """

    shares_passes = False
    longest: int | None = None

    def _set_up(self) -> None:
        check_decoder(self.model)
        check_layers(self.model)
        self.verification = Verification("chain", "several tokens after a state are as one after another")
        self.rope = rope_switch(self.model)
        self.attention = self.attention_of_row()
        self._limited = limited_steps(self.model)
        self._ones = torch.ones((1, 0), dtype=torch.int64, device=self.device)

    def cache(self, capacity: int, keeps_all: bool = False) -> ChainCache:
        """An empty cache, which grows as it needs."""
        return ChainCache(lambda: own_cache(self.model))

    def attention_of_row(self) -> ChainAttention:
        """Model inputs for one request."""
        return ChainAttention(self.device)

    def max_depth(self, root: int, wanted: int) -> int:
        """The length of a chain below a root at position `root`.

        It is at most `wanted`, with which the text has one token less than it may have.
        """
        if self.longest is not None and root + wanted + 2 > self.longest:
            return 0
        return super().max_depth(root, wanted)

    def prefill_passes(
        self,
        cache: Any,
        prompt: Tensor,
        rows: int,
        chunk: int | Callable[[], int | None] | None = None,
        further: int = 0,
    ) -> Iterator[Tensor | None]:
        """As for trees; in one pass where several tokens after a long text may differ from a whole text."""
        if self._in_parts and self.blank.isdisjoint(prompt.tolist() if self.blank else ()):
            yield from super().prefill_passes(cache, prompt, rows, chunk, further)
        else:
            yield self._forward(cache, prompt[None], cache.get_seq_length(), rows, 0)

    @property
    def _in_parts(self) -> bool:
        return self.rope is None and self.longest is None and not self._limited

    @property
    def passes_parts(self) -> bool:  # type: ignore[override]
        """True if any prompt may be passed in parts."""
        return self._in_parts and not self.blank

    def refill(self, cache: Any, text: Tensor, chunk: int | None) -> None:
        """Has the next pass take the whole text again."""
        cache.hold(text)

    def verify(self, cache: Any, inputs: TreeInputs) -> Tensor:
        """One pass over pending tokens and a chain, which stays staged in the cache.

        Returns:
            (n, vocabulary), float, logits after each token of the chain.
        """
        chain = inputs.input_ids
        if chain.shape[1] > 1:
            cache.save(chain.shape[1])
        logits = self._pass(cache, cache.stage(chain), cache.get_seq_length(), chain.shape[1], 0)
        self._keep_hidden(chain.shape[1])
        return logits

    def verify_rows(self, caches: Sequence[Any], inputs: Sequence[TreeInputs]) -> Tensor:
        """One pass for each request; (tokens of all chains, vocabulary)."""
        return self._each(self.verify, caches, inputs)

    def verify_tree(
        self, cache: Any, tree: DraftTree, length: int, moved: NDArray[np.int64] | None = None
    ) -> Tensor:
        """Runs `verify` on the nodes as a chain, for probes and measurements; it can be dropped always."""
        cache.save(len(tree))
        return self.verify(cache, self.attention.prepare(tree, length, moved))

    def _forward(self, cache: Any, ids: Tensor, offset: int, keep: int, whole: int) -> Tensor:
        logits = self._pass(cache, ids, offset, keep, ids.shape[1])
        self._keep_hidden()
        return logits

    def _pass(self, cache: ChainCache, ids: Tensor, offset: int, keep: int, new: int) -> Tensor:
        """The model's own call after `offset` tokens, of which `new` ones are committed at once."""
        end = offset + ids.shape[1]
        options: dict[str, Any] = {self._cache_parameter: cache.inner}
        if self._keeps_logits:
            options["logits_to_keep"] = keep
        if self._takes_positions:
            positions = torch.arange(offset + cache.shift, end + cache.shift, device=ids.device)
            options["position_ids"] = positions[None]
        if self._takes_mask:
            if self._ones.shape[1] < end:
                self._ones = self._ones.new_ones((1, end + _AHEAD))
            options["attention_mask"] = self._ones[:, :end]
        factors = nullcontext() if self.rope is None else self.rope.as_new()
        steps = nullcontext() if new else steps_as_alone(self._limited)
        with uncompiled(self._compiled), factors, steps:
            forward = partial(self.model, input_ids=ids, use_cache=True, return_dict=True, **options)
            out = forward() if self.threads is None else self.threads.run(ids.shape[1], forward)
        inner = given_cache(out)
        if inner is None and cache.inner is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} returns no cache.", "Use model.generate for this model."
            )
        cache.passed(inner, new)
        logits: Tensor = out.logits[0]
        return logits[-keep:]
