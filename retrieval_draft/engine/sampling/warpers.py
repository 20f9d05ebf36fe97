"""Temperature, top-k, top-p and min-p in one kernel with the draw, in place of transformers' warpers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from retrieval_draft.engine.logits import BestLogits, Wanted

__all__ = ["BEST", "Choice", "Warpers", "split"]

BEST = 128
"""Best logits of a node that are read where there are filters. Of half precision many may equal the last."""

_NO_SCORES, _NO_TOKENS = np.empty(0, np.float32), np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token.

    Attributes:
        token: Its id.
        logprob: Natural logarithm of its probability; NaN unless requested.
    """

    token: int
    logprob: float


def split(processors: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Cuts off the longest tail that `Warpers` can replace.

    Args:
        processors: Logits processors in their order.

    Returns:
        Those that must run as they are, and the tail. Together they are `processors`.
    """
    head, tail = list(processors), list[Any]()
    while (
        head and _is_known(head[-1]) and not (_is_temperature(head[-1]) and any(map(_is_temperature, tail)))
    ):
        tail.insert(0, head.pop())
    return head, tail


class Warpers:
    """Chooses a token of a row as if warpers of transformers had run on it, without a copy of the row.

    Keeps the same tokens (transformers/generation/logits_process.py): top-k all that equal the k-th value,
    top-p all but the smallest tokens that sum up to 1 - p at most, min-p those with at least min_p times the
    probability of the best. transformers leaves open which of equal scores top-p keeps; here it keeps those
    with higher ids.

    Args:
        tail: Of `split`. Without any, the row is drawn from as it is.

    Example:
        With temperature 2 and top-k 2, ``[4.0, 2.0, 0.0]`` becomes ``[2.0, 1.0, -inf]``: token 0 is drawn
        with probability 0.73.
    """

    def __init__(self, tail: Sequence[Any] = ()) -> None:
        steps = [step for warper in tail if (step := _step(warper)) is not None]
        self._kinds = np.array([kind for kind, _, _ in steps], np.int64)
        self._numbers = np.array([number for _, number, _ in steps], np.float64)
        self._keeps = np.array([keep for _, _, keep in steps], np.int64)
        self._filters = any(not _is_temperature(warper) for warper in tail)
        self._scratch = _scratch(0)

    @property
    def temperature(self) -> float:
        """Number of the first warper if it is a temperature; else 1."""
        from retrieval_draft.engine._kernels.warp import TEMPERATURE

        return float(self._numbers[0]) if len(self._kinds) and self._kinds[0] == TEMPERATURE else 1.0

    @property
    def wanted(self) -> Wanted:
        """Parts of a row's logits that `choose_among` chooses among; none where it takes the whole row.

        Example:
            temperature, top-k of 50, top-p  ->  128 best; temperature alone  ->  the candidates of the draw
        """
        from retrieval_draft.engine._kernels.warp import TEMPERATURE, TOP_K

        filters = [step for step in zip(self._kinds, self._numbers, strict=True) if step[0] != TEMPERATURE]
        if len(filters) < len(self._kinds) and self._kinds[0] != TEMPERATURE:
            return Wanted()
        if not filters:
            return Wanted(candidates=True)
        kind, number = filters[0]
        if kind == TOP_K and number >= BEST and len(filters) > 1:
            return Wanted()  # the others look at what top-k keeps
        return Wanted(BEST, candidates=not (kind == TOP_K and number <= BEST // 2))

    def choose_among(
        self, best: BestLogits, node: int, key: np.uint64, logprob: bool = False
    ) -> Choice | None:
        """The draw of `choose`, from the parts of a node's logits that are `wanted`.

        Args:
            best: Of all nodes.
            node: Index of the node.
            key: Of the noise at the position.
            logprob: Whether the token's probability is wanted.

        Returns:
            None where it takes the whole row.
        """
        from retrieval_draft.engine._kernels.choose_among import choose_among

        scores, tokens, total, bound = _NO_SCORES, _NO_TOKENS, math.nan, math.inf
        if best.candidates is not None:
            scores, tokens = best.candidates.scores[node], best.candidates.tokens[node]
            total, bound = float(best.candidates.totals[node]), float(best.candidates.bounds[node])
        token, log_probability = choose_among(
            best.values[node],
            best.tokens[node],
            scores,
            tokens,
            total,
            bound,
            best.vocabulary,
            self._kinds,
            self._numbers,
            self._keeps,
            key,
            logprob,
        )
        return None if token < 0 else Choice(int(token), float(log_probability))

    def choose(self, row: Tensor, key: np.uint64 | None, logprob: bool = False) -> Choice | None:
        """One draw, or the most probable token.

        Args:
            row: (vocabulary,). Left as it is.
            key: Of the noise at the position; None for the lowest id of the largest score.
            logprob: Whether the token's probability is wanted.

        Returns:
            None where it takes torch: off the host, not float32, or with NaN or infinity in the row.
        """
        if row.device.type != "cpu" or row.dtype != torch.float32 or not row.is_contiguous():
            return None
        from retrieval_draft.engine._kernels.maxima import BLOCK
        from retrieval_draft.engine._kernels.warp import choose

        array: NDArray[np.float32] = row.detach().numpy()
        if self._filters and len(self._scratch[0]) < len(array):
            self._scratch = _scratch(len(array))
        maxima = np.empty(-(-len(array) // BLOCK), np.float32)
        token, log_probability = choose(
            array,
            array.view(np.int32),
            maxima,
            maxima.view(np.int32),
            self._kinds,
            self._numbers,
            self._keeps,
            *self._scratch,
            np.uint64(0) if key is None else key,
            key is not None,
            logprob,
        )
        return None if token < 0 else Choice(int(token), float(log_probability))


def _scratch(size: int) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float64]]:
    return np.empty(size, np.float32), np.empty(size, np.int32), np.empty(size, np.float64)


def _is_temperature(warper: Any) -> bool:
    return type(warper) is TemperatureLogitsWarper


def _is_known(warper: Any) -> bool:
    if type(warper) in (TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper):
        return bool(warper.filter_value == -float("inf"))
    return _is_temperature(warper)


def _step(warper: Any) -> tuple[int, float, int] | None:
    """Kind, number and least tokens for the kernel; None for a warper that changes nothing."""
    from retrieval_draft.engine._kernels.warp import MIN_P, TEMPERATURE, TOP_K, TOP_P

    if _is_temperature(warper):
        return TEMPERATURE, warper.temperature, 1
    if type(warper) is TopKLogitsWarper:
        return TOP_K, warper.top_k, 1
    if type(warper) is TopPLogitsWarper:
        # Compared with float32 sums, it is rounded to float32 too.
        rest = float(np.float32(1 - warper.top_p))
        return (TOP_P, rest, warper.min_tokens_to_keep) if rest > 0 else None
    return (MIN_P, warper.min_p, warper.min_tokens_to_keep) if warper.min_p > 0 else None
