"""Gumbel noise that depends on nothing but seed, sample, position and token id."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GumbelNoise"]

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
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


class GumbelNoise:
    """A stateless source of noise, so that drafted and plain decoding draw the same tokens.

    Adding the noise of a position to its logits and taking the argmax is one exact draw from
    their softmax. SplitMix64 counts through the ids from a key made of the three numbers.

    Args:
        seed: Any integer.
        vocabulary: Token ids.
        device: Where the noise is made.
        sample: Which of several samples of one prompt this is.
    """

    def __init__(self, seed: int, vocabulary: int, device: torch.device, sample: int = 0) -> None:
        self._key = _mix(_mix(seed + _STEP) + (sample + 1) * _STEP)
        self._steps = torch.arange(1, vocabulary + 1, dtype=torch.int64, device=device) * _signed(_STEP)

    def at(self, position: int) -> Tensor:
        """Noise for the token at `position`: float32, shape (vocabulary,)."""
        value = self._steps + _signed(_mix(self._key + (position + 1) * _STEP))
        value = (value ^ _shift(value, 30)) * _signed(_MIX[0])
        value = (value ^ _shift(value, 27)) * _signed(_MIX[1])
        value = value ^ _shift(value, 31)
        # Fine steps near 0 give the upper tail, which decides, its full resolution.
        uniform = (_shift(value, 11).double() + 0.5) * 2.0**-53
        uniform = uniform.float().clamp_(max=1.0 - 2.0**-24)
        return -torch.log(-torch.log1p(-uniform))
