"""An agent's conversation with one server: time to the first token of each turn, and its replies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.agent_script import Turn
from benchmarks.child_process import stop_process
from benchmarks.loopback import get_status, posted
from benchmarks.serve_process import ServeProcess
from retrieval_draft.errors import RetrievalDraftError

__all__ = ["AgentRun", "run_agent", "serving", "transformers_serving"]


@dataclass(slots=True)
class AgentRun:
    """A whole conversation.

    Attributes:
        texts: Of the replies.
        tokens: Ids of each reply, where the server tells them.
        counts: Tokens of each reply.
        first_seconds: From request to first token, of each turn.
        seconds: Of each turn.
        prompt_tokens: Of each turn.
        cached_tokens: Those of them that were not passed again.
        steps: Verification passes.
        decoded: Tokens that they brought.
    """

    texts: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    steps: int = 0
    decoded: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Figures of the run."""
        return {
            "seconds": sum(self.seconds),
            "tokens": sum(self.counts),
            "tokens_per_second": sum(self.counts) / sum(self.seconds),
            "first_token_seconds": {
                "cold": self.first_seconds[0],
                "median_later": median(self.first_seconds[1:] or self.first_seconds),
                "largest_later": max(self.first_seconds[1:] or self.first_seconds),
                "last": self.first_seconds[-1],
            },
            "tokens_per_step": self.decoded / self.steps if self.steps else None,
            "cached_share": sum(self.cached_tokens) / max(sum(self.prompt_tokens), 1),
            "last_prompt_tokens": self.prompt_tokens[-1],
        }


def run_agent(port: int, model: str, turns: Sequence[Turn], max_tokens: int, ours: bool) -> AgentRun:
    """Sends the turns one after the other, each streamed.

    Args:
        port: On loopback.
        model: The served model's name.
        turns: The requests.
        max_tokens: Of a reply.
        ours: Whether the server has the extensions of ``retrieval-draft serve``.

    Raises:
        RetrievalDraftError: The server answers with an error.
    """
    run = AgentRun()
    for messages in turns:
        body: dict[str, Any] = {
            "model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True,
        }  # fmt: skip
        if ours:
            body |= {"stream_options": {"include_usage": True}, "return_token_ids": True, "metrics": True}
        _turn(run, port, body)
    return run


def _turn(run: AgentRun, port: int, body: dict[str, Any]) -> None:
    text, tokens, usage, first = "", list[int](), dict[str, Any](), 0.0
    began = time.perf_counter()
    for piece in _pieces(port, body):
        usage = piece.get("usage") or usage
        speculative = (piece.get("metrics") or {}).get("speculative_decoding")
        if speculative:
            run.steps += speculative["num_steps"]
            run.decoded += speculative["num_steps"] * speculative["tokens_per_step"]
        for choice in piece.get("choices") or ():
            text += choice["delta"].get("content") or ""
            tokens += choice.get("token_ids") or ()
            if not first and (choice["delta"].get("content") or choice.get("token_ids")):
                first = time.perf_counter()
    ended = time.perf_counter()
    run.texts.append(text)
    run.tokens.append(tokens)
    run.counts.append(usage.get("completion_tokens", len(tokens)))
    run.first_seconds.append((first or ended) - began)
    run.seconds.append(ended - began)
    run.prompt_tokens.append(usage.get("prompt_tokens", 0))
    run.cached_tokens.append((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def _pieces(port: int, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with posted(port, "/v1/chat/completions", body, seconds=600) as response:
        if response.status != 200:
            raise RetrievalDraftError(f"The server answers {response.status}: {response.read(300)!r}.")
        for line in response:
            data = line.decode().strip()
            if data.startswith("data: ") and data != "data: [DONE]":
                piece = json.loads(data.removeprefix("data: "))
                if "error" in piece:
                    raise RetrievalDraftError(f"The stream ends with an error: {piece['error']}.")
                yield piece


@contextmanager
def serving(options: Sequence[str]) -> Iterator[int]:
    """The port of ``retrieval-draft serve`` with these options."""
    server = ServeProcess(options)
    try:
        yield server.port
    finally:
        server.stop()


@contextmanager
def transformers_serving(model: str, threads: int | None, seconds: float = 300.0) -> Iterator[int]:
    """The port of ``transformers serve`` with a model in float32.

    Raises:
        RetrievalDraftError: It ended, or is not ready in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", model,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        until = time.monotonic() + seconds
        while get_status(port) != 200:
            if process.poll() is not None or time.monotonic() > until:
                raise RetrievalDraftError("transformers serve did not start.", f"Run: {' '.join(command)}")
            time.sleep(0.2)
        yield port
    finally:
        stop_process(process)
