"""Replies to a client, one for each choice."""

from __future__ import annotations

import json
import secrets
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine.sampling.token_logprobs import TokenLogprobs
from retrieval_draft.server.observability.request_metrics import speculative_decoding
from retrieval_draft.server.openai.detokenize import ReplyText
from retrieval_draft.server.openai.prompt_logprobs import PromptLogprobs
from retrieval_draft.server.parsing.deltas import Delta, Message, ReplyParser
from retrieval_draft.server.scheduler.channel import Ended, Tokens

__all__ = ["Reply", "drafting_metrics", "predicted_tokens"]

_LETTERS = string.ascii_letters + string.digits


class Reply:
    """Text and tokens of a choice.

    Args:
        indices: Indices among the client's choices; several where greedy ones are equal.
        detokenizer: Makes its text; None where the engine does, for stop strings.
        prompt: Its prompt's token ids.
        prompt_text: The prompt as text, where it is echoed.
        prompt_logprobs: Its log probabilities, where they are echoed.
        silent: Whether only the prompt is wanted: new tokens are dropped.
        prompt_offsets: Offset of each of its tokens in `prompt_text`, where they have log probabilities.
        parser: Finds reasoning and calls of tools in the text; None where it is plain.

    Attributes:
        tokens: So far.
        logprobs: One for each token, where they are wanted.
        drafted: Indices of the tokens that were drafted.
        marks: The pieces of the text that became final last, and whether each one's token was drafted.
        text: The text so far.
        message: The parsed text so far; None where it is plain.
        deltas: Parts of the message that the last event brought.
        reasoning_tokens: Number of tokens of the reasoning.
        offsets: Offset of each token in it.
        reason: "stop" or "length"; None while it is decoded.
        stats: Counts, once it has ended.
        logprob: Natural logarithm of its probability, where samples compete.
        accepted_steps: Number of steps with drafts by the number of accepted ones.
    """

    def __init__(
        self,
        indices: Sequence[int],
        detokenizer: ReplyText | None,
        prompt: Sequence[int],
        prompt_text: str | None = None,
        prompt_logprobs: PromptLogprobs | None = None,
        silent: bool = False,
        prompt_offsets: Sequence[int] = (),
        parser: ReplyParser | None = None,
    ) -> None:
        self.indices, self._detokenizer, self.prompt = indices, detokenizer, prompt
        self.prompt_text, self.prompt_logprobs, self._silent = prompt_text, prompt_logprobs, silent
        self.prompt_offsets, self._parser = prompt_offsets, parser
        self.message = None if parser is None else Message()
        self.deltas: list[Delta] = []
        self.reasoning_tokens = 0
        self._call_ids: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.drafted: list[int] = []
        self.marks: list[tuple[str, bool]] = []
        self.text = ""
        self.offsets: list[int] = []
        self.reason: str | None = None
        self.stats = DraftStats()
        self.logprob = 0.0
        self.accepted_steps: Counter[int] = Counter()

    def take(self, event: Tokens) -> str:
        """Adds tokens, and returns the text that became final."""
        if self._silent:
            return ""
        begin = len(self.tokens)
        self.drafted += range(begin, begin + event.accepted)
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        pieces, offsets = event.pieces, event.offsets
        if pieces is None:
            assert self._detokenizer is not None
            self._detokenizer.push(event.tokens)
            pieces, offsets = self._detokenizer.pieces[begin:], self._detokenizer.offsets[begin:]
        self.offsets += offsets
        self.marks = [(piece, index < event.accepted) for index, piece in enumerate(pieces) if piece]
        text = "".join(pieces)
        self.text += text
        self._parse(pieces, False)
        return text

    def end(self, event: Ended) -> str:
        """Records the end, and returns the rest of the text."""
        self.reason, self.stats, self.logprob = event.reason, event.stats, event.logprob
        self.accepted_steps.update(event.accepted_steps)
        if self._silent:
            self.reason = "length"
            self._parse((), True)
            return ""
        rest = event.rest
        if rest is None:
            assert self._detokenizer is not None
            rest = self._detokenizer.finish()
        self.text += rest
        self.marks = [(rest, False)] if rest else []
        self._parse((rest,), True)
        return rest

    def _parse(self, pieces: Sequence[str], ends: bool) -> None:
        parser, message = self._parser, self.message
        if parser is None or message is None:
            return
        self.deltas = []
        for piece in pieces:
            self.deltas += parser.feed(piece)
            self.reasoning_tokens += parser.reasons and not ends
        if ends:
            self.deltas += parser.finish()
        message.add(self.deltas)

    def call_id(self, call: int) -> str:
        """Id of a call of a tool: nine letters and digits, as the strictest chat templates have it."""
        while len(self._call_ids) <= call:
            self._call_ids.append("".join(secrets.choice(_LETTERS) for _ in range(9)))
        return self._call_ids[call]

    @property
    def has_cut_call(self) -> bool:
        """True if the arguments of the last call are no JSON, as where a stop string cuts them."""
        calls = [] if self.message is None else self.message.calls
        try:
            for call in calls[-1:]:
                json.loads(call.arguments, strict=False)
        except (ValueError, RecursionError):
            return True
        return False

    @property
    def mean_logprob(self) -> float:
        """Mean log probability of a token, by which samples are ranked."""
        return self.logprob / max(len(self.tokens), 1)


def predicted_tokens(replies: Iterable[Reply], predicted: Sequence[int]) -> tuple[int, int]:
    """Numbers of accepted and rejected tokens of a prediction.

    A token counts as accepted if it was drafted, and follows its predecessor in the prediction too.
    All other tokens of the prediction count as rejected.

    Args:
        replies: Of the request.
        predicted: Token ids of the prediction.

    Example:
        prediction [5, 6, 7, 8], reply [5, 6, 7, 9] of which 6 and 7 were drafted  ->  2 accepted, 2 rejected
    """
    pairs = set(pairwise(predicted))
    accepted = 0
    for reply in replies:
        for index in reply.drafted:
            before = reply.tokens[index - 1] if index else (reply.prompt[-1] if len(reply.prompt) else -1)
            accepted += (before, reply.tokens[index]) in pairs
    return accepted, max(len(predicted) - accepted, 0)


def drafting_metrics(replies: Iterable[Reply]) -> dict[str, Any]:
    """``{"speculative_decoding": ...}`` of all choices together."""
    total, steps = DraftStats(), Counter[int]()
    for reply in replies:
        total.add(reply.stats)
        steps.update(reply.accepted_steps)
    return {"speculative_decoding": speculative_decoding(total, steps)}
