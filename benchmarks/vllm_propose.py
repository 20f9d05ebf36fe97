"""Cost of proposing in a large vLLM batch, without vLLM: synthetic arrays, real calls."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from retrieval_draft.bench.measuring import percentiles
from retrieval_draft.bench.provenance import provenance
from retrieval_draft.bench.synthetic_text import SyntheticText
from retrieval_draft.config import SOURCES, DraftConfig
from retrieval_draft.drafting.batch import ChainBatch
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.integrations.vllm.row_drafter import RowDrafter
from retrieval_draft.integrations.vllm.step_costs import StepCosts

__all__ = ["measure_propose"]

VOCABULARY = 32000
EARLIER = 200
"""Earlier requests that the history holds."""

WARM = 5


def measure_propose(
    *, requests: int, context: int, steps: int, drafts: int, threads: int = 1, history: bool = True
) -> dict[str, Any]:
    """Times whole calls of the proposer: matching rows to requests, appending, drafting, choosing lengths.

    Each request's text is synthetic, repeats phrases as text does, and continues with its own true
    continuation. A row emits the correct part of its last draft and one token more, as after verification;
    one pair of rows is swapped before every step.

    Args:
        requests: Rows of the batch.
        context: Tokens of each text at the start.
        steps: Number of steps to time.
        drafts: Tokens of a draft at most.
        threads: Number that propose.
        history: Whether earlier requests are drafted from too.

    Returns:
        ``{"propose_ms": {"p50", "p99", "mean", "least"}, "drafted_per_row", "accepted_per_row", ...}``.

    Raises:
        InvalidInputError: A number is too small.
    """
    for name, value in (("requests", requests), ("context", context), ("steps", steps), ("drafts", drafts)):
        if value < 1:
            raise InvalidInputError(f"{name} is {value}; it must be 1 or more.")
    text = SyntheticText(VOCABULARY)
    width = context + (steps + WARM + 1) * (drafts + 1) + 1
    truth = np.stack([text.tokens(width, row + 1) for row in range(requests)])
    sources = tuple(name for name in SOURCES if history or name != "history")
    chains = ChainBatch(
        DraftStores(VOCABULARY), DraftConfig(sources=sources), max_chain=drafts, threads=threads
    )
    chains.warm_up()
    if history:
        for earlier in range(EARLIER):
            chains.close(chains.open(text.tokens(1000, 10_000 + earlier)))
        chains.flush()
    rows = RowDrafter(
        chains,
        most=drafts,
        max_rows=requests,
        max_length=width,
        vocabulary=VOCABULARY,
        costs=StepCosts(),
    )
    milliseconds, accepted = _run(rows, truth, context, steps)
    chains.shut_down()
    return {
        "propose_ms": percentiles(milliseconds, 50, 99, 0, mean=True),
        "drafted_per_row": rows.drafted / (requests * rows.steps),
        "accepted_per_row": accepted / (requests * (rows.steps - 1)),
        "requests": requests,
        "context": context,
        "drafts": drafts,
        "threads": threads,
        "history_tokens": EARLIER * 1000 if history else 0,
        "provenance": provenance(),
    }


def _run(rows: RowDrafter, truth: Any, context: int, steps: int) -> tuple[list[float], int]:
    requests = len(truth)
    token_ids = np.zeros(truth.shape, np.int32)
    token_ids[:, : context + 1] = truth[:, : context + 1]
    lengths = np.full(requests, context + 1, np.int32)
    order = np.arange(requests)  # index of each row's text
    sampled = token_ids[:, context : context + 1].tolist()
    draw = np.random.default_rng(0)
    milliseconds, accepted = [], 0
    for step in range(steps + WARM):
        begin = time.perf_counter()
        drafts = rows.propose(sampled, lengths, token_ids)
        if step >= WARM:
            milliseconds.append((time.perf_counter() - begin) * 1000)
        sampled = []
        for row, draft in enumerate(drafts):
            length = int(lengths[row])
            going_on = truth[order[row], length : length + len(draft) + 1].tolist()
            right = 0
            while right < len(draft) and draft[right] == going_on[right]:
                right += 1
            sampled.append(going_on[: right + 1])
            accepted += right
            token_ids[row, length : length + right + 1] = going_on[: right + 1]
            lengths[row] += right + 1
        if requests > 1:
            one, other = draw.choice(requests, 2, replace=False)
            for array in (token_ids, lengths, order):
                array[[one, other]] = array[[other, one]]
            sampled[one], sampled[other] = sampled[other], sampled[one]
    return milliseconds, accepted
