"""A request of a client, ready to be decoded and answered."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine.sampling.penalties import CountPenalty
from retrieval_draft.errors import RetrievalDraftError
from retrieval_draft.generation.requests import DecodeRequests
from retrieval_draft.server.errors import ApiError, from_library
from retrieval_draft.server.openai.detokenize import (
    Decode,
    ReplyText,
    StopTexts,
    selective_decoder,
    stopping_specials,
)
from retrieval_draft.server.openai.generation_request import GenerationFields
from retrieval_draft.server.openai.prompt_logprobs import PromptLogprobs
from retrieval_draft.server.openai.reply import Reply
from retrieval_draft.server.openai.structured_outputs import AskedGrammar, asked_grammar, check_grammar
from retrieval_draft.server.openai.token_masks import AllowedTokens, BadWords
from retrieval_draft.server.parsing.deltas import ReplyParser
from retrieval_draft.server.settings import ServerSettings

__all__ = ["GenerationParams", "Means", "PreparedRequest", "check_length", "prepare_request", "tokenize"]


@dataclass(frozen=True, slots=True)
class Means:
    """Tools and limits for the preparation of a request.

    Attributes:
        drafter: The tenant's.
        tokenizer: The model's.
        decode: Token ids to text.
        settings: Limits.
        overrides: Options that override the model's own generation configuration.
        longest: Characters of the longest token.
        check: Raises once the client has left.
    """

    drafter: RetrievalDrafter
    tokenizer: Any
    decode: Decode
    settings: ServerSettings
    overrides: Mapping[str, Any]
    longest: int
    check: Callable[[], object]

    @property
    def most_prompt_tokens(self) -> int | None:
        """Limit of a prompt's tokens; None for any number."""
        limits = (self.settings.max_prompt_tokens, self.drafter.continuous.target.max_positions)
        return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """Options of a request besides sampling.

    Attributes:
        prompts: Token ids of each.
        max_tokens: Limit of the reply; None for the server's.
        samples: Samples of each prompt.
        competing: Whether only the best of them are returned.
        top_logprobs: Alternatives of each token; None for no log probabilities.
        echoed: The prompts as text, if the replies begin with them; else empty.
        parser: Makes the parser of a reply; None where replies are plain text.
        marks: Special tokens that the parser sees; None for all.
        grammar: Rule that the replies follow; None for the one that the request's fields ask for, if any.
        model_inputs: Further inputs of the model, such as those of images; empty for text alone.
    """

    prompts: Sequence[Sequence[int]]
    max_tokens: int | None
    samples: int = 1
    competing: bool = False
    top_logprobs: int | None = None
    echoed: Sequence[str] = ()
    parser: Callable[[], ReplyParser] | None = None
    marks: frozenset[str] | None = frozenset()
    grammar: AskedGrammar | None = None
    model_inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class PreparedRequest:
    """A prepared request: input of the engine, and its replies.

    Attributes:
        prepared: One for each prompt.
        replies: One for each choice, in order.
        texts: The text of each choice, in which the engine looks for stop strings; None without any.
        prompt_tokens: Of all prompts.
        predicted: Token ids of the prediction.
        grammar_field: The field that asks for the grammar of the replies; None without one.
    """

    prepared: list[DecodeRequests] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    texts: list[ReplyText | None] = field(default_factory=list)
    prompt_tokens: int = 0
    predicted: Sequence[int] = ()
    grammar_field: str | None = None


def prepare_request(asks: GenerationParams, fields: GenerationFields, means: Means) -> PreparedRequest:
    """Prepares all prompts of a request. Takes milliseconds; not for the event loop's thread.

    Args:
        asks: Options of the request besides sampling.
        fields: Sampling and extensions.
        means: Tools and limits.

    Raises:
        ApiError: Something is not supported, or beyond a limit.
    """
    drafter, settings = means.drafter, means.settings
    target = drafter.continuous.target
    model: Any = target.model
    options = {**means.overrides, **fields.options(getattr(model.generation_config, "top_k", None))}
    greedy = not options["do_sample"]
    seed = secrets.randbits(62) if fields.seed is None else fields.seed
    vocabulary = target.embedding_rows
    named = {
        "logit_bias": [token for (token,) in options.get("sequence_bias", ())],
        "allowed_token_ids": fields.allowed_token_ids or [],
        "stop_token_ids": fields.stop_token_ids or [],
    }
    for name, tokens in named.items():
        if tokens and max(tokens) >= vocabulary:
            raise ApiError(400, f"{name} names the token {max(tokens)}; ids end at {vocabulary - 1}.", name)
    if fields.stop_token_ids:
        options["eos_token_id"] = [*_ends(model.generation_config), *fields.stop_token_ids]
    words = _words(means.tokenizer, fields.bad_words or ())
    grammar = asks.grammar or asked_grammar(fields)
    if grammar is not None:
        means.check()
        for name in ("min_tokens", "ignore_eos", "allowed_token_ids", "bad_words"):
            if getattr(fields, name):
                raise ApiError(400, f"{name} does not go together with {grammar.field}.", name)
        check_grammar(drafter, grammar)
    if fields.allowed_token_ids and {word[-1] for word in words} >= set(fields.allowed_token_ids):
        raise ApiError(400, "bad_words leaves none of allowed_token_ids.", "bad_words")
    asked = PreparedRequest(grammar_field=None if grammar is None else grammar.field.partition(".")[0])
    documents, asked.predicted = _references(fields, means)
    for index, prompt in enumerate(asks.prompts):
        means.check()
        room = _room(len(prompt), asks.max_tokens, target.max_positions, settings)
        if (fields.min_tokens or 0) > max(room, 1):
            raise ApiError(
                400, f"min_tokens is {fields.min_tokens}; the reply has room for {room}.", "min_tokens"
            )
        processors: list[Any] = []
        if fields.presence_penalty or fields.frequency_penalty:
            processors.append(
                CountPenalty(len(prompt), fields.presence_penalty or 0.0, fields.frequency_penalty or 0.0)
            )
        if fields.allowed_token_ids:
            processors.append(AllowedTokens(fields.allowed_token_ids, vocabulary))
        if words:
            processors.append(BadWords(len(prompt), words))
        extra: dict[str, Any] = {"logits_processor": processors} if processors else {}
        samples = asks.samples
        try:
            prepared = drafter.continuous.prepare(
                torch.tensor([list(prompt)], dtype=torch.int64).to(target.device),
                seed=seed,
                prediction=list(asked.predicted) or None,
                documents=[text for text in documents if text] or None,
                share=fields.share,
                # A greedy prompt has one reply, which is decoded once and returned for each choice.
                num_return_sequences=1 if greedy or asks.competing else samples,
                best_of=samples if asks.competing and not greedy else None,
                top_logprobs=asks.top_logprobs,
                grammar=None if grammar is None else grammar.grammar,
                max_new_tokens=max(room, 1),
                **options,
                **extra,
                **{name: value.to(target.device) for name, value in asks.model_inputs.items()},
            )
        except (RetrievalDraftError, ValueError) as error:
            raise (
                from_library(error)
                if isinstance(error, RetrievalDraftError)
                else ApiError(400, f"The model's generation options refuse this: {error}")
            ) from error
        if fields.cache_salt:
            drafter.use_prefixes(prepared.requests, fields.cache_salt)
        copies = samples if greedy else 1
        _add(asked, prepared, asks, fields, means, index, copies, room < 1)
        asked.prompt_tokens += len(prompt)
    return asked


def tokenize(means: Means, text: str, param: str, *, special: bool = True) -> list[int]:
    """Token ids of a prompt.

    Args:
        means: Tools and limits.
        text: Of the client.
        param: The field with the text.
        special: Whether the tokenizer adds its special tokens.

    Raises:
        ApiError: It has more characters than the tokens of a prompt can.
    """
    return _tokenize(means, text, param, means.most_prompt_tokens, special)


def check_length(means: Means, text: str, param: str) -> None:
    """Refuses a text with more characters than the tokens of a prompt can have.

    Raises:
        ApiError: As above.
    """
    _check_length(means, text, param, means.most_prompt_tokens)


def _check_length(means: Means, text: str, param: str, most: int | None) -> None:
    if most is not None and len(text) > most * means.longest:
        raise ApiError(
            400, f"{param} has {len(text)} characters; {most} tokens, the most allowed, have fewer.", param
        )


def _tokenize(means: Means, text: str, param: str, most: int | None, special: bool) -> list[int]:
    means.check()
    _check_length(means, text, param, most)
    return list(means.tokenizer(text, add_special_tokens=special)["input_ids"])


def _ends(config: Any) -> list[int]:
    """Tokens that end a reply of a model."""
    ids = config.eos_token_id
    return [] if ids is None else [int(ids)] if isinstance(ids, int) else [int(each) for each in ids]


def _words(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """Token ids of texts at the beginning of a reply and within it, where a space may belong to the first."""
    found = []
    for word in words:
        for text in (word, " " + word.lstrip()):
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids and ids not in found:
                found.append(ids)
    return found


def _references(fields: GenerationFields, means: Means) -> tuple[list[list[int]], list[int]]:
    """Token ids of the documents and of the prediction.

    Raises:
        ApiError: Together they are longer than the limit on references.
    """
    most = means.settings.max_reference_tokens
    left, documents, predicted = most, [], []
    given = [("documents", text) for text in fields.references]
    for name, text in (*given, ("prediction", fields.predicted or "")):
        ids = _tokenize(means, text, name, left, False) if text else []
        left -= len(ids)
        if left < 0:
            raise ApiError(400, f"documents and prediction have more than {most} tokens together.", name)
        if name == "documents":
            documents.append(ids)
        else:
            predicted = ids
    return documents, predicted


def _room(length: int, wanted: int | None, positions: int | None, settings: ServerSettings) -> int:
    """Limit of the reply's tokens; 0 only where none are wanted."""
    if length == 0:
        raise ApiError(400, "The prompt is empty; give at least one token.", "prompt")
    most = settings.max_prompt_tokens
    if most is not None and length > most:
        raise ApiError(400, f"The prompt has {length} tokens; this server takes {most}.", "prompt")
    room = settings.max_tokens if wanted is None else min(wanted, settings.max_tokens)
    if positions is not None:
        if length >= positions:
            raise ApiError(
                400, f"The prompt has {length} tokens; the model's context has {positions}.", "prompt"
            )
        room = min(room, positions - length)
    return room


def _add(
    asked: PreparedRequest,
    prepared: DecodeRequests,
    asks: GenerationParams,
    fields: GenerationFields,
    means: Means,
    index: int,
    copies: int,
    silent: bool,
) -> None:
    """Adds the replies of one prompt."""
    asked.prepared.append(prepared)
    first, stops, decode = prepared.requests[0], fields.stops, means.decode
    for request in prepared.requests:
        request.max_draft_tokens = fields.max_draft_tokens
        if fields.ignore_eos:
            request.eos = frozenset(fields.stop_token_ids or ())
    specials = stopping_specials(means.tokenizer, stops) if stops else {}
    kept = None if fields.skip_special_tokens is False else asks.marks
    if kept is None or kept or fields.stop_token_ids:
        dropped = () if fields.include_stop_str_in_output else first.eos
        decode = selective_decoder(means.tokenizer, kept, dropped)
        specials = {
            token: text
            for token, text in specials.items()
            if token in dropped or (kept is not None and text not in kept)
        }
    ids, least = first.prompt, fields.min_tokens or 0
    tail = ids[-16:].tolist()
    prompt_logprobs, offsets = None, []
    echoed = asks.echoed[index] if asks.echoed else None
    if echoed is not None and asks.top_logprobs is not None:
        prompt_logprobs = PromptLogprobs(ids, asks.top_logprobs)
        first.read_prompt = prompt_logprobs
        means.check()
        prompt_text = ReplyText(decode)
        prompt_text.push(ids.tolist())
        offsets = [min(offset, len(echoed)) for offset in prompt_text.offsets]
    for request in prepared.requests:
        text = None
        if stops:
            text = ReplyText(decode, tail, stops, specials, bool(fields.include_stop_str_in_output), least)
            request.criteria.append(StopTexts(text))
        asked.texts.append(text)
        begin = sum(len(reply.indices) for reply in asked.replies)
        indices = range(begin, begin + copies)
        shown = None if stops else ReplyText(decode, tail)
        parser = None if asks.parser is None else asks.parser()
        asked.replies.append(
            Reply(indices, shown, ids.tolist(), echoed, prompt_logprobs, silent, offsets, parser)
        )
