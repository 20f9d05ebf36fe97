"""The object a user holds: a model together with what it drafts from."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from retrieval_draft.config import DraftConfig
from retrieval_draft.datastores import open_datastores
from retrieval_draft.engine.cpu_kernels import CpuKernels
from retrieval_draft.engine.decode import DecodeRequest, decode
from retrieval_draft.engine.draft_models import make_draft_sources
from retrieval_draft.engine.kv_cache import SpeculativeCache
from retrieval_draft.engine.noise import GumbelNoise
from retrieval_draft.engine.probe import probe
from retrieval_draft.engine.sampling import Sampler
from retrieval_draft.engine.stats import DraftStats
from retrieval_draft.engine.supply import DraftSupply
from retrieval_draft.engine.target import Target
from retrieval_draft.engine.threads import in_live_pool
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError
from retrieval_draft.generation import pad_replies, set_limits, streaming, take_stop_strings
from retrieval_draft.index.registry import Datastores
from retrieval_draft.index.source import TokenArray
from retrieval_draft.inputs import (
    check_generation,
    check_new_tokens,
    check_options,
    check_prompt,
    check_tokenizer,
    reference_tokens,
)
from retrieval_draft.methods.method import Parts
from retrieval_draft.methods.registry import get_method

__all__ = ["RetrievalDrafter"]


class RetrievalDrafter:
    """Generates with a model in fewer forward passes, by drafting from text seen before.

    What is generated does not depend on the drafts. One request runs at a time; calls from
    several threads wait for each other.

    Attributes:
        config: How drafts are made.
        stats: Counts and times of all requests so far.
        last_stats: Those of the last request; None before the first.
        kernels: Faster layers for few tokens on the CPU, which the model uses while the drafter decodes.

    Example:
        drafter = RetrievalDrafter.for_model(model, tokenizer)
        out = drafter.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=256)
    """

    def __init__(self, target: Target, tokenizer: Any, config: DraftConfig, supply: DraftSupply) -> None:
        self.config = config
        self.stats = DraftStats()
        self.last_stats: DraftStats | None = None
        self._target = target
        self._tokenizer = tokenizer
        self._supply = supply
        self.kernels = CpuKernels(target.model, config.cpu_kernels)
        self._lock = threading.RLock()
        _drafters.add(self)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        method: str = "calibrated",
        corpora: Sequence[Any] = (),
        phrases: Any = None,
        store: Any = None,
        draft_model: Any = None,
        config: DraftConfig | None = None,
    ) -> RetrievalDrafter:
        """Makes a drafter for `model`, after checking that the model can verify trees.

        Args:
            model: Any causal language model of transformers with full or sliding-window attention.
            tokenizer: Needed for text in `prediction`, `documents` and `stop_strings` only.
            method: A drafting method, or "none" for plain decoding through the same loop.
            corpora: Folders of ``retrieval-draft index build``, or opened ones, to draft from. They and the
                next need the tokenizer.
            phrases: Fixed texts the model often repeats: a file, or a list of texts.
            store: Not supported yet.
            draft_model: A model with the same tokenizer, a pair of another model and its tokenizer, "self"
                for the target with layers skipped, a draft source such as `HeadDraft`, or a list of those.
            config: Everything else that can be set.

        Raises:
            UnknownMethodError: No method of that name.
            UnsupportedModelError: The model's state cannot be rolled back, or it ignores masks.
            TokenizerMismatchError: The tokenizer belongs to another model, or a corpus to another tokenizer.
            DatastoreError: A corpus is missing or torn.
        """
        if store is not None:
            raise InvalidInputError("store is not supported yet.", "Leave it out.")
        if config is None:
            config = DraftConfig(method=method)
        elif method not in ("calibrated", config.method):
            config = replace(config, method=method)
        target = Target(model)
        if tokenizer is not None:
            check_tokenizer(tokenizer, model, target.embedding_rows)
        stores = open_datastores(tokenizer, target.embedding_rows, config, corpora, phrases)
        in_live_pool(lambda: probe(target))
        chosen = get_method(config.method)
        models = make_draft_sources(draft_model, target, tokenizer)
        if chosen.needs_model and not models:
            raise InvalidInputError(
                f"The method {chosen.name!r} drafts with a model, and there is none.", "Pass draft_model=."
            )
        # Kernels are compiled with a history in memory, lest the user's be written.
        spare = Parts(replace(config, history_folder=None), Datastores(vocabulary=16))
        supply = DraftSupply(
            target,
            config,
            chosen.sources(Parts(config, stores, models)),
            chosen.tree,
            chosen.nodes,
            lambda: [] if chosen.needs_model else chosen.sources(spare),
        )
        return cls(target, tokenizer, config, supply)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: Any = None,
        seed: int | None = None,
        prediction: Any = None,
        documents: Any = None,
        share: str | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Generates as ``model.generate`` does, with its keyword arguments and return types.

        Args:
            input_ids: int64, shape (batch, length). Rows are decoded one after the other.
            attention_mask: Zeros mark left padding.
            generation_config: As for ``model.generate``.
            streamer: Sees the prompt once, then each new token once and in order; batch 1 only.
            seed: For sampling. The same seed gives the same tokens with and without drafts.
                Without one it is drawn from torch's global generator.
            prediction: What the reply may look like: text or token ids.
            documents: Texts the reply may quote: text or token ids, or a list of those.
            share: What other servers may learn of this request: None or "none"; no store is supported yet.
            **generate_kwargs: As for ``model.generate``.

        Returns:
            int64, shape (batch, length + new), or GenerateDecoderOnlyOutput with
            ``return_dict_in_generate=True``.
        """
        if share not in (None, "none"):
            raise InvalidInputError(
                f"share={share!r} needs a store, which is not supported yet.", 'Leave it out, or pass "none".'
            )
        target = self._target
        model: Any = target.model
        check_prompt(input_ids, attention_mask, target.embedding_rows, target.max_positions)
        check_new_tokens(generation_config, generate_kwargs)
        check_options(generate_kwargs)
        references = [
            *reference_tokens(documents, self._tokenizer, target.embedding_rows),
            *reference_tokens(prediction, self._tokenizer, target.embedding_rows),
        ]
        generation_config = take_stop_strings(generation_config, generate_kwargs, self._tokenizer)

        def loop(
            model: PreTrainedModel,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: GenerationConfig,
            **model_inputs: Any,
        ) -> Any:
            return self._run(
                input_ids, logits_processor, stopping_criteria, generation_config, model_inputs,
                streamer, seed, references,
            )  # fmt: skip

        return in_live_pool(
            lambda: model.generate(
                input_ids,
                attention_mask=attention_mask,
                generation_config=generation_config,
                custom_generate=loop,
                **generate_kwargs,
            )
        )

    def custom_generate(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        draft_streamer: Any = None,
        draft_seed: int | None = None,
        **model_inputs: Any,
    ) -> Any:
        """A decoding loop for ``model.generate(..., custom_generate=drafter.custom_generate)``.

        transformers does not hand `streamer` to such a loop: pass it as ``draft_streamer``.
        """
        if model is not self._target.model:
            raise InvalidInputError(
                "This drafter was made for another model.", "Make one with RetrievalDrafter.for_model(model)."
            )
        return in_live_pool(
            lambda: self._run(
                input_ids, logits_processor, stopping_criteria, generation_config, model_inputs,
                draft_streamer, draft_seed, [],
            )
        )  # fmt: skip

    def warm_up(self) -> None:
        """Compiles and measures now what the first request would otherwise wait for."""
        in_live_pool(self._warm_up)

    def _warm_up(self) -> None:
        with self._lock, torch.no_grad():
            probe(self._target)
            self.kernels.prepare()
            with self.kernels.applied():
                self._supply.prepare()

    def flush(self) -> None:
        """Waits until what finished requests said can be drafted from; no request waits for that."""
        self._supply.flush()

    def close(self) -> None:
        """Keeps what is still to be written to the history's folder, and stops background threads."""
        self._supply.close()

    def __enter__(self) -> RetrievalDrafter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def reset_stats(self) -> None:
        """Sets all counts back to zero."""
        self.stats = DraftStats()
        self.last_stats = None

    def _run(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_inputs: dict[str, Any],
        streamer: Any,
        seed: int | None,
        references: list[TokenArray],
    ) -> Any:
        target = self._target
        check_generation(config, model_inputs)
        mask = model_inputs.get("attention_mask")
        prompts = check_prompt(input_ids, mask, target.embedding_rows, target.max_positions)
        keeps = (
            bool(config.return_dict_in_generate and config.output_scores),
            bool(config.return_dict_in_generate and config.output_logits),
        )
        if len(prompts) > 1 and (streamer is not None or any(keeps)):
            raise UnsupportedGenerationError(
                f"A streamer, output_scores and output_logits take one prompt; the batch has {len(prompts)}.",
                "Generate prompts one by one.",
            )
        if config.do_sample and seed is None:
            seed = int(torch.randint(0, 2**62, ()))
        replies, caches, samplers = [], [], []
        total = DraftStats()
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            stack.enter_context(torch.no_grad())
            emit = stack.enter_context(streaming(streamer, input_ids))
            self.kernels.prepare()
            stack.enter_context(self.kernels.applied())
            self._supply.prepare()
            self.last_stats = total
            for row, prompt in enumerate(prompts):
                sampler = None
                if config.do_sample or len(processors) or any(keeps):
                    noise = None if seed is None or not config.do_sample else self._noise(seed, row)
                    sampler = Sampler(processors, noise, *keeps)
                padded = input_ids[row : row + 1].long()
                request = DecodeRequest(prompt, 0, sampler=sampler, padded=padded, emit=emit)
                set_limits(request, criteria, config, input_ids.shape[1] - len(prompt))
                reply, cache = self._decode(request, references, total)
                replies.append(torch.from_numpy(reply.astype(np.int64)))
                caches.append(cache)
                samplers.append(sampler)
        sequences = pad_replies(input_ids, replies, config)
        if not config.return_dict_in_generate:
            return sequences
        sampler = samplers[0]
        fields: dict[str, Any] = {"sequences": sequences}
        if sampler is not None and sampler.scores is not None:
            fields["scores"] = tuple(sampler.scores)
        if sampler is not None and sampler.logits is not None:
            fields["logits"] = tuple(sampler.logits)
        if len(caches) == 1:
            fields["past_key_values"] = caches[0]
        return GenerateDecoderOnlyOutput(**fields)

    def _decode(
        self, request: DecodeRequest, references: list[TokenArray], total: DraftStats
    ) -> tuple[TokenArray, SpeculativeCache]:
        """Decodes one row with its own sessions of the sources, and counts it whatever happens."""
        stats, failures = DraftStats(), self._supply.failures
        drafting = self._supply.open(request, references, stats)
        try:
            text, cache = decode(self._target, request, self._supply.reader, stats, drafting)
        finally:
            if drafting is not None:
                drafting.close()
            stats.source_failures = self._supply.failures - failures
            total.add(stats)
            self.stats.add(stats)
        return text.reply.copy(), cache

    def _noise(self, seed: int, row: int) -> GumbelNoise:
        model: Any = self._target.model
        head = model.get_output_embeddings()
        width = self._target.vocabulary if head is None else int(head.weight.shape[0])
        return GumbelNoise(seed, width, self._target.device, sample=row)


_drafters: WeakSet[RetrievalDrafter] = WeakSet()


def _after_fork() -> None:
    """A lock that another thread held at the fork would stay locked in the child."""
    for drafter in _drafters:
        drafter._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
