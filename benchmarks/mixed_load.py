"""Many clients with requests of every kind: equal answers, no stalls, no errors, memory that stays."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.idle_loop import IdleLoop
from benchmarks.loopback import posted
from benchmarks.mixed_asks import BAD_ASKS, MixedAsk
from benchmarks.serve_process import ServeProcess

__all__ = [
    "MixedResult",
    "Outcome",
    "answers_alone",
    "ask_bad",
    "ask_mixed",
    "memory_mib",
    "run_mixed",
    "spread_ms",
]

_CANCELLED, _BAD = 0.1, 0.1
"""Shares of requests whose client leaves, and of those that are to be refused."""


@dataclass(slots=True)
class Outcome:
    """Answer to a request.

    Attributes:
        status: Of HTTP; 0 where the client left.
        answer: All that must be equal whenever the same is asked.
        choices: The answer's parts.
        fault: Fault of its form; empty without one.
        gaps: Time and seconds between two pieces of a stream that tells token ids: each step brings one,
            while text may wait for the rest of a character.
        first: Seconds to its first piece.
    """

    status: int = 0
    answer: str = ""
    choices: list[dict[str, Any]] = field(default_factory=list)
    fault: str = ""
    gaps: list[tuple[float, float]] = field(default_factory=list)
    first: float = 0.0


@dataclass(slots=True)
class MixedResult:
    """Results of the clients.

    Attributes:
        counts: Whole answers by kind, those of 429, and requests that were abandoned or refused.
        different: Answers that are not those of the same request alone.
        faults: Answers of a wrong form, and errors of the server's.
        gaps: Second of the run, and seconds between two pieces of a stream.
        firsts: Seconds to the first piece of each stream.
        seconds: From the first request to the last answer.
        resident: Memory of the server from second to second, in bytes.
        data: Part of it that it drafts from or keeps of earlier texts, at the same times; it has limits.
        idle: Second of the run, and seconds by which an idle event loop beside the server woke too late.
    """

    counts: Counter[str] = field(default_factory=Counter)
    different: list[dict[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    seconds: float = 0.0
    resident: list[int] = field(default_factory=list)
    data: list[int] = field(default_factory=list)
    idle: list[tuple[float, float]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Figures of the run; memory is flat from its first quarter on, or it is not."""
        long = [(at, gap, self._idle_ms(at - gap, at)) for at, gap in self.gaps if gap > 0.2]
        return {
            "seconds": self.seconds,
            "counts": dict(self.counts),
            "different": len(self.different),
            "examples": self.different[:3],
            "faults": len(self.faults),
            "fault_examples": self.faults[:5],
            "gap_ms": spread_ms([gap for _, gap in self.gaps]),
            "gaps_over_200_ms": [
                {"second": round(at, 1), "ms": round(gap * 1000), "idle_loop_ms": idle}
                for at, gap, idle in long
            ],
            "gaps_over_200_ms_beyond_the_idle_loop": sum(gap * 1000 - idle > 200 for _, gap, idle in long),
            "idle_loop_late_ms": spread_ms([late for _, late in self.idle]),
            "first_piece_ms": spread_ms(self.firsts),
            "resident_mib": memory_mib(self.resident),
            "data_mib": memory_mib(self.data),
            "besides_data_mib": memory_mib(np.subtract(self.resident, self.data)),
        }

    def _idle_ms(self, begin: float, end: float) -> int:
        """Milliseconds by which the idle loop was late at most, of wakings due or made in a time."""
        return round(
            1000 * max((late for at, late in self.idle if at >= begin and at - late <= end), default=0)
        )


def memory_mib(seen: Sequence[int] | NDArray[np.int64]) -> dict[str, float]:
    """Memory at the start, after each quarter and at most, and its growth a minute after the first quarter.

    Args:
        seen: Bytes from second to second.
    """
    mib = np.asarray(seen) / (1 << 20)
    later = mib[len(mib) // 4 :]
    quarters = mib[np.arange(5) * (len(mib) - 1) // 4].round(1).tolist()
    slope = float(np.polyfit(np.arange(len(later)), later, 1)[0]) if len(later) > 1 else 0.0
    return {"quarters": quarters, "peak": round(float(mib.max()), 1), "per_minute": round(slope * 60, 2)}


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds, and how many there are."""
    if not seconds:
        return {"count": 0}
    median, high, most = np.percentile(np.array(seconds) * 1000, (50, 99, 100)).round(1).tolist()
    return {"count": len(seconds), "p50": median, "p99": high, "largest": most}


def ask_mixed(
    port: int, ask: MixedAsk, *, stream: bool, leave_after: int | None = None, timeout: float = 300.0
) -> Outcome:
    """Sends a request on a connection of its own.

    Args:
        port: On loopback.
        ask: The request.
        stream: Whether the answer comes in pieces.
        leave_after: Pieces of a stream after which the client leaves; a whole answer is not awaited at all.
        timeout: Seconds without data.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    began = time.monotonic()
    try:
        body = json.dumps(ask.body | {"stream": stream})
        connection.request("POST", ask.path, body, {"Content-Type": "application/json"})
        if leave_after is not None and not stream:
            time.sleep(0.01 * leave_after)
            return Outcome()
        response = connection.getresponse()
        out = Outcome(response.status)
        if response.status != 200:
            out.fault = f"{ask.kind}: status {response.status}: {response.read(300)!r}"
            return out
        pieces = _read_stream(response, out, began, leave_after) if stream else [json.loads(response.read())]
        if out.status and not out.fault:
            out.choices = _response_choices(pieces) if "responses" in ask.path else _choices(pieces)
            out.answer = json.dumps(out.choices, sort_keys=True)
            out.fault = _fault(ask, out.choices)
        return out
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        return Outcome(599, fault=f"{ask.kind}: {type(error).__name__}: {error}")
    finally:
        connection.close()


def _read_stream(
    response: http.client.HTTPResponse, out: Outcome, began: float, leave_after: int | None
) -> list[dict[str, Any]]:
    pieces: list[dict[str, Any]] = []
    last, done, tells_ids = 0.0, False, False
    for line in response:
        if not line.startswith(b"data: "):
            continue
        now = time.monotonic()
        data = line[6:].strip()
        if last:
            if tells_ids:
                out.gaps.append((now, now - last))
            last = now
        if data == b"[DONE]":
            done = True
            continue
        pieces.append(json.loads(data))
        tells_ids = tells_ids or b'"token_ids"' in data
        if not last and _says(pieces[-1]):  # what comes before the first token, at once, names the role only
            out.first, last = now - began, now
        done = done or pieces[-1].get("type", "").startswith(("response.completed", "response.incomplete"))
        if error := pieces[-1].get("error") or (pieces[-1].get("response") or {}).get("error"):
            out.fault = f"error {error}"
        if leave_after is not None and len(pieces) > leave_after:
            out.status = 0
            return pieces
    if not done and not out.fault:
        out.fault = f"the stream was cut after {pieces[-1:]}"
    return pieces


def _says(piece: dict[str, Any]) -> bool:
    """True if a piece has a part of the reply."""
    if piece.get("type", "").endswith(".delta"):
        return True
    return any(
        choice.get("token_ids") or choice.get("text") or (choice.get("delta") or {}).get("content")
        for choice in piece.get("choices") or ()
    )


def _choices(pieces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choices of chats and texts, whole or joined of pieces."""
    found: dict[int, dict[str, Any]] = defaultdict(
        lambda: {"content": "", "tokens": [], "calls": [], "end": None}
    )
    for piece in pieces:
        for choice in piece.get("choices") or ():
            mine, message = found[choice["index"]], choice.get("delta") or choice.get("message") or choice
            mine["content"] += message.get("content") or message.get("text") or ""
            mine["tokens"] += choice.get("token_ids") or ()
            mine["end"] = choice.get("finish_reason") or mine["end"]
            for number, call in enumerate(message.get("tool_calls") or ()):
                index = call.get("index", number)
                while len(mine["calls"]) <= index:
                    mine["calls"].append(["", ""])
                mine["calls"][index][0] += call["function"].get("name") or ""
                mine["calls"][index][1] += call["function"].get("arguments") or ""
    return [found[index] for index in sorted(found)]


def _response_choices(pieces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reply of a response, whole or in the last of its events."""
    whole = pieces[-1].get("response") or pieces[-1]
    content = "".join(
        part["text"] for item in whole["output"] if item["type"] == "message" for part in item["content"]
    )
    return [{"content": content, "end": whole["status"], "tokens": whole["usage"]["output_tokens"]}]


def _fault(ask: MixedAsk, choices: Sequence[dict[str, Any]]) -> str:
    for choice in choices:
        if choice["end"] not in ("stop", "length", "tool_calls", "completed", "incomplete"):
            return f"{ask.kind}: it ends by {choice['end']}"
        if choice["end"] in ("stop", "tool_calls") and (fault := ask.fault(choice)):
            return f"{ask.kind}: {fault}"
    return "" if choices else f"{ask.kind}: it has no choices"


def answers_alone(port: int, asks: Sequence[MixedAsk]) -> tuple[list[str], list[str], list[float]]:
    """Answers to each request that has no company, faults, and the gaps of their streams."""
    answers, faults, gaps = [], [], list[float]()
    for number, ask in enumerate(asks):
        told = ask_mixed(port, ask, stream=number % 2 == 0)
        answers.append(told.answer)
        faults += [told.fault] if told.fault else []
        gaps += [gap for _, gap in told.gaps]
    return answers, faults, gaps


def run_mixed(
    server: ServeProcess, asks: Sequence[MixedAsk], expected: Sequence[str], clients: int, seconds: float
) -> MixedResult:
    """Runs clients that send one request after the other, half of them streamed.

    Args:
        server: The server.
        asks: Requests, drawn at random.
        expected: The answer to each.
        clients: At the same time.
        seconds: Time after which no client sends a new request.
    """
    result, lock = MixedResult(), threading.Lock()
    begin = time.monotonic()
    until = begin + seconds

    def work(client: int) -> None:
        draw = random.Random(client)
        while time.monotonic() < until:
            kind = draw.random()
            if kind < _BAD:
                fault = ask_bad(server.port, *draw.choice(BAD_ASKS))
                with lock:
                    result.counts["refused, as they must be"] += not fault
                    result.faults += [fault] if fault else []
                continue
            index = draw.randrange(len(asks))
            leave = draw.randint(0, 20) if kind < _BAD + _CANCELLED else None
            told = ask_mixed(server.port, asks[index], stream=draw.random() < 0.5, leave_after=leave)
            with lock:
                result.gaps += [(at - begin, gap) for at, gap in told.gaps]
                result.firsts += [told.first] if told.first else []
                if told.status == 429:
                    result.counts["429"] += 1
                elif told.fault:
                    result.faults.append(told.fault)
                elif not told.status:
                    result.counts["given up"] += 1
                else:
                    result.counts[asks[index].kind] += 1
                    if told.answer != expected[index]:
                        result.different.append(
                            {"ask": repr(asks[index])[:600], "told": told.answer, "alone": expected[index]}
                        )

    with IdleLoop() as idle:
        memory = server.memory_while(work, clients)
        result.seconds = time.monotonic() - begin
    result.resident, result.data = map(list, zip(*memory, strict=True))
    result.idle = [(at - begin, late) for at, late in idle.late]
    return result


def ask_bad(port: int, path: str, body: bytes | dict[str, Any]) -> str:
    """Fault of the answer to a request that is to be refused; empty without one."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with posted(port, path, sent) as response:
            told = response.read()
        if 400 <= response.status < 500 and json.loads(told)["error"]["message"]:
            return ""
        return f"{path} {sent[:80]!r}: status {response.status}: {told[:200]!r}"
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        return f"{path} {sent[:80]!r}: {type(error).__name__}: {error}"
