"""Logits of verified nodes, summarised and brought to the host in one copy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.drafting.predictions import Predictions
from retrieval_draft.errors import NonFiniteLogitsError

__all__ = [
    "CANDIDATES",
    "BestLogits",
    "Candidates",
    "LogitReader",
    "Wanted",
    "non_finite",
    "summary",
    "top_k",
]

CANDIDATES = 8
"""Tokens of each node that a device names as the likely first ones of a draw."""

_CANDIDATE_COLUMNS = 1 + 2 * CANDIDATES + 4

_kernels = LazyKernels("retrieval_draft.engine._kernels.top_k")

_BLOCK = 256
_SMALL = 16 * _BLOCK


def non_finite(position: int) -> NonFiniteLogitsError:
    """The error for NaN in the logits after the token at `position`."""
    return NonFiniteLogitsError(
        f"The model returned NaN in the logits for position {position}, so there is no next token to choose.",
        "Load the model in bfloat16 or float32 instead of float16, and check its weights for NaN.",
    )


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Argmax and the k largest values of each row, exactly.

    Only the k blocks with the largest maxima can hold them, so the whole row is read once, for
    the maxima; this takes a sixth of the time of torch.topk at 262,144 ids.

    Args:
        logits: (n, vocabulary).
        k: At most the vocabulary.

    Returns:
        (n,) maximum, NaN if any value is; (n,) its first index; (n, k) values; (n, k) indices.
    """
    vocabulary = logits.shape[-1]
    whole = vocabulary // _BLOCK * _BLOCK
    if vocabulary < _SMALL:
        best, index = logits.max(-1)
        values, indices = torch.topk(logits, k) if k else (logits[:, :0], index[:, None][:, :0])
        return best, index, values, indices
    blocks = torch.unflatten(logits[:, :whole], -1, (-1, _BLOCK))
    maxima = blocks.amax(-1)
    best, block = maxima.max(-1)
    inside = torch.gather(blocks, 1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0].argmax(-1)
    index = block * _BLOCK + inside
    tail = logits[:, whole:]
    if whole < vocabulary:
        tail_best, tail_index = tail.max(-1)
        later = (tail_best > best) | tail_best.isnan()
        index = torch.where(later, tail_index + whole, index)
        best = torch.where(later, tail_best, best)
    if not k:
        return best, index, logits[:, :0], index[:, None][:, :0]
    chosen = torch.topk(maxima, min(k, maxima.shape[1])).indices
    candidates = torch.gather(blocks, 1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    if whole < vocabulary:
        candidates = torch.cat([candidates, tail], -1)
    values, flat = torch.topk(candidates, k)
    row, column = flat // _BLOCK, flat % _BLOCK
    indices = torch.gather(chosen, 1, row.clamp(max=chosen.shape[1] - 1)) * _BLOCK + column
    if whole < vocabulary:
        past = chosen.shape[1] * _BLOCK
        indices = torch.where(flat >= past, flat - past + whole, indices)
    return best, index, values, indices


class Wanted(NamedTuple):
    """Parts of a node's logits that samplers choose among.

    Attributes:
        best: Number of best logits; 0 for none.
        candidates: Whether a captured pass draws from all logits, for `Candidates`.
        penalties: Whether it lowers those of tokens in the text before.
    """

    best: int = 0
    candidates: bool = False
    penalties: bool = False

    def joined(self, other: Wanted) -> Wanted:
        """Parts that are enough for both."""
        return Wanted(
            max(self.best, other.best), self.candidates or other.candidates, self.penalties or other.penalties
        )


class Candidates(NamedTuple):
    """The tokens of each node that come first in a draw, as a device computed it: close, not exact.

    Attributes:
        argmax: int32, shape (n,). The lowest id of the largest score.
        tokens: int32, shape (n, `CANDIDATES`). In falling order of their sums of score and noise.
        scores: float32, of the same shape. Theirs, before temperature, exact; -inf where there are too few.
        totals: float64, shape (n,). Sum of exp(score - largest) over all, scores divided by temperature.
        bounds: float64, shape (n,). The sum of score and noise of any other token is not larger.
    """

    argmax: NDArray[np.int32]
    tokens: NDArray[np.int32]
    scores: NDArray[np.float32]
    totals: NDArray[np.float64]
    bounds: NDArray[np.float64]

    def part(self, nodes: slice) -> Candidates:
        """Those of some nodes."""
        return Candidates(
            self.argmax[nodes], self.tokens[nodes], self.scores[nodes], self.totals[nodes], self.bounds[nodes]
        )


class BestLogits(NamedTuple):
    """The best logits of each node, in falling order, penalties included where a pass has any.

    Attributes:
        tokens: int32, shape (n, count).
        values: float32, shape (n, count).
        vocabulary: Ids that they were chosen from.
        candidates: The first tokens of a draw from all logits; None where there was none.
    """

    tokens: NDArray[np.int32]
    values: NDArray[np.float32]
    vocabulary: int
    candidates: Candidates | None = None

    def part(self, nodes: slice) -> BestLogits:
        """Those of some nodes."""
        candidates = None if self.candidates is None else self.candidates.part(nodes)
        return BestLogits(self.tokens[nodes], self.values[nodes], self.vocabulary, candidates)


def summary(
    logits: Tensor, k: int, best: int = 0, scores: Tensor | None = None, candidates: Tensor | None = None
) -> Tensor:
    """Argmax and alternatives of logits, in few launches.

    Args:
        logits: (n, vocabulary).
        k: At most the vocabulary, as `best`.
        best: Number of best logits, for `BestLogits`.
        scores: float, (n, vocabulary), whose best are wanted instead; None for the logits.
        candidates: int32, (n, columns): as `Candidates` has them; None for none.

    Returns:
        int32, shape (n, 2 + 2k + columns + 2 best): argmax, whether a value is NaN, the k best ids, bits of
        their probabilities as float32; the candidates; ids and bits of the best logits.
    """
    most, index = logits.max(-1)
    columns = [index[:, None], most.isnan()[:, None]]
    together = best if scores is None else 0
    values, indices = logits.topk(max(k, together)) if k or together else (logits, index)
    if k:
        probs = logits.softmax(-1, dtype=torch.float32).gather(1, indices[:, :k])
        columns += [indices[:, :k], probs.view(torch.int32)]
    if candidates is not None:
        columns.append(candidates)
    if best:
        if scores is not None:
            values, indices = scores.topk(best)
        columns += [indices[:, :best], values[:, :best].float().contiguous().view(torch.int32)]
    return torch.cat(columns, -1).int()


def _candidates(columns: NDArray[np.int32]) -> Candidates:
    """Reads int32, shape (n, `_CANDIDATE_COLUMNS`): argmax; ids; bits of scores, totals and bounds."""
    floats = np.ascontiguousarray(columns[:, 1 + 2 * CANDIDATES :]).view(np.float64)
    return Candidates(
        argmax=columns[:, 0],
        tokens=columns[:, 1 : 1 + CANDIDATES],
        scores=columns[:, 1 + CANDIDATES : 1 + 2 * CANDIDATES].view(np.float32),
        totals=floats[:, 0],
        bounds=floats[:, 1],
    )


def _read_in_place(logits: Tensor, k: int) -> Predictions:
    """`LogitReader.read` where the host can read the logits itself, in one call."""
    array: NDArray[np.float32] = logits.detach().numpy()
    rows, size = array.shape
    next_tokens, finite = np.empty(rows, np.int32), np.empty(rows, np.bool_)
    indices, probs = np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
    maxima = np.empty(-(-size // _kernels.BLOCK), np.float32)
    _kernels.read_rows(
        array, array.view(np.int32), maxima, maxima.view(np.int32), next_tokens, finite, indices, probs
    )
    return Predictions(next_tokens, finite, indices, probs)


def _unpacked(packed: NDArray[np.int32], others: int = 0) -> Predictions:
    """Predictions of a `summary`, of whose columns `others` hold something else."""
    k = (packed.shape[1] - others) // 2 - 1
    return Predictions(
        next_tokens=packed[:, 0],
        finite=packed[:, 1] == 0,
        top_tokens=packed[:, 2 : 2 + k],
        top_probs=packed[:, 2 + k : 2 + 2 * k].view(np.float32),
    )


class LogitReader:
    """Reads logits off the device. Scratch memory is kept between calls.

    Args:
        k: Number of alternatives to read for each node; 0 for the argmax alone.
    """

    _is_here = True  # whether logits in the host's memory are read there

    def __init__(self, k: int) -> None:
        self.k = k
        self._scratch = torch.empty((1, 0), dtype=torch.float32, device="cpu")
        self._host = torch.empty(0, dtype=torch.int32, device="cpu")

    def read_with_best(
        self, logits: Tensor, nodes: int | None, wanted: Wanted, summarised: Tensor | None
    ) -> tuple[Predictions, BestLogits | None]:
        """Runs `read`, with what samplers choose among beside it, still in one copy.

        Args:
            logits: As for `read`.
            nodes: As for `read`.
            wanted: Parts that samplers choose among; no candidates where there is no `summary` yet.
            summarised: Their `summary` with those, if it has been made.

        Returns:
            Predictions; and the best logits, or None where the host has all of them anyway, or none are
            wanted.
        """
        is_made = summarised is not None
        columns = _CANDIDATE_COLUMNS if is_made and wanted.candidates else 0
        is_here = self._is_here and logits.device.type == "cpu"
        if (not wanted.best and not columns) or (is_here and not is_made):
            return self.read(logits, nodes, summarised), None
        if nodes is not None:
            logits = logits[:nodes]
        vocabulary = logits.shape[-1]
        best = min(wanted.best, vocabulary)
        if summarised is None:
            summarised = summary(logits, min(self.k, vocabulary), best)
        packed = self._down(summarised[: len(logits)]).numpy()
        begin = packed.shape[1] - 2 * best
        tokens, values = packed[:, begin : begin + best], packed[:, begin + best :].view(np.float32)
        candidates = _candidates(packed[:, begin - columns : begin]) if columns else None
        predictions = _unpacked(packed, columns + 2 * best)
        return predictions, BestLogits(tokens, values, vocabulary, candidates)

    def read(self, logits: Tensor, nodes: int | None = None, summarised: Tensor | None = None) -> Predictions:
        """Summarises `logits` with one device-to-host copy.

        Args:
            logits: (n, vocabulary), any floating dtype. Not changed.
            nodes: Rows that count; the rest is padding. All by default.
            summarised: Their `summary`, if it has been made.
        """
        if nodes is not None:
            logits = logits[:nodes]
        k = min(self.k, logits.shape[-1])
        if summarised is not None:
            return _unpacked(self._down(summarised[: len(logits)]).numpy())
        is_here = self._is_here and logits.device.type == "cpu"
        if is_here and logits.dtype == torch.float32 and logits.is_contiguous():
            return _read_in_place(logits, k)
        return _unpacked(self._down(self.pack(logits)).numpy())

    def pack(self, logits: Tensor) -> Tensor:
        """Argmax, NaN flag, top ids and top probabilities by row: int32, shape (n, 2 + 2k), on the device."""
        k = min(self.k, logits.shape[-1])
        if logits.device.type != "cpu" or not self._is_here:
            return summary(logits, k)
        best, index, values, indices = top_k(logits, k)
        columns = [index[:, None].int(), best.isnan()[:, None].int()]
        if k:
            total = self._exp_sum(logits, best)
            probs = (values.float() - best[:, None].float()).exp_() / total[:, None]
            columns += [indices.int(), probs.view(torch.int32)]
        return torch.cat(columns, -1)

    def _exp_sum(self, logits: Tensor, best: Tensor) -> Tensor:
        """Sum over each row of exp(logit - best): float32, shape (n,)."""
        from retrieval_draft.engine._kernels.softmax import exp_sums

        total = torch.empty(len(logits), dtype=torch.float32, device="cpu")
        if logits.dtype == torch.float32:
            exp_sums(logits.detach().numpy(), best.numpy(), total.numpy())
            return total
        if self._scratch.shape[-1] != logits.shape[-1]:
            self._scratch = torch.empty((1, logits.shape[-1]), dtype=torch.float32, device="cpu")
        for row in range(len(logits)):
            self._scratch.copy_(logits[row])
            exp_sums(self._scratch.numpy(), best[row : row + 1].float().numpy(), total[row:].numpy())
        return total

    def _down(self, packed: Tensor) -> Tensor:
        if packed.device.type != "cuda":
            return packed.to("cpu", copy=True)  # the next replay of a tape writes over it
        if self._host.numel() < packed.numel():
            size = 2 * packed.numel()
            self._host = torch.empty(size, dtype=torch.int32, device="cpu", pin_memory=True)
        host = self._host[: packed.numel()].view(packed.shape)
        host.copy_(packed, non_blocking=True)
        torch.cuda.current_stream(packed.device).synchronize()
        return host.clone()
