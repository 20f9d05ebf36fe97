"""Continuous batching: requests join and leave a running batch, for servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from retrieval_draft.drafting.grammar.grammar import Grammar
from retrieval_draft.drafting.session import DraftSession
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine.decode import Batch, OnError
from retrieval_draft.engine.model_state import outside_inference
from retrieval_draft.engine.placeholders import ID_LIMIT
from retrieval_draft.engine.prompt_pass import prompt_pass
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.generation.checks import (
    arguments_of_generate,
    best_of_options,
    check_generation,
    strip_prompts,
)
from retrieval_draft.generation.grammars import take_grammar
from retrieval_draft.generation.hf_generate import through_model
from retrieval_draft.generation.requests import (
    DecodeOptions,
    DecodeRequests,
    make_requests,
    share_when_finished,
)
from retrieval_draft.generation.streaming import ending

if TYPE_CHECKING:
    from retrieval_draft.drafter import RetrievalDrafter

__all__ = ["ContinuousDrafter"]


class ContinuousDrafter:
    """Prepares requests as `RetrievalDrafter.generate` does, and provides the batch that decodes them.

    A request that was prepared here has the output of `generate` with the same options and seed, alone or in
    a batch.

    Args:
        drafter: The drafter whose model, sources and store are used.
    """

    def __init__(self, drafter: RetrievalDrafter) -> None:
        self._drafter = drafter

    @property
    def target(self) -> Target:
        """The target model."""
        return self._drafter.target

    def prepare(
        self,
        input_ids: Tensor,
        *,
        seed: int | None = None,
        prediction: Any = None,
        documents: Any = None,
        share: str | None = None,
        best_of: int | None = None,
        top_logprobs: int | None = None,
        grammar: Grammar | None = None,
        max_draft_tokens: int | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> DecodeRequests:
        """Prepares the requests that `generate` would decode. May run while a batch does.

        Args:
            input_ids: int64, shape (1, length). One prompt, whole: pad tokens in it are text.
            seed: For sampling.
            prediction: Expected reply: text or token ids.
            documents: Texts that the reply may quote.
            share: Parts that other servers may learn: "none", "reply" or "all".
            best_of: Samples to draw; their log probabilities are kept.
            top_logprobs: Alternatives of each token to keep with log probabilities; None for no log
                probabilities.
            grammar: Rule that the reply follows.
            max_draft_tokens: Draft tokens in one step at most, 0 for none; None for as many as pay.
            streamer: Refused, and ended: tokens are passed to the requests' own `emit`.
            **options: As for ``model.generate``, inputs of images among them, of one prompt.

        Returns:
            One request for each sample.
        """
        drafter = self._drafter
        if streamer is not None:
            with ending(streamer):
                raise InvalidInputError("prepare takes no streamer.", "Set `emit` of the requests.")
        ids, mask, config = arguments_of_generate((input_ids,), options)
        if mask is None and isinstance(ids, Tensor):
            mask = torch.ones_like(ids)  # else transformers takes pad tokens for padding
        drafter.check_model()
        drafter.check_share(share)
        target, tokenizer = drafter.target, drafter.tokenizer
        take_grammar(target.model, tokenizer, grammar, ids, config, options)
        keep_best = best_of_options(best_of, target.model, config, options)
        references = drafter.references(documents, prediction)
        extras = DecodeOptions(
            None, seed, 0, references, False, keep_best, share, top_logprobs, max_draft_tokens
        )

        begins: list[Callable[[], None]] = []

        def collect(
            input_ids: Tensor,
            processors: LogitsProcessorList,
            criteria: StoppingCriteriaList,
            config: GenerationConfig,
            model_inputs: dict[str, Any],
        ) -> list[DecodeRequest]:
            model: Any = target.model
            media = drafter.media_inputs(model_inputs)
            own = model.generation_config
            check_generation(config, processors, len(input_ids), model_inputs, own, bool(media))
            mask = model_inputs.get("attention_mask")
            if not media:
                prompts = strip_prompts(input_ids, mask, target.embedding_rows, target.max_positions)
                return make_requests(target, prompts, input_ids, processors, criteria, config, None, extras)
            # Ids that stand for images may lie outside of the embedding.
            prompts = strip_prompts(input_ids, mask, ID_LIMIT, None)
            made = make_requests(
                target, prompts, input_ids, processors, criteria, config, None, extras, media=True
            )
            begins.append(prompt_pass(target, made, input_ids, config, model_inputs, media))
            return made

        with target.media_lock if target.takes_media else nullcontext():
            requests = through_model(target, tokenizer, collect, ids, mask, config, options)
        share_when_finished(drafter.store, requests, share)
        drafter.use_prefixes(requests)
        return DecodeRequests(requests, references, begins[0] if begins else None)

    @contextmanager
    def running(self, failed: OnError | None = None) -> Iterator[Batch]:
        """An empty batch, for one thread. Calls of `generate` wait until it is left.

        Args:
            failed: Called with rows that raised, which have left the batch; None re-raises errors.
        """
        drafter, shared = self._drafter, DraftStats()
        supply = drafter.draft_engine
        with drafter.lock, outside_inference():
            drafter.kernels.prepare()
            with drafter.kernels.applied():
                supply.prepare()
                batch = Batch(drafter.target, supply.reader, shared, supply.budget, failed)
                try:
                    yield batch
                finally:
                    batch.close()
                    drafter.stats.add(shared)

    def open(self, prepared: DecodeRequests, stats: Sequence[DraftStats]) -> list[DraftSession | None]:
        """Opens the sources for prepared requests.

        Args:
            prepared: Requests about to join the batch of this drafter, or of one that this is a namespace of.
            stats: Counts to add to, one for each request.
        """
        return self._drafter.draft_engine.open(prepared.requests, prepared.references, stats)

    @property
    def opens_beside(self) -> bool:
        """True if `open` may run in parallel with the batch: no source runs a model then."""
        return not self._drafter.context.models

    @property
    def passes_whole(self) -> bool:
        """True if a prompt is to be passed at once: in parts the model reads it otherwise."""
        return self._drafter.target.passes_whole

    def keep_prefixes(self, seconds: float | None = None) -> None:
        """Copies texts that are to be kept, for about so many seconds; None copies all of them."""
        if self._drafter.prefix_cache is not None:
            self._drafter.prefix_cache.work(seconds)

    def plain_seconds(self, rows: int) -> float:
        """Measured seconds of a pass over one token of each row; 0 where nothing is measured."""
        return self._drafter.draft_engine.budget.plain_seconds(rows)
