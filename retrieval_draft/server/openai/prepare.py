"""A request of a client, ready to be decoded and answered."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from retrieval_draft.engine.sampling.penalties import CountPenalty
from retrieval_draft.errors import RetrievalDraftError
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
from retrieval_draft.server.scheduler.job import Job
from retrieval_draft.server.service import Loaded
from retrieval_draft.server.settings import ServerSettings

__all__ = ["check_length", "prepare_request", "tokenize"]


def prepare_request(
    job: Job,
    fields: GenerationFields,
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    *,
    samples: int = 1,
    competing: bool = False,
    top_logprobs: int | None = None,
    echoed: Sequence[str] = (),
    parser: Callable[[], ReplyParser] | None = None,
    marks: frozenset[str] | None = frozenset(),
    grammar: AskedGrammar | None = None,
    model_inputs: Mapping[str, Any] | None = None,
) -> None:
    """Prepares all prompts of a request. Takes milliseconds; not for the event loop's thread.

    Args:
        job: Gets the prompts and their replies.
        fields: Sampling and extensions.
        loaded: The model's objects and limits.
        prompts: Token ids of each.
        max_tokens: Limit of the reply; None for the server's.
        samples: Samples of each prompt.
        competing: Whether only the best of them are returned.
        top_logprobs: Alternatives of each token; None for no log probabilities.
        echoed: The prompts as text, if the replies begin with them; else empty.
        parser: Makes the parser of a reply; None where replies are plain text.
        marks: Special tokens that the parser sees; None for all.
        grammar: Rule that the replies follow; None for the one that the request's fields ask for, if any.
        model_inputs: Further inputs of the model, such as those of images; None for text alone.

    Raises:
        ApiError: Something is not supported, or beyond a limit.
    """
    drafter, target = loaded.drafter, loaded.drafter.continuous.target
    options = _options(fields, loaded)
    greedy = not options["do_sample"]
    seed = secrets.randbits(62) if fields.seed is None else fields.seed
    words = _words(loaded.tokenizer, fields.bad_words or ())
    grammar = grammar or asked_grammar(fields)
    if grammar is not None:
        loaded.check()
        for name in ("min_tokens", "ignore_eos", "allowed_token_ids", "bad_words"):
            if getattr(fields, name):
                raise ApiError(400, f"{name} does not go together with {grammar.field}.", name)
        check_grammar(drafter, grammar)
        job.grammar_field = grammar.field.partition(".")[0]
    if fields.allowed_token_ids and {word[-1] for word in words} >= set(fields.allowed_token_ids):
        raise ApiError(400, "bad_words leaves none of allowed_token_ids.", "bad_words")
    documents, job.predicted = _references(fields, loaded)
    for index, prompt in enumerate(prompts):
        loaded.check()
        room = _room(len(prompt), max_tokens, target.max_positions, loaded.settings)
        least = fields.min_tokens or 0
        if least > max(room, 1):
            raise ApiError(400, f"min_tokens is {least}; the reply has room for {room}.", "min_tokens")
        processors = _processors(fields, len(prompt), words, target.embedding_rows)
        extra: dict[str, Any] = {"logits_processor": processors} if processors else {}
        try:
            prepared = drafter.continuous.prepare(
                torch.tensor([list(prompt)], dtype=torch.int64).to(target.device),
                seed=seed,
                prediction=list(job.predicted) or None,
                documents=[text for text in documents if text] or None,
                share=fields.share,
                # A greedy prompt has one reply, which is decoded once and returned for each choice.
                num_return_sequences=1 if greedy or competing else samples,
                best_of=samples if competing and not greedy else None,
                top_logprobs=top_logprobs,
                grammar=None if grammar is None else grammar.grammar,
                max_new_tokens=max(room, 1),
                **options,
                **extra,
                **{name: value.to(target.device) for name, value in (model_inputs or {}).items()},
            )
        except (RetrievalDraftError, ValueError) as error:
            raise (
                from_library(error)
                if isinstance(error, RetrievalDraftError)
                else ApiError(400, f"The model's generation options refuse this: {error}")
            ) from error
        if fields.cache_salt:
            drafter.use_prefixes(prepared.requests, fields.cache_salt)
        for request in prepared.requests:
            request.max_draft_tokens = fields.max_draft_tokens
            if fields.ignore_eos:
                request.eos = frozenset(fields.stop_token_ids or ())
        first, stops, copies = prepared.requests[0], fields.stops, samples if greedy else 1
        decode, specials = _decoder(fields, loaded, first.eos, marks)
        tail = first.prompt[-16:].tolist()
        echo = echoed[index] if echoed else None
        prompt_logprobs, offsets = None, []
        if echo is not None and top_logprobs is not None:
            first.read_prompt = prompt_logprobs = PromptLogprobs(first.prompt, top_logprobs)
            loaded.check()
            prompt_text = ReplyText(decode)
            prompt_text.push(first.prompt.tolist())
            offsets = [min(offset, len(echo)) for offset in prompt_text.offsets]
        texts: list[ReplyText | None] = []
        for request in prepared.requests:
            text = None
            if stops:
                keeps_stop = bool(fields.include_stop_str_in_output)
                text = ReplyText(decode, tail, stops, specials, keeps_stop, least)
                request.criteria.append(StopTexts(text))
            texts.append(text)
            begin = sum(len(reply.indices) for reply in job.replies)
            shown = None if stops else ReplyText(decode, tail)
            parsed = None if parser is None else parser()
            job.replies.append(
                Reply(
                    range(begin, begin + copies), shown, first.prompt.tolist(), echo, prompt_logprobs,
                    room < 1, offsets, parsed,
                )
            )  # fmt: skip
        job.add(prepared, texts)
        job.prompt_tokens += len(prompt)


def _options(fields: GenerationFields, loaded: Loaded) -> dict[str, Any]:
    """Options of generation for all prompts.

    Raises:
        ApiError: A field names a token that there is not.
    """
    target = loaded.drafter.continuous.target
    model: Any = target.model
    options = {**loaded.overrides, **fields.options(getattr(model.generation_config, "top_k", None))}
    named = {
        "logit_bias": [token for (token,) in options.get("sequence_bias", ())],
        "allowed_token_ids": fields.allowed_token_ids or [],
        "stop_token_ids": fields.stop_token_ids or [],
    }
    for name, tokens in named.items():
        if tokens and max(tokens) >= target.embedding_rows:
            raise ApiError(
                400, f"{name} names the token {max(tokens)}; ids end at {target.embedding_rows - 1}.", name
            )
    if fields.stop_token_ids:
        options["eos_token_id"] = [*_ends(model.generation_config), *fields.stop_token_ids]
    return options


def _processors(
    fields: GenerationFields, length: int, words: Sequence[Sequence[int]], vocabulary: int
) -> list[Any]:
    """Logits processors for the reply to a prompt of `length` tokens."""
    found: list[Any] = []
    presence, frequency = fields.presence_penalty or 0.0, fields.frequency_penalty or 0.0
    if presence or frequency:
        found.append(CountPenalty(length, presence, frequency))
    if fields.allowed_token_ids:
        found.append(AllowedTokens(fields.allowed_token_ids, vocabulary))
    if words:
        found.append(BadWords(length, words))
    return found


def _decoder(
    fields: GenerationFields, loaded: Loaded, eos: frozenset[int], marks: frozenset[str] | None
) -> tuple[Decode, Mapping[int, str]]:
    """Decodes a reply; and the special tokens that only stop strings see, by id."""
    specials = stopping_specials(loaded.tokenizer, fields.stops) if fields.stops else {}
    kept = None if fields.skip_special_tokens is False else marks
    if kept is not None and not kept and not fields.stop_token_ids:
        return loaded.decode, specials
    dropped = frozenset() if fields.include_stop_str_in_output else eos
    specials = {
        token: text
        for token, text in specials.items()
        if token in dropped or (kept is not None and text not in kept)
    }
    return selective_decoder(loaded.tokenizer, kept, dropped), specials


def tokenize(
    loaded: Loaded, text: str, param: str, *, special: bool = True, most: int | None = None
) -> list[int]:
    """Token ids of a text.

    Args:
        loaded: The model's objects and limits.
        text: Of the client.
        param: The field with the text.
        special: Whether the tokenizer adds its special tokens.
        most: Tokens that the text may have; None for as many as a prompt.

    Raises:
        ApiError: It has more characters than so many tokens can.
    """
    loaded.check()
    check_length(loaded, text, param, loaded.most_prompt_tokens if most is None else most)
    return list(loaded.tokenizer(text, add_special_tokens=special)["input_ids"])


def check_length(loaded: Loaded, text: str, param: str, most: int | None) -> None:
    """Refuses a text with more characters than `most` tokens can have.

    Raises:
        ApiError: As above.
    """
    if most is not None and len(text) > most * loaded.longest:
        raise ApiError(
            400, f"{param} has {len(text)} characters; {most} tokens, the most allowed, have fewer.", param
        )


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


def _references(fields: GenerationFields, loaded: Loaded) -> tuple[list[list[int]], list[int]]:
    """Token ids of the documents and of the prediction.

    Raises:
        ApiError: Together they are longer than the limit on references.
    """
    most = loaded.settings.max_reference_tokens
    left, documents, predicted = most, [], []
    given = [("documents", text) for text in fields.references]
    for name, text in (*given, ("prediction", fields.predicted or "")):
        ids = tokenize(loaded, text, name, special=False, most=left) if text else []
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
