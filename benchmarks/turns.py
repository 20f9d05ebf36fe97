"""Time to the first token of a conversation's turns, on a server that keeps keys of earlier texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.loopback import posted
from benchmarks.serve_process import ServeProcess

__all__ = ["first_token", "measure_turns"]

_IDS = (1000, 40000)
"""Range of the tokens of prompts."""


def measure_turns(
    model: str, *, tokens: int = 2000, new: int = 40, rounds: int = 5, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Sends conversations of random tokens: a first turn, and a second one with the first before it.

    The second turn goes to the server once more with another first token, so that nothing of it is known: the
    cold one that it is compared with. Both orders take turns.

    Args:
        model: Name or folder of a model.
        tokens: Of the first prompt.
        new: Of the second turn, after prompt and reply.
        rounds: Conversations.
        options: Further ones of ``serve``.

    Returns:
        Median seconds to the first token, the median of their ratios, and the share of tokens that was known.
    """
    draw = random.Random(0)
    server = ServeProcess(["--model", model, *options])
    cold: list[float] = []
    warm: list[float] = []
    known: list[float] = []
    try:
        first_token(server.port, [draw.randrange(*_IDS) for _ in range(64)])
        for number in range(rounds):
            prompt = [draw.randrange(*_IDS) for _ in range(tokens)]
            _, reply, _ = first_token(server.port, prompt)
            text = [*prompt, *reply, *(draw.randrange(*_IDS) for _ in range(new))]
            other = [prompt[0] + 1, *text[1:]]
            for given in (text, other) if number % 2 else (other, text):
                seconds, _, cached = first_token(server.port, given)
                (cold if given is other else warm).append(seconds)
                known += [cached / len(given)] if given is text else []
                if given is other and cached:
                    raise RuntimeError(f"{cached} tokens of a new text are known.")
    finally:
        server.stop()
    ratios = [mine / whole for mine, whole in zip(warm, cold, strict=True)]
    return {
        "cold_seconds": median(cold),
        "second_turn_seconds": median(warm),
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "cached_share": median(known),
        "tokens": tokens,
        "rounds": rounds,
    }


def first_token(port: int, prompt: Sequence[int], count: int = 16) -> tuple[float, list[int], int]:
    """Seconds to the first token, the reply's tokens, and the prompt's tokens that the server knew.

    Args:
        port: On loopback.
        prompt: Token ids.
        count: Tokens of the reply.
    """
    body = {
        "prompt": list(prompt), "max_tokens": count, "temperature": 0, "stream": True, "ignore_eos": True,
        "return_token_ids": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, seconds, cached = perf_counter(), 0.0, 0
    reply: list[int] = []
    with posted(port, "/v1/completions", body) as response:
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read(300)!r}")
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            piece = json.loads(data)
            for choice in piece["choices"]:
                seconds = seconds or perf_counter() - began
                reply += choice["token_ids"]
            if piece.get("usage"):
                cached = piece["usage"]["prompt_tokens_details"]["cached_tokens"]
    return seconds, reply, cached
