"""Whether a reply is the greedy one, and if not, whether a near tie of two logits excuses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from retrieval_draft.bench.teacher_forcing import reply_logits

__all__ = ["TIE", "Verdict", "judge"]

TIE = 1e-4
"""Two logits so close count as a tie: float32 sums in another order can swap them."""

Verdict = Literal["equal", "tie", "different"]


def judge(model: Any, prompt: Sequence[int], stock: Sequence[int], reply: Sequence[int]) -> Verdict:
    """Compares `reply` with the greedy reply `stock`, token for token.

    Where they part, the plain model runs over the prompt and the whole reply: it is a tie when every
    token of the reply from there on is within `TIE` of the best logit at its place. So a reply is not
    excused for what follows a tie.

    Args:
        model: The target model.
        prompt: Token ids.
        stock: What `model.generate` returned after the prompt.
        reply: What the other method returned.
    """
    if list(stock) == list(reply):
        return "equal"
    same = 0
    while same < min(len(stock), len(reply)) and stock[same] == reply[same]:
        same += 1
    if same == len(reply) or same == len(stock):
        return "different"
    logits = reply_logits(model, [*prompt, *reply[:same]], reply[same:])
    chosen = logits.gather(1, torch.tensor(reply[same:], device=logits.device)[:, None])[:, 0]
    return "tie" if bool((logits.amax(1) - chosen <= TIE).all()) else "different"
