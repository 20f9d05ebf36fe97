"""The object a user holds: a model together with what it drafts from."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from retrieval_draft.config import DraftConfig
from retrieval_draft.engine.decode import DecodeRequest, decode
from retrieval_draft.engine.drafting import Drafting
from retrieval_draft.engine.guard import GuardedSource
from retrieval_draft.engine.head_cost import HeadCost
from retrieval_draft.engine.logits import LogitReader
from retrieval_draft.engine.noise import GumbelNoise
from retrieval_draft.engine.probe import probe
from retrieval_draft.engine.sampling import Sampler
from retrieval_draft.engine.stats import DraftStats
from retrieval_draft.engine.target import Target
from retrieval_draft.engine.tree import DraftTree
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError
from retrieval_draft.index.locality import Locality
from retrieval_draft.index.source import DraftSource, TokenArray
from retrieval_draft.inputs import (
    check_generation,
    check_new_tokens,
    check_prompt,
    check_tokenizer,
    reference_tokens,
)

__all__ = ["RetrievalDrafter"]

_MEASURE_CONTEXT = 128


class RetrievalDrafter:
    """Generates with a model in fewer forward passes, by drafting from text seen before.

    What is generated does not depend on the drafts. One request runs at a time; calls from
    several threads wait for each other.

    Attributes:
        config: How drafts are made.
        stats: Counts and times of all requests so far.
        last_stats: Those of the last request; None before the first.

    Example:
        drafter = RetrievalDrafter.for_model(model, tokenizer)
        out = drafter.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=256)
    """

    def __init__(
        self, target: Target, tokenizer: Any, config: DraftConfig, sources: Sequence[DraftSource]
    ) -> None:
        self.config = config
        self.stats = DraftStats()
        self.last_stats: DraftStats | None = None
        self._target = target
        self._tokenizer = tokenizer
        self._sources = [GuardedSource(source) for source in sources]
        self._locality = Locality(self._sources)
        self._reader = LogitReader(config.top_k if sources else 0)
        self._fuse: Any = None
        self._calibration: Any = None
        self._cost: Any = None
        self._head: HeadCost | None = None
        self._lock = threading.RLock()

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
            corpora: Not supported yet.
            phrases: Not supported yet.
            store: Not supported yet.
            draft_model: Not supported yet.
            config: Everything else that can be set.

        Raises:
            UnknownMethodError: No method of that name.
            UnsupportedModelError: The model's state cannot be rolled back, or it ignores masks.
            TokenizerMismatchError: The tokenizer belongs to another model.
        """
        for name, value in (
            ("corpora", corpora), ("phrases", phrases), ("store", store), ("draft_model", draft_model),
        ):  # fmt: skip
            if value is not None and not (isinstance(value, Sequence) and len(value) == 0):
                raise InvalidInputError(f"{name} is not supported yet.", "Leave it out.")
        if config is None:
            config = DraftConfig(method=method)
        elif method not in ("calibrated", config.method):
            config = replace(config, method=method)
        target = Target(model)
        if tokenizer is not None:
            check_tokenizer(tokenizer, model, target.embedding_rows)
        probe(target)
        return cls(target, tokenizer, config, [] if config.method == "none" else _sources(config))

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
        share: bool | None = None,
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
            share: Whether other servers may learn from this request; no store is supported yet.
            **generate_kwargs: As for ``model.generate``.

        Returns:
            int64, shape (batch, length + new), or GenerateDecoderOnlyOutput with
            ``return_dict_in_generate=True``.
        """
        if share:
            raise InvalidInputError("share=True needs a store, which is not supported yet.", "Leave it out.")
        target = self._target
        check_prompt(input_ids, attention_mask, target.embedding_rows, target.max_positions)
        check_new_tokens(generation_config, generate_kwargs)
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if generate_kwargs.get(name) is not None:
                raise UnsupportedGenerationError(
                    f"{name} cannot be combined with drafted decoding.", "Leave it out: the drafter makes the drafts."
                )
        for name in ("inputs_embeds", "past_key_values"):
            if generate_kwargs.get(name) is not None:
                raise UnsupportedGenerationError(
                    f"{name} is not supported by drafted decoding.", "Pass the whole text as input_ids instead."
                )
        references = [
            *reference_tokens(documents, self._tokenizer, target.embedding_rows),
            *reference_tokens(prediction, self._tokenizer, target.embedding_rows),
        ]
        generation_config = self._stop_strings(generation_config, generate_kwargs)

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

        return target.model.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=generation_config,
            custom_generate=loop,
            **generate_kwargs,
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
        return self._run(
            input_ids, logits_processor, stopping_criteria, generation_config, model_inputs,
            draft_streamer, draft_seed, [],
        )  # fmt: skip

    def warm_up(self) -> None:
        """Compiles and measures now what the first request would otherwise wait for."""
        with self._lock, torch.no_grad():
            probe(self._target)
            self._prepare()

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
        prompts = check_prompt(
            input_ids, model_inputs.get("attention_mask"), target.embedding_rows, target.max_positions
        )
        full = config.return_dict_in_generate
        if len(prompts) > 1:
            if streamer is not None:
                raise UnsupportedGenerationError(
                    f"A streamer takes one prompt, the batch has {len(prompts)}.", "Stream prompts one by one."
                )
            if full and (config.output_scores or config.output_logits):
                raise UnsupportedGenerationError(
                    f"output_scores and output_logits take one prompt, the batch has {len(prompts)}.",
                    "Generate prompts one by one.",
                )
        if config.do_sample and seed is None:
            seed = int(torch.randint(0, 2**62, ()))
        replies, caches, samplers = [], [], []
        with self._lock, torch.no_grad(), _streaming(streamer, input_ids) as emit:
            self._prepare()
            total = DraftStats()
            for row, prompt in enumerate(prompts):
                sampler = None
                keep = (bool(full and config.output_scores), bool(full and config.output_logits))
                if config.do_sample or len(processors) or any(keep):
                    noise = None
                    if config.do_sample:
                        assert seed is not None
                        noise = GumbelNoise(seed, self._noise_width(), target.device, sample=row)
                    sampler = Sampler(processors, noise, *keep)
                request = DecodeRequest(prompt, 0, sampler=sampler, padded=input_ids[row : row + 1].long(), emit=emit)
                _limits(request, criteria, config, input_ids.shape[1] - len(prompt))
                stats = DraftStats()
                try:
                    reply, cache = self._decode(request, references, stats)
                finally:
                    total.add(stats)
                    self.stats.add(stats)
                    self.last_stats = total
                replies.append(torch.from_numpy(reply.astype(np.int64)))
                caches.append(cache)
                samplers.append(sampler)
        sequences = _pad(input_ids, replies, config)
        if not full:
            return sequences
        only = samplers[0] if len(samplers) == 1 else None
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=None if only is None or only.scores is None else tuple(only.scores),
            logits=None if only is None or only.logits is None else tuple(only.logits),
            past_key_values=caches[0] if len(caches) == 1 else None,
        )

    def _decode(
        self, request: DecodeRequest, references: list[TokenArray], stats: DraftStats
    ) -> tuple[TokenArray, Any]:
        """Decodes one row with its own sessions of the sources."""
        drafting = self._open(request, references, stats)
        failures = sum(source.failures for source in self._sources)
        try:
            text, cache = decode(self._target, request, self._reader, stats, drafting)
        finally:
            if drafting is not None:
                drafting.close()
            stats.source_failures += sum(source.failures for source in self._sources) - failures
        return text.reply.copy(), cache

    def _open(
        self, request: DecodeRequest, references: list[TokenArray], stats: DraftStats
    ) -> Drafting | None:
        if not self._drafts:
            return None
        new = request.max_length - len(request.prompt)
        if self.config.prefill_logits is True:
            request.prompt_rows = len(request.prompt)
        elif self.config.prefill_logits == "auto" and self._head is not None:
            request.prompt_rows = self._head.rows_worth(new, len(request.prompt))
        fixed = self.config.nodes
        return Drafting(
            self._locality.open(request.prompt, references),
            self._fuse,
            self._calibration,
            self._cost if fixed is None else None,
            self.config.max_nodes if fixed is None else fixed,
            self._target.vocabulary,
            stats,
        )

    @property
    def _drafts(self) -> bool:
        nodes = self.config.max_nodes if self.config.nodes is None else self.config.nodes
        return bool(self._sources) and nodes > 0

    def _prepare(self) -> None:
        """Makes calibration and cost model on the first request that needs them."""
        if not self._drafts or self._calibration is not None:
            return
        from retrieval_draft.engine.calibration import Calibration
        from retrieval_draft.engine.fusion import fuse

        if self.config.prefill_logits == "auto":
            self._head = HeadCost.measure(self._target)
        if self.config.nodes is None:
            from retrieval_draft.engine.cost import CostModel

            forward = self._scratch_forward()
            self._cost = CostModel.measure(forward, self._target.device)
        self._fuse, self._calibration = fuse, Calibration()

    def _scratch_forward(self) -> Callable[[int], None]:
        """Passes over n nodes behind a short text, which leave nothing behind."""
        target = self._target
        length = _MEASURE_CONTEXT
        if target.max_positions is not None:
            length = max(1, min(length, target.max_positions - 2))
        rng = np.random.default_rng(0)
        ids = torch.from_numpy(rng.integers(0, target.vocabulary, length)).to(target.device)
        cache = target.cache(length + 128)
        for _ in target.prefill(cache, ids, 1):
            pass

        @torch.no_grad()
        def forward(nodes: int) -> None:
            tree = DraftTree(
                tokens=rng.integers(0, target.vocabulary, nodes).astype(np.int32),
                parents=np.array([-1] + [0] * (nodes - 1), np.int32),
                depths=np.array([0] + [1] * (nodes - 1), np.int32),
                probs=np.ones(nodes, np.float32),
                path_probs=np.ones(nodes, np.float32),
                sources=np.zeros(nodes, np.int64),
            )
            target.verify_tree(cache, tree, length)
            cache.drop()
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)

        return forward

    def _noise_width(self) -> int:
        head = self._target.model.get_output_embeddings()
        return int(head.weight.shape[0]) if head is not None else self._target.vocabulary

    def _stop_strings(
        self, config: GenerationConfig | None, options: dict[str, Any]
    ) -> GenerationConfig | None:
        """Makes the criterion for stop strings, since transformers loses the tokenizer on the way."""
        strings = options.pop("stop_strings", None)
        if strings is None and config is not None and config.stop_strings is not None:
            strings = config.stop_strings
            config = GenerationConfig(**{**config.to_dict(), "stop_strings": None})
        tokenizer = options.pop("tokenizer", None) or self._tokenizer
        if strings is None:
            return config
        if tokenizer is None:
            raise InvalidInputError("stop_strings need a tokenizer.", "Pass tokenizer= to for_model.")
        criterion = StopStringCriteria(tokenizer, strings)
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), criterion])
        return config


def _sources(config: DraftConfig) -> list[DraftSource]:
    made: list[DraftSource] = []
    for name in config.sources:
        if name == "automaton":
            from retrieval_draft.index.suffix_automaton import AutomatonSource

            made.append(AutomatonSource())
        elif name == "adjacency":
            from retrieval_draft.index.adjacency import AdjacencySource

            made.append(AdjacencySource(rows=config.adjacency_rows, top_k=config.top_k))
    return made


def _limits(
    request: DecodeRequest, criteria: StoppingCriteriaList, config: GenerationConfig, padding: int
) -> None:
    """Turns length and eos criteria into numbers, and leaves the others to be called."""
    lengths, eos, others = [], set(), []
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length - padding)
        elif type(criterion) is EosTokenCriteria:
            eos.update(criterion.eos_token_id.flatten().tolist())
        else:
            others.append(criterion)
    request.max_length = min(lengths) if lengths else int(config.max_length) - padding
    request.eos = frozenset(int(token) for token in eos)
    request.criteria = StoppingCriteriaList(others)
    request.prefill_chunk = config.prefill_chunk_size


def _pad(input_ids: Tensor, replies: list[Tensor], config: GenerationConfig) -> Tensor:
    """Prompts with their replies, right-padded to one length."""
    longest = max(len(reply) for reply in replies)
    out = input_ids.new_zeros((len(replies), input_ids.shape[1] + longest))
    out[:, : input_ids.shape[1]] = input_ids
    pad = getattr(config, "_pad_token_tensor", None)
    for row, reply in enumerate(replies):
        end = input_ids.shape[1] + len(reply)
        out[row, input_ids.shape[1] : end] = reply.to(out.device)
        if end < out.shape[1] and pad is not None:
            out[row, end:] = pad.to(out.device)
    return out


@contextlib.contextmanager
def _streaming(streamer: Any, input_ids: Tensor) -> Iterator[Callable[[int], None] | None]:
    """Hands the prompt to the streamer, yields what takes its tokens, and ends it in any case."""
    if streamer is None:
        yield None
        return
    try:
        streamer.put(input_ids.cpu())
        yield lambda token: streamer.put(torch.tensor([token]))
    finally:
        streamer.end()
