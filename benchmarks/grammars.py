"""Passes for replies that follow a grammar, with drafts and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.grammar_tasks import SUBJECTS, TASKS
from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.models.loading import load_model

__all__ = ["WAYS", "measure_grammars"]

WAYS = ("alternating", "reversed", "both")
_NEW = 4096
"""Tokens that no reply of a shape needs: each has at most five texts of 40 characters, a character
at most twelve tokens (two escapes of six letters), and the rest is shorter than 200. So no reply is cut."""
_COUNTS = ("requests", "equal", "ended", "valid", "tokens", "steps", "plain_steps")


def measure_grammars(
    model_name: str,
    requests: int,
    *,
    shapes: Sequence[str] = (*TASKS,),
    history: bool = True,
    new: int = _NEW,
    ways: str = "alternating",
) -> dict[str, Any]:
    """Decodes requests of each shape, greedy and seeded, with drafts and without, and compares the replies.

    Args:
        model_name: As for ``--model``.
        requests: Of each shape, each with another subject.
        shapes: Names of those measured.
        history: Whether the requests of one shape draft from the earlier ones.
        new: Tokens of a reply at most.
        ways: One of `WAYS`: "alternating" for a half of the requests greedy and a half seeded, "reversed" for
            the other half of each, "both" for every request both ways.

    Raises:
        InvalidInputError: There is no shape or way of such a name.
    """
    if ways not in WAYS:
        raise InvalidInputError(f"There are no ways {ways!r}.", f"Use one of: {', '.join(WAYS)}.")
    for name in shapes:
        if name not in TASKS:
            raise InvalidInputError(f"There is no shape {name!r}.", f"Use one of: {', '.join(TASKS)}.")
    model, tokenizer = load_model(model_name)
    plain = RetrievalDrafter.for_model(model, tokenizer, method="none")
    # The budget is fixed, so that passes do not depend on the machine's cost of one.
    config = DraftConfig(nodes=32, history_prompts=history, history_replies=history, adjacency_rows=1 << 16)
    found: dict[str, Any] = {}
    for name in shapes:
        task = TASKS[name]
        counts = dict.fromkeys(_COUNTS, 0)
        drafter = RetrievalDrafter.for_model(model, tokenizer, config=config)
        for number, subject, greedy in _requests(requests, ways):
            if not history:
                drafter = RetrievalDrafter.for_model(model, tokenizer, config=config)
            chat = [{"role": "user", "content": task.request.format(subject)}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            sampled = {"do_sample": True, "temperature": 0.8, "seed": number}
            way: dict[str, Any] = {"do_sample": False} if greedy else sampled
            given = {**inputs, "grammar": task.grammar, "max_new_tokens": new, **way}
            expected, drafted = plain.generate(**given), drafter.generate(**given)
            assert plain.last_stats is not None
            assert drafter.last_stats is not None
            reply = drafted[0, inputs["input_ids"].shape[1] :].tolist()
            ended = reply[-1] == tokenizer.eos_token_id
            text = tokenizer.decode(reply[:-1] if ended else reply)
            told = {
                "requests": 1,
                "equal": int(torch.equal(expected, drafted)),
                "ended": int(ended),
                "valid": int(ended and task.follows(text)),
                "tokens": drafter.last_stats.tokens,
                "steps": drafter.last_stats.steps,
                "plain_steps": plain.last_stats.steps,
            }
            counts = {key: counts[key] + told[key] for key in _COUNTS}
        found[name] = {"kind": task.kind, **counts, "fewer_passes": _ratio([counts])}
    kinds = {
        kind: _ratio(these)
        for kind in ("json", "call", "text")
        if (these := [each for each in found.values() if each["kind"] == kind])
    }
    totals = {key: sum(each[key] for each in found.values()) for key in _COUNTS}
    head = {"model": model_name, "history": history, "ways": ways}
    return {**head, "shapes": found, "fewer_passes": kinds, **totals}


def _requests(count: int, ways: str) -> Iterator[tuple[int, str, bool]]:
    """Number and subject of each request, and whether it is greedy."""
    for number, subject in enumerate(SUBJECTS[:count]):
        for greedy in (True, False):
            if ways == "both" or (number % 2 == 0) == (greedy == (ways == "alternating")):
                yield number, subject, greedy


def _ratio(counts: list[dict[str, Any]]) -> float:
    plain, drafted = (sum(int(each[key]) for each in counts) for key in ("plain_steps", "steps"))
    return round(plain / drafted, 2)
