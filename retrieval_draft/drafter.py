"""The drafter: a model together with its draft sources."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.open_stores import open_draft_stores
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine.cache.cache_rows import CacheRows, write_back
from retrieval_draft.engine.cache.chain_cache import ChainCache
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.cache.prefix_cache import PrefixCache
from retrieval_draft.engine.compat import given_cache, is_callers_own, output_cache_name
from retrieval_draft.engine.cpu.kernels import CpuKernels
from retrieval_draft.engine.decode import decode
from retrieval_draft.engine.draft_engine import DraftEngine
from retrieval_draft.engine.draft_models.choose import SELF, make_draft_sources
from retrieval_draft.engine.model_state import ModelState, check_modules, outside_inference
from retrieval_draft.engine.placeholders import ID_LIMIT
from retrieval_draft.engine.probe import find_target
from retrieval_draft.engine.prompt_inputs import NotVerifiable, pass_prompts
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.row import Row
from retrieval_draft.engine.target import Target
from retrieval_draft.engine.threads import end_own_threads, in_live_pool
from retrieval_draft.engine.verification import Verification
from retrieval_draft.engine.wrapped_models import unwrap
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError, UnsupportedModelError
from retrieval_draft.generation.checks import (
    arguments_of_generate,
    best_of_options,
    check_generation,
    check_prompt,
    check_tokenizer,
    further_inputs,
    reference_tokens,
    strip_prompts,
)
from retrieval_draft.generation.grammars import Grammars, take_grammar
from retrieval_draft.generation.hf_generate import through_model
from retrieval_draft.generation.output import best_rows, make_output
from retrieval_draft.generation.plain import generate_plainly, refuse_extras, sample_plainly
from retrieval_draft.generation.requests import DecodeOptions, Seeds, make_requests, share_when_finished
from retrieval_draft.generation.streaming import WithoutEnd, ending, shown_streamer, stream_rows
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.store.config import check_share
from retrieval_draft.index.store.store import SharedStore
from retrieval_draft.methods.make_draft_engine import make_draft_engine
from retrieval_draft.methods.method import MethodContext
from retrieval_draft.methods.registry import get_method
from retrieval_draft.saved_drafter import load_drafter, save_drafter
from retrieval_draft.serving import ContinuousDrafter

__all__ = ["RetrievalDrafter"]

_log = logging.getLogger("retrieval_draft")


class RetrievalDrafter:
    """Generates with a model in fewer forward passes, by drafting from text seen before.

    The output does not depend on the drafts. The rows of a batch are decoded together; calls
    from several threads wait for each other.

    Attributes:
        config: The drafting configuration.
        stats: Counts and times of all requests so far.
        last_stats: Those of the last request; None before the first.
        store: Store that servers share; None without one.
        kernels: Faster layers for few tokens on the CPU, which the model uses while the drafter decodes.
        target: The model as it is decoded with.
        tokenizer: The model's, or None.
        context: Configuration, datastores and draft models that the drafts are made from.
        draft_engine: Opens drafts for requests.
        lock: Held by the call that decodes.
        prefix_cache: Keys and values of earlier texts; None where none are kept.

    Example:
        drafter = RetrievalDrafter.for_model(model, tokenizer)
        out = drafter.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=256)
    """

    def __init__(
        self,
        target: Target,
        tokenizer: Any,
        context: MethodContext,
        draft_engine: DraftEngine,
        beside: RetrievalDrafter | None = None,
        tenant: str = "",
    ) -> None:
        """Use `for_model`.

        Args:
            target: The model.
            tokenizer: The model's, or None.
            context: Configuration, datastores and draft models.
            draft_engine: Made from `context`.
            beside: A drafter of the same model, with which this one takes turns.
            tenant: Keeps its texts apart from those of others beside it.
        """
        self.config = context.config
        self.store = context.stores.shared
        self.stats = DraftStats()
        self.last_stats: DraftStats | None = None
        self.target = target
        self.tokenizer = tokenizer
        self.draft_engine = draft_engine
        self.context = context
        self.kernels: CpuKernels
        self.lock: Any
        self.prefix_cache: PrefixCache | None
        if beside is None:
            # Captured passes hold what torch is told, which these kernels go around.
            enabled = context.config.cpu_kernels and target.graphs is None and target.width is None
            self.kernels, self.lock = CpuKernels(target.model, enabled), threading.RLock()
            limit = context.config.prefix_cache_bytes
            self.prefix_cache = PrefixCache(target, limit) if limit else None
        else:
            self.kernels, self.lock = beside.kernels, beside.lock
            self.prefix_cache = beside.prefix_cache
        self._tenant, self._owns_prefixes = tenant, beside is None
        self._state = ModelState.of(target.model)
        self._has_warned = False
        self._plain_reasons: set[str] = set()
        _drafters.add(self)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        method: str | None = None,
        corpora: Sequence[Any] = (),
        phrases: Any = None,
        store: Any = None,
        draft_model: Any = None,
        config: DraftConfig | None = None,
        strict: bool = False,
    ) -> RetrievalDrafter:
        """Makes a drafter for `model`, after trying on the model in which way it can verify drafts.

        Trees where it takes their masks, else chains where several tokens at once are as one after another;
        else the text is that of ``model.generate``, and a warning names the reason, as `verification` does.

        Args:
            model: Any model of transformers that generates text.
            tokenizer: Needed for text in `prediction`, `documents` and `stop_strings` only.
            method: A drafting method, or "none" for plain decoding through the same loop; None for that of
                `config`, "calibrated" without one.
            corpora: Folders of ``retrieval-draft index build``, or opened ones, to draft from. They and the
                next need the tokenizer.
            phrases: Fixed texts that the model often repeats: a file, or a list of texts.
            store: Store that servers share, with the same tokenizer: a URL such as ``redis://host:6379`` or
                ``embedded://FOLDER``, a `StoreConfig`, or an opened `SharedStore`, which the caller closes.
            draft_model: A model with the same tokenizer, a pair of another model and its tokenizer, "self"
                for the target with layers skipped, "self:3,5" for these ones, "self:window" for all layers
                after a text's first and last 512 tokens alone, "int8" for a copy of it with rounded weights,
                "mtp" for its layers for multi-token prediction, the folder or hub name of a
                trained head or of a model, a draft source such as `HeadDraft`, or a list of those.
            config: All other settings.
            strict: Whether a model that nothing can be drafted for is refused.

        Raises:
            UnknownMethodError: No method of that name.
            InvalidInputError: `config` names another method than `method`.
            UnsupportedModelError: The model generates no text, or `strict` is set and nothing can be drafted.
            TokenizerMismatchError: The tokenizer belongs to another model, or a corpus to another tokenizer.
            DatastoreError: A corpus is missing or torn.
        """
        if config is None:
            config = DraftConfig(method="calibrated" if method is None else method)
        elif method not in (None, config.method):
            raise InvalidInputError(
                f"method is {method!r}, config.method {config.method!r}.",
                f"Leave one of them out, or pass config=DraftConfig(method={method!r}, ...).",
            )
        with outside_inference():
            check_modules(unwrap(model))
            target = in_live_pool(lambda: find_target(model, strict, config.graphs, config.exact))
            if tokenizer is not None:
                check_tokenizer(tokenizer, model, target.embedding_rows)
            stores = open_draft_stores(tokenizer, target.embedding_rows, config, corpora, phrases, store)
            if draft_model is None and config.method == SELF:
                draft_model = SELF
            models = make_draft_sources(draft_model, target, tokenizer, config.draft_beside)
            parts = MethodContext(config, stores, models)
            drafter = cls(target, tokenizer, parts, make_draft_engine(target, parts))
        if target.verification.way == "plain":
            _log.warning(
                "Nothing is drafted for %s, whose text is that of its own generate: %s",
                type(target.model).__name__,
                target.verification.reason,
            )
        return drafter

    @property
    def verification(self) -> Verification:
        """The way in which drafts are verified, "tree", "chain" or "plain", and the reason."""
        return self.target.verification

    def namespace(self, tenant: str, history_bytes: int) -> RetrievalDrafter:
        """A drafter over the same model that shares corpora and measurements, but no learned state.

        Args:
            tenant: Names its part of the store and of the history's folder.
            history_bytes: Limit of its history's memory.
        """
        config, stores = self.context.config, self.context.stores
        folder = config.history_folder
        config = replace(
            config,
            history_bytes=history_bytes,
            history_folder=None if folder is None else str(Path(folder, f"tenant-{tenant}")),
        )
        store = self.store
        if store is not None:
            store = SharedStore(replace(store.config, tenant=tenant), store.fingerprint, store.vocabulary)
        stores = replace(stores, shared=store, owns_shared=True)
        parts = replace(self.context, config=config, stores=stores)
        supply = make_draft_engine(self.target, parts)
        other = RetrievalDrafter(self.target, self.tokenizer, parts, supply, beside=self, tenant=tenant)
        supply.prepare_like(self.draft_engine)
        return other

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | GenerationConfig | None = None,
        generation_config: GenerationConfig | LogitsProcessorList | None = None,
        /,
        *more: Any,
        streamer: Any = None,
        seed: Seeds = None,
        sample: int = 0,
        prediction: Any = None,
        documents: Any = None,
        share: str | None = None,
        best_of: int | None = None,
        output_prompt_logits: bool = False,
        grammar: Grammars = None,
        max_draft_tokens: int | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Generates as ``model.generate`` does, with its keyword arguments and return types.

        Args:
            input_ids: int64, shape (batch, length). Rows are decoded together, each with its own drafts. It
                may be named ``inputs``; without one a model with a bos token begins with that.
            attention_mask: Zeros mark left padding.
            generation_config: As for ``model.generate``. It may be second, and the next argument of
                ``model.generate`` third.
            *more: Positional arguments of ``model.generate`` after ``logits_processor``.
            streamer: Receives the prompts once, then the new tokens once and in order, one for each row.
            seed: For sampling; one for all prompts, or a list of one for each. The same seed gives a prompt
                the same tokens with and without drafts, alone and in a batch; equal prompts of a batch and
                ``num_return_sequences`` draw different ones. Without one, seeds are drawn from torch's global
                generator.
            sample: Sample index of the first one among those of its prompt and seed, to draw further ones
                later.
            prediction: Expected reply: text or token ids.
            documents: Texts that the reply may quote: text or token ids, or a list of those.
            share: Parts of this request that other servers may learn, once it is finished: "none", "reply" or
                "all"; None for the store's default. Needs a store, unless it is "none".
            best_of: Samples to draw for each prompt, of which the ``num_return_sequences`` with the highest
                mean log probability are returned, the best first.
            output_prompt_logits: Whether ``prompt_logits`` is returned, with ``return_dict_in_generate``.
            grammar: A `Grammar` that the replies follow, or one for each prompt. Needs the tokenizer.
            max_draft_tokens: Draft tokens in one step of a row at most; 0 switches drafting off, None leaves
                it to the measured cost. The text stays the same.
            cache: Holds the beginning of `input_ids`: from an earlier call, or a ``DynamicCache``. One of
                ours is continued in place, and cropped to the common beginning with the text.
            past_key_values: The name of `cache` before transformers 5.24; either works with any version.
            **generate_kwargs: As for ``model.generate``.

        Returns:
            int64, shape (batch, length + new), or a GenerateDecoderOnlyOutput with
            ``return_dict_in_generate=True``; its ``cache`` (before transformers 5.24 ``past_key_values``) can
            be passed again.
        """
        options = {"streamer": streamer, **generate_kwargs}
        with ExitStack() as stack:
            if streamer is not None:
                stack.enter_context(ending(streamer))
            given = (input_ids, attention_mask, generation_config, *more)
            ids, mask, config = arguments_of_generate(given, options)
            shown = options.pop("streamer")
            if shown is not streamer:
                stack.enter_context(ending(shown))
            self.check_model()
            take_grammar(self.target.model, self.tokenizer, grammar, ids, config, options)
            if self.verification.way == "plain":
                refuse_extras(sample=sample, best_of=best_of, output_prompt_logits=output_prompt_logits)
                self.check_share(share)
                options |= {"streamer": shown, "attention_mask": mask, "generation_config": config}
                options |= {output_cache_name(): cache if cache is not None else past_key_values}
                return self._plain(lambda: generate_plainly(self.target.model, ids, seed, options))
            keep_best = best_of_options(best_of, self.target.model, config, options)
            references = self.references(documents, prediction)
            extras = DecodeOptions(
                shown, seed, sample, references, output_prompt_logits, keep_best, share,
                max_draft_tokens=max_draft_tokens,
            )  # fmt: skip
            self.check_share(share)
            known = cache if cache is not None else past_key_values
            if self.target.takes_media and isinstance(known, DynamicCache) and known.get_seq_length():
                options[output_cache_name()] = known  # the model alone knows the positions of further text

            def run(
                input_ids: Tensor,
                processors: LogitsProcessorList,
                criteria: StoppingCriteriaList,
                config: GenerationConfig,
                model_inputs: dict[str, Any],
            ) -> Any:
                media = self.media_inputs(model_inputs)
                rows = len(input_ids)
                check_generation(config, processors, rows, model_inputs, self._own_config, bool(media))
                return self._run(input_ids, processors, criteria, config, model_inputs, known, extras, media)

            return through_model(self.target, self.tokenizer, run, ids, mask, config, options)

    def _plain(self, generate: Callable[[], tuple[Any, DraftStats]]) -> Any:
        """The output of the model's own loop, which is counted."""
        with self.lock:
            out, self.last_stats = in_live_pool(generate)
            self.stats.add(self.last_stats)
        return out

    @property
    def _own_config(self) -> GenerationConfig:
        model: Any = self.target.model
        config: GenerationConfig = model.generation_config
        return config

    def custom_generate(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Any = None,
        draft_streamer: Any = None,
        draft_seed: Seeds = None,
        draft_share: str | None = None,
        draft_prediction: Any = None,
        draft_documents: Any = None,
        draft_max_tokens: int | None = None,
        **model_inputs: Any,
    ) -> Any:
        """A decoding loop: ``model.generate(..., custom_generate=drafter)``, as method or drafter itself.

        Arguments that begin with ``draft_`` can be given to ``model.generate`` and have the meaning of those
        of `generate`; `draft_max_tokens` has that of `max_draft_tokens`. The caller's `streamer` is found
        although transformers passes it to no such loop.
        `input_ids` is int64, shape (batch, length).
        """
        if draft_streamer is None:
            draft_streamer = shown_streamer(streamer)
        with ending(draft_streamer):
            if model is not self.target.model:
                raise InvalidInputError(
                    "This drafter was made for another model.",
                    "Make one with RetrievalDrafter.for_model(model).",
                )
            self.check_model()
            if self.verification.way == "plain":
                self.check_share(draft_share)
                options = {**model_inputs, "streamer": draft_streamer}
                parts = (input_ids, logits_processor, stopping_criteria, generation_config)
                return self._plain(lambda: sample_plainly(self.target.model, *parts, draft_seed, options))
            check_prompt(input_ids, model_inputs.get("attention_mask"))
            media = self.media_inputs(model_inputs)
            check_generation(
                generation_config,
                logits_processor,
                len(input_ids),
                model_inputs,
                self._own_config,
                bool(media),
            )
            self.check_share(draft_share)
            references = self.references(draft_documents, draft_prediction)
            extras = DecodeOptions(
                draft_streamer, draft_seed, references=references, share=draft_share,
                max_draft_tokens=draft_max_tokens,
            )  # fmt: skip
            cache = given_cache(model_inputs)
            if isinstance(cache, DynamicCache) and not is_callers_own(cache):
                cache = None
            return in_live_pool(
                lambda: self._run(
                    input_ids,
                    logits_processor,
                    stopping_criteria,
                    generation_config,
                    model_inputs,
                    cache,
                    extras,
                    media,
                )
            )

    __call__ = custom_generate

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes configuration, phrases, calibration, measured costs, and paths of corpora and store.

        Not written: passwords, keys, draft models, and the history, which has a folder of its own.
        """
        save_drafter(self, folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, model: PreTrainedModel, tokenizer: Any = None, **options: Any
    ) -> RetrievalDrafter:
        """Makes a drafter from a folder of `save_pretrained`.

        Args:
            folder: The folder.
            model: The model, or another one with the same tokenizer.
            tokenizer: The same one; needed if the drafter had one.
            **options: `corpora`, `phrases`, `store`, `draft_model`, `config`: instead of the saved ones.

        Raises:
            DatastoreError: A file is missing, torn, foreign or of a newer format.
            TokenizerMismatchError: The drafter was saved with another tokenizer.
            InvalidInputError: An unknown option.
        """
        return load_drafter(cls, folder, model, tokenizer, options)

    @property
    def nbytes_by_source(self) -> dict[str, int]:
        """Bytes that each source holds, by its name; running requests not included."""
        return {source.name: source.nbytes for source in self.draft_engine.sources}

    @property
    def continuous(self) -> ContinuousDrafter:
        """Continuous batching with this drafter, for servers.

        Raises:
            UnsupportedModelError: Nothing is drafted for the model.
        """
        if self.verification.way == "plain":
            raise UnsupportedModelError(
                f"{type(self.target.model).__name__} cannot be decoded in a running batch: "
                f"{self.verification.reason}",
                "Use drafter.generate or model.generate for this model.",
            )
        return ContinuousDrafter(self)

    def warm_up(self) -> None:
        """Compiles kernels, measures costs and reads the store ahead of the first request."""
        in_live_pool(self._warm_up)
        if self.store is not None:
            self.store.wait_ready()

    def _warm_up(self) -> None:
        with self.lock, outside_inference():
            self.check_model()
            if self.verification.way != "plain":
                self.kernels.prepare()
                with self.kernels.applied():
                    self.draft_engine.prepare()

    def flush(self) -> None:
        """Waits until finished requests' texts can be drafted from; no request waits for that."""
        self.draft_engine.flush()
        if self.store is not None:
            self.store.flush()

    def close(self) -> None:
        """Saves and sends texts that wait for history and store, and stops background threads.

        Keys and values of earlier texts are forgotten, unless this is a namespace: then others share them.
        """
        self.draft_engine.close()
        end_own_threads()
        # A batch that still runs on another thread uses them.
        if self.prefix_cache is not None and self._owns_prefixes and self.lock.acquire(blocking=False):
            try:
                self.prefix_cache.clear()
            finally:
                self.lock.release()
        if self.store is not None and self.context.stores.owns_shared:
            self.store.close()

    def __enter__(self) -> RetrievalDrafter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> RetrievalDrafter:
        """A drafter for the copy of a model whose ``generate`` is this one's; it is made at its first use.

        It shares corpora, phrases and store, and starts with an empty history and without draft models.

        Raises:
            InvalidInputError: No copy of the model is being made.
        """
        model = memo.get(id(self.target.model))
        if model is None:
            raise InvalidInputError("A drafter cannot be copied or pickled.", _NO_COPY)
        copied = object.__new__(type(self))
        # The model's copy is not complete yet.
        copied.__dict__["_make"] = partial(_drafter_like, self, model)
        return copied

    def __getattr__(self, name: str) -> Any:
        with _making:
            make = self.__dict__.get("_make")
            if make is not None and not name.startswith("__"):
                self.__dict__.update(make().__dict__)
                del self.__dict__["_make"]
                _drafters.add(self)
        if name not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.__dict__[name]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvalidInputError("A drafter cannot be copied or pickled.", _NO_COPY)

    def reset_stats(self) -> None:
        """Sets all counts back to zero."""
        self.stats = DraftStats()
        self.last_stats = None

    def check_model(self) -> None:
        """Refuses a model that has changed since `for_model` in a way that cannot be followed.

        Raises:
            UnsupportedModelError: It was changed so; the message names the cause.
        """
        self._state.check(self.target.model, self.verification.way == "tree")
        check_modules(self.target.model)

    def references(self, documents: Any, prediction: Any) -> list[TokenArray]:
        """Token ids of reference texts: int32 each. A method without a use for them warns, once.

        Args:
            documents: Texts or token ids that the reply may quote, one or several; None for none.
            prediction: The same for the expected reply.

        Raises:
            InvalidInputError: An id lies outside the vocabulary, or a text comes without a tokenizer.
        """
        rows = self.target.embedding_rows
        references = [
            *reference_tokens(documents, self.tokenizer, rows),
            *reference_tokens(prediction, self.tokenizer, rows),
        ]
        config = self.context.config
        if references and not self._has_warned and not get_method(config.method).reads_references(config):
            self._has_warned = True
            _log.warning(
                "The method %r has no use for prediction and documents: it drafts from no text of a request.",
                config.method,
            )
        return references

    def use_prefixes(self, requests: Sequence[DecodeRequest], salt: str = "", finds: bool = True) -> None:
        """Has requests continue earlier texts with the same beginning and salt, and their texts kept.

        Args:
            requests: Requests of this drafter's tenant, which is set for them.
            salt: Sets their texts apart from the others.
            finds: False where they have no beginning in common with others, as with images.
        """
        for request in requests:
            request.owner = (self._tenant, salt)
            if finds and self.prefix_cache is not None:
                request.prefixes = partial(self.prefix_cache.prefixes, self._tenant, salt)

    def check_share(self, share: str | None) -> None:
        """Refuses a word that is no way to share, and sharing without a store.

        Raises:
            InvalidInputError: As above.
        """
        if share is not None and check_share(share) != "none" and self.store is None:
            raise InvalidInputError(f"share={share!r} needs a store.", "Pass store= to for_model.")

    def _run(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        model_inputs: dict[str, Any],
        cache: Any,
        extras: DecodeOptions,
        media: frozenset[str],
    ) -> Any:
        target = self.target
        mask = model_inputs.get("attention_mask")
        # Ids that stand for images may lie outside of the embedding, and take fewer positions than tokens.
        limits = (ID_LIMIT, None) if media else (target.embedding_rows, target.max_positions)
        prompts = strip_prompts(input_ids, mask, *limits)
        if media and isinstance(cache, (SpeculativeCache, ChainCache, CacheRows)):
            raise UnsupportedGenerationError(
                f"A cache of an earlier call is not supported beside {', '.join(sorted(media))}.",
                "Leave it out and pass the whole conversation with its images; text alone may follow.",
            )
        total = DraftStats()
        with ExitStack() as stack:
            stack.enter_context(self.lock)
            stack.enter_context(outside_inference())
            stream = stream_rows(extras.streamer, input_ids, config)
            self.last_stats = total
            requests = make_requests(
                target,
                prompts,
                input_ids,
                processors,
                criteria,
                config,
                None if media else cache,
                extras,
                stream,
                media=bool(media),
            )
            self.use_prefixes(requests, finds=not media and cache is None)
            if media:
                kind = (media, min(map(len, prompts)) < input_ids.shape[1], len(prompts) > 1)
                try:
                    total.prefill_seconds += pass_prompts(
                        target, requests, input_ids, config, model_inputs, kind
                    )
                except NotVerifiable as reason:
                    self._warn_plain(str(reason))
                    refuse_extras(best_of=extras.best_of, output_prompt_logits=extras.keep_prompt_logits)
                    shown = None if extras.streamer is None else WithoutEnd(extras.streamer)
                    parts = (input_ids, processors, criteria, config)
                    further = {**model_inputs, "streamer": shown}
                    return self._plain(lambda: sample_plainly(target.model, *parts, extras.seeds, further))
            self.kernels.prepare()
            stack.enter_context(self.kernels.applied())
            self.draft_engine.prepare()
            share_when_finished(self.store, requests, extras.share)
            rows = self._decode(requests, extras, total)
        if isinstance(cache, DynamicCache) and len(rows) == 1:
            write_back(rows[0].cache, cache, input_ids.shape[1] - len(prompts[0]))
        if extras.best_of is not None:
            kept = best_rows(rows, config.num_return_sequences or 1, extras.best_of)
            rows, input_ids = [rows[row] for row in kept], input_ids[kept]
        return make_output(rows, input_ids, config)

    def media_inputs(self, model_inputs: dict[str, Any]) -> frozenset[str]:
        """Names of inputs for which the model passes the prompt itself: those of images, or its own cache.

        Called inside of `model.generate`, whose caller's arguments are looked up.

        Args:
            model_inputs: As prepared by model.generate.
        """
        if not self.target.takes_media:
            return frozenset()
        found = set(further_inputs(model_inputs))
        cache = given_cache(model_inputs)
        if isinstance(cache, DynamicCache) and cache.get_seq_length():
            found.add("cache")
        return frozenset(found) if found - {"position_ids"} else frozenset()

    def _warn_plain(self, reason: str) -> None:
        """Warns once for each reason that a call is decoded without drafts."""
        if reason not in self._plain_reasons:
            self._plain_reasons.add(reason)
            _log.warning(
                "%s generates in its own loop, without drafts, for prompts like this one: %s.",
                type(self.target.model).__name__,
                reason,
            )

    def _decode(self, requests: list[DecodeRequest], extras: DecodeOptions, total: DraftStats) -> list[Row]:
        """Decodes a batch with sessions of the sources for each row, and counts it even after an error."""
        shared, failures = DraftStats(), self.draft_engine.failures
        each = [DraftStats() for _ in requests]
        try:
            return decode(
                self.target,
                requests,
                self.draft_engine.reader,
                shared,
                self.draft_engine.open(requests, extras.references, each),
                self.draft_engine.budget,
                each,
            )
        finally:
            if self.prefix_cache is not None:
                self.prefix_cache.work()  # before a caller can change the caches
            shared.source_failures = self.draft_engine.failures - failures
            for stats in (shared, *each):
                total.add(stats)
            self.stats.add(total)


_NO_COPY = (
    "Make one with for_model for each model, or keep it with save_pretrained. A model whose generate is a "
    "drafter's is pickled after: del model.generate."
)


def _drafter_like(drafter: RetrievalDrafter, model: Any) -> RetrievalDrafter:
    """A drafter for another model with the same tokenizer, which shares read-only data."""
    parts = drafter.context
    config = replace(parts.config, history_folder=None)
    if parts.models and get_method(config.method).needs_model:
        config = replace(config, method="calibrated")
    return RetrievalDrafter.for_model(
        model,
        drafter.tokenizer,
        corpora=parts.stores.corpora,
        phrases=parts.stores.phrases,
        store=drafter.store,
        config=config,
    )


_drafters: WeakSet[RetrievalDrafter] = WeakSet()
_making = threading.RLock()


def _after_fork() -> None:
    """Renews locks in a forked child: one that another thread held would stay locked."""
    locks: dict[int, Any] = {}  # drafters of one model take turns in the child too
    for drafter in _drafters:
        drafter.lock = locks.setdefault(id(drafter.lock), threading.RLock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
