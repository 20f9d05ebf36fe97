"""A request of a client, ready to be decoded and answered."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.errors import RetrievalDraftError
from retrieval_draft.requests import Prepared
from retrieval_draft.server.errors import ApiError, from_library
from retrieval_draft.server.penalties import CountPenalty
from retrieval_draft.server.prompt_logprobs import PromptLogprobs
from retrieval_draft.server.protocol.generation import GenerationFields
from retrieval_draft.server.reply import Reply
from retrieval_draft.server.reply_text import Decode, ReplyText, StopTexts
from retrieval_draft.server.settings import ServerSettings

__all__ = ["Asked", "Asks", "ask", "tokenize"]


@dataclass(frozen=True, slots=True)
class Asks:
    """What a request asks for besides sampling.

    Attributes:
        prompts: Token ids of each.
        max_tokens: Of the reply at most; None for as many as the server allows.
        samples: Of each prompt.
        competing: Whether only the best of them are returned.
        top_logprobs: Alternatives of each token; None for no log probabilities.
        echoed: The prompts as text, if the replies begin with them; else empty.
    """

    prompts: Sequence[Sequence[int]]
    max_tokens: int | None
    samples: int = 1
    competing: bool = False
    top_logprobs: int | None = None
    echoed: Sequence[str] = ()


@dataclass(slots=True)
class Asked:
    """What goes to the engine, and what will hold the replies.

    Attributes:
        prepared: One for each prompt.
        replies: One for each choice, in order.
        texts: What each choice looks for stop strings in, on the engine's thread; None without any.
        prompt_tokens: Of all prompts.
        predicted: Token ids of the prediction.
    """

    prepared: list[Prepared] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    texts: list[ReplyText | None] = field(default_factory=list)
    prompt_tokens: int = 0
    predicted: Sequence[int] = ()


def ask(
    asks: Asks,
    fields: GenerationFields,
    drafter: RetrievalDrafter,
    tokenizer: Any,
    decode: Decode,
    settings: ServerSettings,
) -> Asked:
    """Prepares all prompts of a request. Takes milliseconds; not for the event loop's thread.

    Args:
        asks: What the request asks for.
        fields: Sampling and extensions.
        drafter: The tenant's.
        tokenizer: The model's.
        decode: Token ids to text.
        settings: Limits.

    Raises:
        ApiError: Something cannot be done.
    """
    target = drafter.continuous.target
    model: Any = target.model
    options = fields.options(getattr(model.generation_config, "top_k", None))
    greedy = not options["do_sample"]
    seed = secrets.randbits(62) if fields.seed is None else fields.seed
    vocabulary = target.embedding_rows
    for token in fields.logit_bias or ():
        if int(token) >= vocabulary:
            raise ApiError(
                400, f"logit_bias names the token {token}; ids end at {vocabulary - 1}.", "logit_bias"
            )
    asked = Asked()
    if fields.predicted:
        asked.predicted = tokenize(tokenizer, fields.predicted, "prediction", special=False)
    given = [fields.documents] if isinstance(fields.documents, str) else fields.documents or []
    documents = [tokenize(tokenizer, text, "documents", special=False) for text in given]
    for place, prompt in enumerate(asks.prompts):
        room = _room(len(prompt), asks.max_tokens, target.max_positions, settings)
        extra: dict[str, Any] = {}
        if fields.presence_penalty or fields.frequency_penalty:
            extra["logits_processor"] = [
                CountPenalty(len(prompt), fields.presence_penalty or 0.0, fields.frequency_penalty or 0.0)
            ]
        samples = asks.samples
        try:
            prepared = drafter.continuous.prepare(
                torch.tensor([list(prompt)], dtype=torch.int64).to(target.device),
                seed=seed,
                prediction=list(asked.predicted) or None,
                documents=[text for text in documents if text] or None,
                share=fields.share,
                # A greedy prompt has one reply, which is made once and told as often as it is wanted.
                num_return_sequences=1 if greedy or asks.competing else samples,
                best_of=samples if asks.competing and not greedy else None,
                top_logprobs=asks.top_logprobs,
                max_new_tokens=max(room, 1),
                **options,
                **extra,
            )
        except (RetrievalDraftError, ValueError) as error:
            raise (
                from_library(error)
                if isinstance(error, RetrievalDraftError)
                else ApiError(400, f"The model's generation options refuse this: {error}")
            ) from error
        copies = samples if greedy else 1
        _add(asked, prepared, asks, fields, decode, place, copies, room < 1)
        asked.prompt_tokens += len(prompt)
    return asked


def tokenize(tokenizer: Any, text: str, param: str, *, special: bool = True) -> list[int]:
    """Token ids of a client's text.

    Raises:
        ApiError: It is no text: JSON can hold half a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{param} holds half a surrogate pair, which is no text.", param) from error
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _room(length: int, wanted: int | None, positions: int | None, settings: ServerSettings) -> int:
    """Tokens that the reply may have; 0 only where none are wanted."""
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
    asked: Asked,
    prepared: Prepared,
    asks: Asks,
    fields: GenerationFields,
    decode: Decode,
    place: int,
    copies: int,
    silent: bool,
) -> None:
    """Adds the replies of one prompt."""
    asked.prepared.append(prepared)
    first, stops = prepared.requests[0], fields.stops
    ids = first.prompt
    tail = ids[-16:].tolist()
    said = None
    if asks.echoed and asks.top_logprobs is not None:
        said = PromptLogprobs(ids, asks.top_logprobs)
        first.read_prompt = said
    for request in prepared.requests:
        if fields.ignore_eos:
            request.eos = frozenset()
        text = ReplyText(decode, tail, stops) if stops else None
        if text is not None:
            request.criteria.append(StopTexts(text))
        asked.texts.append(text)
        echoed = asks.echoed[place] if asks.echoed else None
        begin = sum(len(reply.indices) for reply in asked.replies)
        indices = range(begin, begin + copies)
        asked.replies.append(
            Reply(indices, ReplyText(decode, tail, stops), ids.tolist(), echoed, said, silent)
        )
