"""Gumbel noise that depends on nothing but seed, sample, position and token id."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from retrieval_draft.engine.logits import non_finite
from retrieval_draft.engine.sampling.warpers import Warpers

__all__ = ["GumbelNoise", "candidates", "position_keys"]

_MASK = (1 << 64) - 1
_BLOCK = 256
_MOST_BLOCKS = 64
"""Blocks of a row whose tokens get noise one by one: half as many hold the winner in most texts."""

_STEP = 0x9E3779B97F4A7C15
_BLOCKS = 0xD1B54A32D192ED03
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix(value: int) -> int:
    """The finaliser of SplitMix64, on Python integers."""
    value &= _MASK
    value = (value ^ (value >> 30)) * _MIX[0] & _MASK
    value = (value ^ (value >> 27)) * _MIX[1] & _MASK
    return value ^ (value >> 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64, on int64."""
    value = (value ^ _shift(value, 30)) * _signed(_MIX[0])
    value = (value ^ _shift(value, 27)) * _signed(_MIX[1])
    return value ^ _shift(value, 31)


def _exponential(random: Tensor) -> Tensor:
    """Exponential variables with rate 1: float64. Fine steps near 0, where races are decided."""
    return -torch.log1p(-(_shift(random, 11).double() + 0.5) * 2.0**-53)


def position_keys(sample_keys: Tensor, positions: Tensor) -> Tensor:
    """`GumbelNoise.key` of positions: int64, of the shape of both, which are int64 too."""
    return _mixed(sample_keys + (positions + 1) * _signed(_STEP))


def candidates(scores: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likely first tokens of draws, and a bound of all others, by calls whose shapes no value decides.

    Of each block of tokens the largest score and the first arrival bound all sums. Blocks with the largest
    bounds get noise for each token; the bounds of the others tell how large a sum there may be.

    Args:
        scores: float32, shape (n, vocabulary), divided by temperature.
        keys: int64, shape (n,). Of each row's position.
        count: Number of tokens, at most `_BLOCK`.

    Returns:
        (n, count) tokens, in falling order of their sums of score and noise, any ids if there
        are too few; (n, count) sums, float64, -inf there; (n,) float64, no other sum is larger.
    """
    rows, vocabulary = scores.shape
    device = scores.device
    blocks = -(-vocabulary // _BLOCK)
    padding = blocks * _BLOCK - vocabulary
    parted = functional.pad(scores, (0, padding), value=-math.inf).view(rows, blocks, _BLOCK)
    indices = torch.arange(_BLOCK, device=device)
    begins = torch.arange(blocks, device=device) * _BLOCK
    widths = (vocabulary - begins).clamp(max=_BLOCK)
    steps = torch.arange(1, blocks + 1, device=device) * _signed(_STEP)
    random = _mixed((keys ^ _signed(_BLOCKS))[:, None] + steps)
    first = _exponential(random) / widths
    winner = (_shift(_mixed(random + _signed(_STEP)), 32) * widths) >> 32
    bounds = parted.amax(-1).double() - torch.log(first)
    size = min(_MOST_BLOCKS, blocks)
    found = bounds.topk(min(size + 1, blocks))
    chosen = found.indices[:, :size]
    tokens = chosen[:, :, None] * _BLOCK + indices
    own = first.gather(1, chosen)[:, :, None]
    later = own + _exponential(_mixed(keys[:, None, None] + (tokens + 1) * _signed(_STEP)))
    arrivals = torch.where(indices == winner.gather(1, chosen)[:, :, None], own, later)
    inside = parted.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK))
    sums = (inside.double() - torch.log(arrivals)).flatten(1)
    best = sums.topk(min(count + 1, sums.shape[1]))
    bound = best.values[:, -1]
    if blocks > size:
        bound = torch.maximum(bound, found.values[:, size])
    ids = tokens.flatten(1).gather(1, best.indices[:, :count]).clamp(max=vocabulary - 1)
    return ids, best.values[:, :count], bound


class GumbelNoise:
    """A stateless source of noise, so that drafted and plain decoding draw the same tokens.

    Adding the noise of a position to its logits and taking the argmax is one exact draw from their softmax
    (Gumbel, 1954). The noise is ``-log`` of the arrivals of an exponential race in two levels, which
    `_kernels/race.py` describes: one token's noise costs no more than one token, and a draw on the host makes
    only the noise that can decide it.

    Args:
        seed: Any integer.
        vocabulary: Token ids.
        device: Device on which `at` makes the noise.
        sample: Index of the sample among those of one prompt.

    Attributes:
        sample_key: Hash of seed and sample; position keys are made of it.
        vocabulary: Token ids.
    """

    def __init__(self, seed: int, vocabulary: int, device: torch.device, sample: int = 0) -> None:
        self.vocabulary = vocabulary
        self.sample_key = np.uint64(_mix(_mix(seed + _STEP) + (sample + 1) * _STEP))
        self._device = device
        # MPS has no float64.
        self._maker = torch.device("cpu") if device.type == "mps" else device
        self._steps: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._plain = Warpers()

    def key(self, position: int) -> np.uint64:
        """The key of one position's noise."""
        key: np.uint64 = np.uint64(_mix(int(self.sample_key) + (position + 1) * _STEP))
        return key

    def at(self, position: int) -> Tensor:
        """Noise for the token at `position`, on the device: float32, shape (vocabulary,)."""
        if self._steps is None:
            self._steps = self._make_steps()
        blocks, tokens, indices, widths = self._steps
        key = int(self.key(position))
        random = _mixed(blocks + _signed(key ^ _BLOCKS))
        first = (_exponential(random) / widths)[:, None]
        winner = ((_shift(_mixed(random + _signed(_STEP)), 32) * widths) >> 32)[:, None]
        arrival = torch.where(indices == winner, first, first + _exponential(_mixed(tokens + _signed(key))))
        return (-torch.log(arrival)).flatten().narrow(0, 0, self.vocabulary).float().to(self._device)

    def _make_steps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Key offsets of blocks and of tokens, indices in a block, widths of blocks: int64."""
        blocks = -(-self.vocabulary // _BLOCK)
        counts = torch.arange(1, blocks * _BLOCK + 1, device=self._maker)
        begins = torch.arange(0, self.vocabulary, _BLOCK, device=self._maker)
        steps = counts * _signed(_STEP)
        indices = torch.arange(_BLOCK, device=self._maker)
        widths = (self.vocabulary - begins).clamp(max=_BLOCK)
        return steps.narrow(0, 0, blocks), steps.view(blocks, _BLOCK), indices, widths

    def of(self, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """The part of `at(position)` that belongs to some tokens.

        Args:
            position: Of the token to be chosen.
            tokens: Integers, shape (n,).

        Returns:
            float32, shape (n,).
        """
        from retrieval_draft._kernels.race import noise_of

        out = np.empty(len(tokens), np.float32)
        noise_of(self.key(position), np.ascontiguousarray(tokens, np.int64), self.vocabulary, out)
        return out

    def draw(self, scores: Tensor, position: int) -> int:
        """One draw from the softmax of `scores`: the argmax of scores + noise.

        Args:
            scores: Shape (vocabulary,) or (1, vocabulary), any floating dtype. Left as they are.
            position: Of the token to be chosen.

        Raises:
            NonFiniteLogitsError: A score is NaN.

        Example:
            For ``log([0.5, 0.25, 0.25])`` and seeds 0, 1, 2, ... half of the draws at any position are 0.
        """
        row = scores.reshape(-1)
        assert len(row) == self.vocabulary, "another vocabulary has other noise"
        choice = self._plain.choose(row, self.key(position))
        if choice is not None:
            return choice.token
        keyed = row + self.at(position)
        best = keyed.argmax()
        token, lost = torch.stack([best, keyed[best].isnan().long()]).tolist()
        if lost:
            raise non_finite(position)
        return int(token)
