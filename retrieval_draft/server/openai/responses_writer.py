"""The response of POST /v1/responses: items, whole or event by event."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from time import time
from typing import Any

import msgspec

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.reply import Reply
from retrieval_draft.server.openai.response import ResponseWriter
from retrieval_draft.server.parsing.deltas import Delta

__all__ = ["ResponseItems", "ResponsesWriter"]

Event = dict[str, Any]


class ResponseItems:
    """Items of a response, and the events that tell of them, from the deltas of one reply.

    Args:
        head: Fields of the response that do not change.
        request_id: Ids of items begin with it.

    Attributes:
        output: The items so far.
    """

    def __init__(self, head: dict[str, Any], request_id: str) -> None:
        self._head, self._id = head, request_id
        self.output: list[dict[str, Any]] = []
        self._open = ""
        self._number = 0

    def response(self, status: str, **more: Any) -> dict[str, Any]:
        """The response as it is now."""
        fields = {"status": status, "error": None, "incomplete_details": None, "usage": None, **more}
        return {**self._head, **fields, "output": self.output}

    def begin(self) -> list[Event]:
        """Events before the first item."""
        response = self.response("in_progress")
        return [self.event("response.created", response=response),
                self.event("response.in_progress", response=response)]  # fmt: skip

    def event(self, kind: str, **fields: Any) -> Event:
        """An event with its number."""
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def add(self, reply: Reply, delta: Delta) -> list[Event]:
        """Events of a delta."""
        events: list[Event] = []
        kind = "call" if delta.kind in ("name", "arguments") else delta.kind
        if delta.kind == "name" or kind != self._open:
            events += self.close()
            events += self._begin_item(kind, reply, delta)
        item, at = self.output[-1], self._at()
        if kind == "call":
            if delta.kind == "arguments":
                item["arguments"] += delta.text
                events.append(self.event("response.function_call_arguments.delta", **at, delta=delta.text))
            return events
        item["content"][0]["text"] += delta.text
        extra: dict[str, Any] = {"logprobs": []} if kind == "content" else {}
        events.append(
            self.event(f"response.{_PARTS[kind]}.delta", **at, content_index=0, delta=delta.text, **extra)
        )
        return events

    def close(self, status: str = "completed") -> list[Event]:
        """Events of the end of the open item.

        Args:
            status: Of the item.
        """
        kind, self._open = self._open, ""
        if not kind:
            return []
        item, events = self.output[-1], []
        at = {"item_id": item["id"], "output_index": len(self.output) - 1}
        item["status"] = status
        if kind == "call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self.event("response.function_call_arguments.done", **at, **done))
        else:
            part = item["content"][0]
            extra: dict[str, Any] = {"logprobs": []} if kind == "content" else {}
            done = {**at, "content_index": 0}
            events.append(self.event(f"response.{_PARTS[kind]}.done", **done, text=part["text"], **extra))
            events.append(self.event("response.content_part.done", **done, part=dict(part)))
        events.append(self.event("response.output_item.done", **_index(at), item=_copy(item)))
        return events

    def _begin_item(self, kind: str, reply: Reply, delta: Delta) -> list[Event]:
        self._open = kind
        number = len(self.output)
        if kind == "call":
            item: dict[str, Any] = {
                "id": f"fc_{self._id}_{number}",
                "type": "function_call",
                "status": "in_progress",
                "call_id": reply.call_id(delta.call),
                "name": delta.text,
                "arguments": "",
            }
            self.output.append(item)
            return [self.event("response.output_item.added", **_index(self._at()), item=_copy(item))]
        part: dict[str, Any] = {"type": _PARTS[kind], "text": ""}
        if kind == "content":
            part |= {"annotations": [], "logprobs": []}
            item = {"id": f"msg_{self._id}_{number}", "type": "message", "role": "assistant"}
        else:
            item = {"id": f"rs_{self._id}_{number}", "type": "reasoning", "summary": []}
        item |= {"status": "in_progress", "content": []}
        self.output.append(item)
        added = self.event("response.output_item.added", **_index(self._at()), item=_copy(item))
        item["content"].append(part)
        at = {**self._at(), "content_index": 0}
        return [added, self.event("response.content_part.added", **at, part=dict(part))]

    def _at(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}


@dataclass(frozen=True, slots=True)
class ResponsesWriter(ResponseWriter):
    """Writer of a response of this endpoint.

    Attributes:
        model: Name of the model for clients.
        echoed: Fields of the request that the response repeats.
        created: Seconds since 1970.
    """

    model: str = ""
    echoed: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time()))

    async def whole(self) -> dict[str, Any]:
        """The whole response at once.

        Raises:
            ApiError: The request failed.
        """
        items = self._items()
        async for index, text, _, _ in self._pieces():
            self._add(items, index, text)
        response: dict[str, Any] = self._end(items)[-1]["response"]
        return response

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; the last has the whole response, or the error."""
        items = self._items()
        try:
            for each in items.begin():
                yield _sent(each)
            async for index, text, _, _ in self._pieces():
                for each in self._add(items, index, text):
                    yield _sent(each)
            for each in self._end(items):
                yield _sent(each)
        except ApiError as error:
            told = {"code": "server_error", "message": error.message}
            yield _sent(items.event("response.failed", response=items.response("failed", error=told)))

    def _items(self) -> ResponseItems:
        request_id = self.job.id
        head = {"id": f"resp_{request_id}", "object": "response", "created_at": self.created,
                "model": self.model, **self.echoed}  # fmt: skip
        return ResponseItems(head, request_id)

    def _add(self, items: ResponseItems, index: int, text: str) -> list[Event]:
        reply = self.job.replies[index]
        deltas = reply.deltas
        if reply.message is None:
            deltas = [Delta("content", text)] if text else []
        return [event for delta in deltas for event in items.add(reply, delta)]

    def _end(self, items: ResponseItems) -> list[Event]:
        (reply,) = self.job.replies
        is_cut = reply.reason == "length"
        status = "incomplete" if is_cut else "completed"
        events = items.close("incomplete" if reply.has_cut_call else status)
        used = self._usage()
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": used["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": used["completion_tokens_details"]["reasoning_tokens"]
            },
            "total_tokens": used["total_tokens"],
        }
        details = {"reason": "max_output_tokens"} if is_cut else None
        response = items.response(status, incomplete_details=details, usage=usage) | self._metrics()
        return [*events, items.event(f"response.{status}", response=response)]


_PARTS = {"content": "output_text", "reasoning": "reasoning_text"}


def _index(at: dict[str, Any]) -> dict[str, Any]:
    return {"output_index": at["output_index"]}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is now: events of it are sent before it grows."""
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)


def _sent(event: Event) -> bytes:
    return f"event: {event['type']}\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"
