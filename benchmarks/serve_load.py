"""Load of many clients on one server: no answer lost or mixed up, every answer as offline."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serve_client import Ask, Told, ask_server
from benchmarks.serve_process import ServeProcess

__all__ = ["LoadResult", "check_answers", "make_asks", "run_load"]

NEAR = 1e-4
"""Distance of logits whose order may change when a pass has other rows."""


@dataclass(slots=True)
class LoadResult:
    """Results of the clients.

    Attributes:
        answers: Number of times that each answer came to each request.
        wrong: Answers that were not whole, with a reason.
        refused: Answers of 429, whose requests were repeated.
        tokens: Of all replies.
        seconds: From the first request to the last answer.
        resident: Memory of the server from second to second, in bytes.
    """

    answers: dict[Ask, Counter[Told]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resident: list[int] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """Answers in all."""
        return sum(count.total() for count in self.answers.values()) + len(self.wrong)


def make_asks(count: int, seed: int = 0) -> list[Ask]:
    """Requests with prompts of random words, some of them greedy."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    asks = []
    for number in range(count):
        words = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(draw.randint(1, 40))]
        temperature = 0.0 if number % 4 == 0 else draw.choice((0.5, 1.0))
        asks.append(Ask(" ".join(words), draw.randrange(1 << 40), draw.randint(1, 96), temperature))
    return asks


def run_load(server: ServeProcess, asks: Sequence[Ask], clients: int, seconds: float) -> LoadResult:
    """Runs clients that send one request after the other, half of them streamed.

    Args:
        server: The server.
        asks: Requests, drawn at random.
        clients: At the same time.
        seconds: Time after which no client sends a new request.
    """
    result, lock = LoadResult(), threading.Lock()
    until = time.monotonic() + seconds

    def work(client: int) -> None:
        draw, turn = random.Random(client), 0
        while time.monotonic() < until:
            ask, turn = draw.choice(asks), turn + 1
            told = ask_server(server.port, ask, stream=draw.random() < 0.5, name=f"c{client}-{turn}")
            with lock:
                if told.wrong.startswith("status 429"):
                    result.refused += 1
                elif told.wrong:
                    result.wrong.append(told.wrong)
                else:
                    result.tokens += len(told.tokens)
                    result.answers.setdefault(ask, Counter())[told] += 1

    begin = time.monotonic()
    result.resident = [resident for resident, _ in server.memory_while(work, clients)]
    result.seconds = time.monotonic() - begin
    return result


def check_answers(result: LoadResult, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Compares every answer with the library's own offline, without drafts.

    Args:
        result: Of `run_load`.
        model: The model that the server serves.
        tokenizer: Its tokenizer.

    Returns:
        Numbers of equal answers, of those that differ at logits closer than `NEAR`, and of other ones.
    """
    from retrieval_draft.drafter import RetrievalDrafter

    drafter = RetrievalDrafter.for_model(model, tokenizer, method="none")
    counts: Counter[str] = Counter()
    examples = []
    for ask, answers in result.answers.items():
        expected, ids = _offline(drafter, tokenizer, ask)
        text = tokenizer.decode(expected, skip_special_tokens=True)
        for told, times in answers.items():
            kind = "equal"
            if list(told.tokens) != expected:
                kind = "near_ties" if _is_near_tie(drafter, ids, ask, expected, told.tokens) else "different"
            elif told.text != text:
                kind = "different"
            counts[kind] += times
            if kind == "different":
                examples.append({"ask": repr(ask), "told": repr(told), "expected": expected})
    return {
        **{kind: counts[kind] for kind in ("equal", "near_ties", "different")},
        "distinct_requests": len(result.answers),
        "examples": examples[:3],
    }


def _offline(drafter: Any, tokenizer: Any, ask: Ask) -> tuple[list[int], Any]:
    ids = tokenizer(ask.prompt, return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"do_sample": False}
    if ask.temperature > 0:
        options = {"do_sample": True, "temperature": ask.temperature, "top_k": 0, "seed": ask.seed}
    out = drafter.generate(ids, max_new_tokens=ask.max_tokens, **options)
    return out[0, ids.shape[1] :].tolist(), ids


def _is_near_tie(drafter: Any, ids: Any, ask: Ask, expected: list[int], told: Sequence[int]) -> bool:
    """True if both differ first where the two best keyed logits are closer than `NEAR`."""
    import torch

    from retrieval_draft.engine.sampling.noise import GumbelNoise

    at = next((p for p, (a, b) in enumerate(zip(expected, told, strict=False)) if a != b), None)
    if at is None:
        return False
    target = drafter.continuous.target
    text = torch.cat([ids, torch.tensor([expected[:at]], dtype=torch.int64)], 1)
    with torch.no_grad():
        logits = target.model(text).logits[0, -1].float()
    if ask.temperature > 0:
        noise = GumbelNoise(ask.seed, len(logits), target.device)
        logits = logits / ask.temperature + noise.at(text.shape[1])
    best = logits.topk(2)
    return {expected[at], told[at]} == set(best.indices.tolist()) and float(
        best.values[0] - best.values[1]
    ) < NEAR
