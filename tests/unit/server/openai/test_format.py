"""Replies in the words of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine.sampling.token_logprobs import TokenLogprobs
from retrieval_draft.server.openai import format as format_module
from retrieval_draft.server.openai.detokenize import ReplyText
from retrieval_draft.server.openai.format import ChatFormat, CompletionFormat
from retrieval_draft.server.openai.prompt_logprobs import PromptLogprobs
from retrieval_draft.server.openai.reply import Reply
from retrieval_draft.server.scheduler.channel import Ended, Tokens

HEAD = {"id": "id", "created": 1000, "model": "m"}
USAGE = {"total_tokens": 3}


class Texts:
    """Token 1 is "a", 2 "b" and so on."""

    def text(self, token: int) -> str:
        return chr(96 + token)

    def bytes(self, token: int) -> list[int]:
        return [96 + token]


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_module, "time", lambda: 1000.7)


def made(kind: type[Any], ids: bool = False, logprobs: bool = False) -> Any:
    return kind("id", "m", Texts(), ids, logprobs)


def reply(
    *indices: int, tokens: Sequence[int] = (), ends: bool = True, logprobs: Sequence[Any] = (), **more: Any
) -> Reply:
    """A reply of the given tokens."""
    found = Reply(indices or [0], ReplyText(lambda ids: "".join(map(Texts().text, ids))), [9], **more)
    found.take(Tokens(0, tokens, logprobs, 0))
    if ends:
        found.end(Ended(0, "stop", DraftStats(), 0.0, {}))
    return found


LOGPROBS = [TokenLogprobs(1, -0.5, [2], [-0.25]), TokenLogprobs(2, -float("inf"), [2], [-1.0])]


def test_a_whole_completion() -> None:
    replies = [reply(1, tokens=[2]), reply(0, tokens=[1, 2])]
    assert made(CompletionFormat).whole(replies, USAGE) == {
        **HEAD,
        "object": "text_completion",
        "choices": [
            {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"},
            {"index": 1, "text": "b", "logprobs": None, "finish_reason": "stop"},
        ],
        "usage": USAGE,
    }


def test_a_whole_chat_completion() -> None:
    assert made(ChatFormat, ids=True).whole([reply(tokens=[1, 2])], USAGE) == {
        **HEAD,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "token_ids": [1, 2],
            }
        ],
        "usage": USAGE,
    }


@pytest.mark.parametrize("kind", [CompletionFormat, ChatFormat])
def test_a_greedy_reply_is_told_as_often_as_it_is_wanted(kind: Any) -> None:
    format = made(kind)
    both = reply(0, 1, tokens=[1])
    assert [choice["index"] for choice in format.whole([both], USAGE)["choices"]] == [0, 1]
    pieces = format.piece(both, "a", 0, 1)
    assert [piece["choices"][0]["index"] for piece in pieces] == [0, 1]


def test_pieces_of_a_completion() -> None:
    format, going = made(CompletionFormat, ids=True), reply(tokens=[1, 2], ends=False)
    assert format.begin(going) == []
    assert format.piece(going, "b", 1, 2) == [
        {
            **HEAD,
            "object": "text_completion",
            "choices": [{"index": 0, "text": "b", "logprobs": None, "finish_reason": None, "token_ids": [2]}],
        }
    ]


def test_pieces_of_a_chat() -> None:
    format, going = made(ChatFormat), reply(tokens=[1], ends=False)
    (begin,) = format.begin(going)
    assert begin["object"] == "chat.completion.chunk"
    assert begin["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    (piece,) = format.piece(going, "a", 0, 1)
    assert piece["choices"] == [
        {"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}
    ]
    (end,) = format.piece(reply(tokens=[1]), "", 1, 1)
    assert end["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]


@pytest.mark.parametrize("kind", [CompletionFormat, ChatFormat])
def test_a_piece_that_says_nothing_is_not_sent(kind: Any) -> None:
    going = reply(tokens=[1], ends=False)
    assert made(kind).piece(going, "", 0, 1) == []
    assert len(made(kind, ids=True).piece(going, "", 0, 1)) == 1, "ids are returned even where the text waits"
    assert len(made(kind).piece(reply(tokens=[1]), "", 1, 1)) == 1, "and so is the reason"


def test_the_last_piece_has_no_choices() -> None:
    assert made(ChatFormat).last(None) == {**HEAD, "object": "chat.completion.chunk", "choices": []}
    assert made(ChatFormat).last(USAGE)["usage"] == USAGE


def test_log_probabilities_of_a_completion() -> None:
    (choice,) = made(CompletionFormat, logprobs=True).whole([reply(tokens=[1, 2], logprobs=LOGPROBS)], USAGE)[
        "choices"
    ]
    assert choice["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -9999.0],  # JSON has no minus infinity
        "top_logprobs": [{"b": -0.25, "a": -0.5}, {"b": -9999.0}],
        "text_offset": [0, 1],
    }


def test_log_probabilities_of_a_chat() -> None:
    (choice,) = made(ChatFormat, logprobs=True).whole([reply(tokens=[1], logprobs=LOGPROBS[:1])], USAGE)[
        "choices"
    ]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [{"token": "b", "logprob": -0.25, "bytes": [98]}],
            }
        ],
        "refusal": None,
    }


def test_an_echoed_prompt_stands_before_the_reply_with_its_log_probabilities() -> None:
    prompt: Any = PromptLogprobs([9, 8], 1)
    prompt.logprobs = [TokenLogprobs(8, -2.0, [7], [-1.5])]
    echoed = {"prompt_text": "ih", "prompt_logprobs": prompt, "prompt_offsets": [0, 1]}
    found = reply(tokens=[1], logprobs=LOGPROBS[:1], **echoed)
    found.prompt = [9, 8]
    format = made(CompletionFormat, logprobs=True)
    (choice,) = format.whole([found], USAGE)["choices"]
    assert choice["text"] == "iha"
    assert choice["logprobs"] == {
        "tokens": ["i", "h", "a"],
        "token_logprobs": [None, -2.0, -0.5],
        "top_logprobs": [None, {"g": -1.5, "h": -2.0}, {"b": -0.25, "a": -0.5}],
        "text_offset": [0, 1, 2],
    }
    (begin,) = format.begin(found)
    assert begin["choices"][0]["text"] == "ih"
    assert begin["choices"][0]["logprobs"]["text_offset"] == [0, 1]
    (piece,) = format.piece(found, "a", 0, 1)
    assert piece["choices"][0]["logprobs"]["text_offset"] == [2]


def test_tokens_of_a_stop_string_stand_at_the_end_of_the_text() -> None:
    found = Reply([0], ReplyText(lambda ids: "".join(map(Texts().text, ids)), stops=["bc"]), [9])
    found.take(Tokens(0, [1, 2, 3], [*LOGPROBS, LOGPROBS[0]], 0))
    found.end(Ended(0, "stop", DraftStats(), 0.0, {}))
    (choice,) = made(CompletionFormat, logprobs=True).whole([found], USAGE)["choices"]
    assert choice["text"] == "a"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1]
