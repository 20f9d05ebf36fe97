"""Requests of the decoding loop, from the arguments that model.generate prepared."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from retrieval_draft.engine.cache.cache_rows import adopt
from retrieval_draft.engine.placeholders import text_runs
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.sampling.grammar_processor import start_grammar
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.engine.sampling.row_processors import criteria_of_row, processors_of_row
from retrieval_draft.engine.sampling.sampling import Sampler
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.generation.streaming import StreamRows
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.store.store import SharedStore

__all__ = ["DecodeOptions", "DecodeRequests", "Seeds", "make_requests", "set_limits", "share_when_finished"]

Seeds = int | Sequence[int] | None


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """Options of a call beyond those of model.generate.

    Attributes:
        streamer: Receives the prompt once, then each new token.
        seeds: One for all prompts, or one for each; None draws them from torch's global generator.
        sample: Sample index of the first one among those of its prompt and seed.
        references: Texts that the replies may quote.
        keep_prompt_logits: Whether the logits at the prompts' positions are returned.
        best_of: Sequences of each prompt to return, the most probable first, of those that are sampled; None
            for all.
        share: Parts that other servers may learn: "none", "reply" or "all"; None for the store's default.
        top_logprobs: Number of alternatives of each token to keep with log probabilities; None for no log
            probabilities.
        max_draft_tokens: Draft tokens in one step of a reply at most, 0 for none; None for as many as pay.
    """

    streamer: Any = None
    seeds: Seeds = None
    sample: int = 0
    references: Sequence[TokenArray] = ()
    keep_prompt_logits: bool = False
    best_of: int | None = None
    share: str | None = None
    top_logprobs: int | None = None
    max_draft_tokens: int | None = None

    def __post_init__(self) -> None:
        most = self.max_draft_tokens
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
            raise InvalidInputError(
                f"max_draft_tokens is {most!r}.", "Pass a number of tokens, 0 for none, or None."
            )


@dataclass(frozen=True, slots=True)
class DecodeRequests:
    """Requests that are ready to join a batch.

    Attributes:
        requests: Those of one prompt; the first leads the others.
        references: Texts that the replies may quote.
        begin: Passes a prompt with images, on the thread that decodes, before its row is made; None for text.
    """

    requests: Sequence[DecodeRequest]
    references: Sequence[TokenArray] = ()
    begin: Callable[[], None] | None = None


def make_requests(
    target: Target,
    prompts: Sequence[TokenArray],
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    cache: Any,
    extras: DecodeOptions,
    stream: StreamRows | None = None,
    *,
    media: bool = False,
) -> list[DecodeRequest]:
    """One request for each row. Rows with the same prompt share its pass, with noise of their own.

    Noise is keyed by seed, sample index among the rows of the same seed and prompt, position and token: not
    by the row's index, so that a row draws the tokens that its prompt would draw alone.

    Args:
        target: The model.
        prompts: Padding stripped.
        input_ids: int64, shape (batch, length), left padding included.
        processors: As prepared by model.generate.
        criteria: As prepared by model.generate.
        config: As prepared by model.generate.
        cache: The caller's cache, or None.
        extras: Options of the call beyond those of model.generate.
        stream: Takes the rows' new tokens.
        media: Whether the prompts hold images or the like, so that no row stands for another.

    Raises:
        InvalidInputError: There are not as many seeds as prompts.
        UnsupportedGenerationError: A processor or criterion cannot be copied for each row.
    """
    returned = config.num_return_sequences or 1
    dictionary = bool(config.return_dict_in_generate)
    keeps = dictionary and bool(config.output_scores), dictionary and bool(config.output_logits)
    width = input_ids.shape[1]
    owners = list(range(len(prompts))) if media else _prefix_owners(prompts)
    seeds = _seeds(extras.seeds, len(prompts), returned) if config.do_sample else [0] * len(prompts)
    caches: list[Any] = [None] * len(prompts)
    if cache is not None:
        first = [row for row in range(len(prompts)) if row % returned == 0]
        adopted = adopt(
            cache, [prompts[row] for row in first], [width - len(prompts[row]) for row in first], target
        )
        caches = [adopted[row // returned] if row % returned == 0 else None for row in range(len(prompts))]
        owners = [row - row % returned for row in range(len(prompts))]
    samples: Counter[tuple[int, bytes | int]] = Counter()
    requests: list[DecodeRequest] = []
    for row, prompt in enumerate(prompts):
        noise = None
        if config.do_sample:
            # With images two prompts of equal ids may differ.
            key = (seeds[row], row // returned if media else prompt.tobytes())
            sample = extras.sample + samples[key]
            noise = GumbelNoise(seeds[row], target.logit_width, target.device, sample=sample)
            samples[key] += 1
        sampler, grammar = None, None
        top = extras.top_logprobs
        if noise is not None or len(processors) or any(keeps) or top is not None:
            given = processors_of_row(processors, row, len(prompts))
            own, grammar = start_grammar(given, row, len(prompts), width)
            sampler = Sampler(own, noise, *keeps, keep_logprob=extras.best_of is not None, keep_top=top)
        request = DecodeRequest(
            prompt, 0, sampler=sampler, noise=noise, padded=input_ids[row : row + 1].long()
        )
        if stream is not None:
            request.emit, request.ended = stream.taker(row), partial(stream.end, row)
        request.cache, request.grammar = caches[row], grammar
        request.prefix_owner = None if owners[row] == row else requests[owners[row]]
        request.keep_prompt_logits = extras.keep_prompt_logits
        request.placeholders = target.placeholders
        request.max_draft_tokens = extras.max_draft_tokens
        set_limits(request, criteria_of_row(criteria, len(prompts)), config, width - len(prompt))
        requests.append(request)
    return requests


def _prefix_owners(prompts: Sequence[TokenArray]) -> list[int]:
    """Index of the first row with the same prompt, for each row."""
    first: dict[bytes, int] = {}
    return [first.setdefault(prompt.tobytes(), row) for row, prompt in enumerate(prompts)]


def _seeds(seeds: Seeds, rows: int, returned: int) -> list[int]:
    """A seed for each row; the samples of one prompt share theirs."""
    prompts = rows // returned
    if seeds is None:
        drawn = [int(torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu")) for _ in range(prompts)]
    elif not isinstance(seeds, Iterable):
        drawn = [_seed(seeds)] * prompts
    else:
        drawn = [_seed(seed) for seed in seeds]
        if len(drawn) != prompts:
            raise InvalidInputError(
                f"seed has {len(drawn)} values for {prompts} prompts.", "Pass one for each, or a single one."
            )
    return [drawn[row // returned] for row in range(rows)]


def _seed(given: Any) -> int:
    try:
        return operator.index(given)
    except TypeError:
        raise InvalidInputError(
            f"seed is {given!r}, a {type(given).__name__}; it must be an integer, or one for each prompt."
        ) from None


def set_limits(
    request: DecodeRequest, criteria: StoppingCriteriaList, config: GenerationConfig, padding: int
) -> None:
    """Turns length and eos criteria into numbers, and leaves the others to be called.

    Args:
        request: Its `max_length`, `eos`, `criteria` and `prefill_chunk` are set.
        criteria: As prepared by model.generate.
        config: As prepared by model.generate.
        padding: Left padding of this prompt, which max_length counts and the request does not.
    """
    lengths: list[int] = []
    eos: set[int] = set()
    others = []
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


def share_when_finished(
    store: SharedStore | None, requests: Sequence[DecodeRequest], share: str | None
) -> None:
    """Shares each request through the store as soon as it is complete; one that fails before is not shared.

    Args:
        store: None for no sharing.
        requests: Their `finished` is set.
        share: "none", "reply" or "all"; None for the store's default.
    """
    if store is None:
        return
    nothing = np.empty(0, np.int32)
    for request in requests:
        # Rows with the same prompt share it once.
        prompt = request.runs if request.prefix_owner is None else [nothing]
        request.finished = partial(_hand_over, store, prompt, request.placeholders, share)


def _hand_over(
    store: SharedStore,
    prompt: Sequence[TokenArray],
    placeholders: frozenset[int],
    share: str | None,
    reply: TokenArray,
) -> None:
    nothing = np.empty(0, np.int32)
    *earlier, context = prompt
    for text in earlier:
        store.share(text, nothing, share)
    first, *others = text_runs(reply, placeholders)
    store.share(context, first, share)
    for text in others:
        store.share(nothing, text, share)
