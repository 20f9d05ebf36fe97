"""Comparison of a reply with the greedy one, with near ties of logits excused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from retrieval_draft.bench.ties import TIE, compare, count_ties

__all__ = ["TIE", "Outcome", "compare_outputs"]

Outcome = Literal["equal", "tie", "different"]


def compare_outputs(model: Any, prompt: Sequence[int], stock: Sequence[int], reply: Sequence[int]) -> Outcome:
    """Compares `reply` with the greedy reply `stock`, token for token.

    If they differ, the plain model runs over the prompt and the whole reply: it is a tie when every token
    of the reply from there on is within `TIE` of the best logit at its position, in half precision within two
    units in the last place. So tokens after a tie are not excused.

    Args:
        model: The target model.
        prompt: Token ids.
        stock: Tokens that `model.generate` returned after the prompt.
        reply: Tokens that the other method returned.
    """
    same = compare(stock, reply)
    if same is None:
        return "equal"
    if same in (len(reply), len(stock)):
        return "different"
    return "different" if count_ties(model, [*prompt, *reply[:same]], reply[same:]).worse else "tie"
