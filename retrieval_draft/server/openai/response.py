"""The response of a request, from its tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive

from retrieval_draft.http.event_stream import unless_gone
from retrieval_draft.http.json_response import Json
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.format import ResponseFormat
from retrieval_draft.server.openai.reply import Reply, drafting_metrics, predicted_tokens
from retrieval_draft.server.scheduler.channel import Ended, Failed
from retrieval_draft.server.scheduler.job import Job

__all__ = ["DONE", "ResponseWriter", "event"]

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


@dataclass(frozen=True, slots=True)
class ResponseWriter:
    """Writer of the response to one request.

    Attributes:
        job: The request.
        shape: The response format.
        kept: Choices of each prompt to return, of samples that compete; None for all.
        with_usage: Whether a stream ends with the usage.
        with_metrics: Whether the response has drafting counts.
        with_marks: Whether a stream marks the drafted pieces of its text.
    """

    job: Job
    shape: ResponseFormat
    kept: int | None
    with_usage: bool
    with_metrics: bool
    with_marks: bool = False

    async def unless_gone(self, receive: Receive, gone: Callable[[], object]) -> Response:
        """The whole response; if the client hangs up before, an empty one.

        Args:
            receive: Receives events of the client.
            gone: Called when the client has left, or the response is complete.
        """
        try:
            whole = await unless_gone(receive, self.whole())
            return Response(status_code=499) if whole is None else Json(whole)
        finally:
            gone()

    async def whole(self) -> dict[str, Any]:
        """The whole response at once.

        Raises:
            ApiError: The request failed.
        """
        async for _ in self._pieces():
            pass
        body = self.shape.whole(self._returned(), self._usage())
        return body | self._metrics()

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, an error among them if there is one, and ``[DONE]``."""
        try:
            begun: set[int] = set()
            async for index, text, begin, end in self._pieces():
                reply = self.job.replies[index]
                pieces: list[dict[str, Any]] = []
                if index not in begun:
                    begun.add(index)
                    pieces += self.shape.begin(reply)
                new = self.shape.piece(reply, text, begin, end)
                if self.with_marks:
                    marks = [{"text": piece, "drafted": drafted} for piece, drafted in reply.marks]
                    # Once for each choice, however many pieces a step makes of its text.
                    count = len(reply.indices)
                    new = [*(each | {"draft_marks": marks} for each in new[:count]), *new[count:]]
                pieces += new
                for piece in pieces:
                    yield event(piece)
            if self.with_usage or self.with_metrics:
                usage = self._usage() if self.with_usage else None
                yield event(self.shape.last(usage) | self._metrics())
        except ApiError as error:
            yield event(error.body())
        yield DONE

    async def _pieces(self) -> AsyncIterator[tuple[int, str, int, int]]:
        """Yields a reply's index, its new text, and begin and end of its new tokens, until all have ended."""
        replies = self.job.replies
        left = len(replies)
        while left:
            for each in await self.job.channel.get():
                if isinstance(each, Failed):
                    raise each.error
                reply = replies[each.index]
                begin = len(reply.tokens)
                if isinstance(each, Ended):
                    left -= 1
                    yield each.index, reply.end(each), begin, begin
                    continue
                text = reply.take(each)
                yield each.index, text, begin, len(reply.tokens)

    def _returned(self) -> Sequence[Reply]:
        replies, kept = self.job.replies, self.kept
        if kept is None:
            return replies
        samples = len(replies) // self.job.prompts
        returned: list[Reply] = []
        for begin in range(0, len(replies), samples):
            best = sorted(replies[begin : begin + samples], key=lambda reply: -reply.mean_logprob)
            returned += best[:kept]
        for index, reply in enumerate(returned):
            reply.indices = [index]
        return returned

    def _usage(self) -> dict[str, Any]:
        replies = self.job.replies
        completion = sum(len(reply.tokens) * len(reply.indices) for reply in replies)
        accepted, rejected = predicted_tokens(replies, self.job.predicted)
        return {
            "prompt_tokens": self.job.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.job.prompt_tokens + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(reply.stats.cached_tokens for reply in replies),
                "audio_tokens": 0,
            },
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": rejected,
                "reasoning_tokens": sum(each.reasoning_tokens * len(each.indices) for each in replies),
                "audio_tokens": 0,
            },
        }

    def _metrics(self) -> dict[str, Any]:
        return {"metrics": drafting_metrics(self.job.replies)} if self.with_metrics else {}
