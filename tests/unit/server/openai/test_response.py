"""From the tokens of a request to its response, whole and in pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.detokenize import ReplyText
from retrieval_draft.server.openai.format import CompletionFormat
from retrieval_draft.server.openai.reply import Reply
from retrieval_draft.server.openai.response import DONE, ResponseWriter, event
from retrieval_draft.server.scheduler.channel import Channel, Ended, Event, Failed, Tokens
from retrieval_draft.server.scheduler.job import Job


def letters(ids: Sequence[int]) -> str:
    """Token 1 is "a", 2 "b" and so on."""
    return "".join(chr(96 + token) for token in ids)


def tokens(index: int, *values: int, accepted: int = 0) -> Tokens:
    return Tokens(index, values, (), accepted)


def over(index: int, logprob: float = 0.0) -> Ended:
    return Ended(
        index, "stop", DraftStats(requests=1, tokens=2, steps=1, drafted=3, accepted=1), logprob, {1: 1}
    )


def writer(*events: Event, choices: int = 1, prompts: int = 1, **options: Any) -> ResponseWriter:
    """Of a request for which the engine has said all that it will; needs a running loop."""
    channel = Channel(asyncio.get_running_loop(), 100, lambda: None)
    channel.put(events)
    nothing: Any = None
    replies = [Reply([index], ReplyText(letters), [1, 5]) for index in range(choices)]
    job = Job("id", "t", nothing, channel, 60.0, replies=replies, prompt_tokens=7, predicted=[5, 1])
    job.prompts = prompts
    shape = CompletionFormat("id", "m", nothing, False, False)
    given = {"kept": None, "with_usage": False, "with_metrics": False, **options}
    return ResponseWriter(job, shape, **given)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def sent(made: ResponseWriter) -> list[Any]:
    """Every event of a stream, read as a client would."""
    found = []
    async for each in made.events():
        assert each.startswith(b"data: ")
        assert each.endswith(b"\n\n")
        found.append("[DONE]" if each == DONE else json.loads(each[6:]))
    return found


def texts(events: list[Any], index: int = 0) -> list[str]:
    choices = [choice for each in events if isinstance(each, dict) for choice in each.get("choices", ())]
    return [choice["text"] for choice in choices if choice["index"] == index]


def test_an_event_is_one_line_of_json() -> None:
    assert event({"text": "a\nb"}) == b'data: {"text":"a\\nb"}\n\n'


def test_a_whole_response_waits_for_every_choice() -> None:
    async def check() -> None:
        made = writer(tokens(1, 2), over(1), tokens(0, 1), choices=2)
        waiting = asyncio.ensure_future(made.whole())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        made.job.channel.put([tokens(0, 3), over(0)])
        body = await waiting
        assert [(each["text"], each["finish_reason"]) for each in body["choices"]] == [
            ("ac", "stop"),
            ("b", "stop"),
        ]
        assert body["usage"]["prompt_tokens"] == 7
        assert body["usage"]["completion_tokens"] == 3
        assert body["usage"]["total_tokens"] == 10
        assert "metrics" not in body

    run(check)


def test_predicted_tokens_are_part_of_the_usage() -> None:
    async def check() -> None:
        body = await writer(tokens(0, 1, 2, accepted=1), over(0)).whole()
        details = body["usage"]["completion_tokens_details"]
        assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (1, 1)

    run(check)


def test_a_stream_has_each_piece_once_the_reason_and_the_end() -> None:
    async def check() -> None:
        events = await sent(writer(tokens(0, 1), tokens(1, 2), tokens(0, 3, 4), over(0), over(1), choices=2))
        assert (texts(events), texts(events, 1)) == (["a", "cd", ""], ["b", ""])
        reasons = [each["choices"][0]["finish_reason"] for each in events[:-1]]
        assert reasons == [None, None, None, "stop", "stop"]
        assert events[-1] == "[DONE]"

    run(check)


@pytest.mark.parametrize(("usage", "metrics"), [(True, False), (False, True), (True, True)])
def test_usage_and_metrics_come_last_and_only_where_they_are_wanted(usage: bool, metrics: bool) -> None:
    async def check() -> None:
        *pieces, last, done = await sent(
            writer(tokens(0, 1), over(0), with_usage=usage, with_metrics=metrics)
        )
        assert done == "[DONE]"
        assert last["choices"] == []
        assert ("usage" in last, "metrics" in last) == (usage, metrics)
        assert not any("usage" in piece or "metrics" in piece for piece in pieces)

    run(check)


def test_marks_say_which_pieces_were_drafted() -> None:
    async def check() -> None:
        events = await sent(writer(tokens(0, 1, 2, 3, accepted=2), over(0), with_marks=True))
        assert events[0]["draft_marks"] == [
            {"text": "a", "drafted": True}, {"text": "b", "drafted": True}, {"text": "c", "drafted": False},
        ]  # fmt: skip
        plain = await sent(writer(tokens(0, 1), over(0)))
        assert "draft_marks" not in plain[0]

    run(check)


def test_a_failure_is_an_event_of_a_stream_and_raised_from_a_whole_response() -> None:
    async def check() -> None:
        failed = Failed(ApiError(504, "too long"))
        events = await sent(writer(tokens(0, 1), failed))
        assert texts(events) == ["a"]
        assert events[1]["error"]["message"] == "too long"
        assert events[1]["error"]["code"] == 504
        assert events[2:] == ["[DONE]"]
        with pytest.raises(ApiError, match="too long"):
            await writer(tokens(0, 1), failed).whole()

    run(check)


def test_of_competing_samples_the_best_of_each_prompt_are_returned() -> None:
    async def check() -> None:
        taken = [tokens(0, 1), tokens(1, 2), tokens(2, 3, 3), tokens(3, 4)]
        ends = [over(0, -2.0), over(1, -1.0), over(2, -3.0), over(3, -1.6)]
        body = await writer(*taken, *ends, choices=4, prompts=2, kept=1).whole()
        assert [(each["index"], each["text"]) for each in body["choices"]] == [(0, "b"), (1, "cc")]

    run(check)


def test_one_that_hangs_up_is_not_answered_and_leaves() -> None:
    async def check() -> None:
        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        gone: list[int] = []
        response = await writer(tokens(0, 1)).unless_gone(receive, lambda: gone.append(1))
        assert (response.status_code, gone) == (499, [1])

    run(check)


def test_one_that_waits_is_answered_and_leaves_once() -> None:
    async def check() -> None:
        async def receive() -> dict[str, str]:
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        gone: list[int] = []
        response = await writer(tokens(0, 1), over(0)).unless_gone(receive, lambda: gone.append(1))
        assert (response.status_code, gone) == (200, [1])
        assert json.loads(bytes(response.body))["choices"][0]["text"] == "a"
        with pytest.raises(ApiError):
            await writer(Failed(ApiError(500, "no"))).unless_gone(receive, lambda: gone.append(2))
        assert gone == [1, 2]

    run(check)
