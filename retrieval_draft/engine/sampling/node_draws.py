"""Draws at all nodes of a captured pass: what the device is given for them, and what it makes of its logits.

The device names the few tokens that may win (`Candidates`), in sums that round as they like; the host chooses
among these by its own kernel, exactly, or takes the node's whole row where they do not decide. So a token is
the same from a captured pass, an eager one, or none at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft.engine.logits import CANDIDATES, Wanted, summary
from retrieval_draft.engine.sampling.noise import candidates, position_keys
from retrieval_draft.engine.sampling.penalties import Penalties, penalised
from retrieval_draft.engine.sampling.sampling import Sampler
from retrieval_draft.engine.transcript import Transcript

__all__ = ["DrawWords", "PassNodes", "draw_words", "drawn_summary"]

_HEADER = 5
"""Words of a row: the key of its noise; bits of temperature, repetition, presence and frequency penalty."""

_SEEN = 128
"""Bit of a token's byte that tells that it occurs for the repetition penalty. The others count it."""


def draw_words(wanted: Wanted, vocabulary: int) -> int:
    """Words that a tree has for draws: none, or a header, then with penalties a byte for each token."""
    if not wanted.candidates:
        return 0
    return _HEADER + (-(-vocabulary // 8) if wanted.penalties else 0)


class DrawWords:
    """A row's part of the upload, for draws at its nodes.

    Args:
        sampler: Draws them.
        padding: Ids before the prompt that count as its text: int64, shape (n,).
        vocabulary: Tokens of the logits.
    """

    def __init__(self, sampler: Sampler, padding: NDArray[np.int64], vocabulary: int) -> None:
        self._penalties: Penalties | None = sampler.penalties
        self._padding, self._vocabulary = padding, vocabulary
        noise = sampler.noise
        key = np.zeros(1, np.uint64) if noise is None else np.array([noise.sample_key])
        given = sampler.penalties or Penalties()
        numbers = [sampler.temperature, given.repetition, given.presence, given.frequency]
        self._header = np.concatenate([key.view(np.int64), np.array(numbers).view(np.int64)])
        self._bytes = np.zeros(0, np.uint8)
        self._known = 0
        self.is_full = False

    def of(self, text: Transcript, words: int) -> NDArray[np.int64]:
        """int64, shape (words,), for the nodes after a text, which has grown since the last call.

        If a token occurs too often to be counted, `is_full` becomes true, and the draws are of no use.
        """
        out = np.zeros(words, np.int64)
        out[:_HEADER] = self._header
        if self._penalties is not None and words > _HEADER:
            self._count(text, self._penalties, 8 * (words - _HEADER))
            out[_HEADER:] = self._bytes.view(np.int64)
        return out

    def _count(self, text: Transcript, penalties: Penalties, size: int) -> None:
        """Counts the text's new tokens."""
        if not len(self._bytes):
            self._bytes = np.zeros(size, np.uint8)
            new = np.concatenate([self._padding, text.tokens])
        else:
            new = text.tokens[self._known - len(self._padding) :]
        seen = new[max(penalties.seen_from - self._known, 0) :]
        counted = new[max(penalties.counted_from - self._known, 0) :]
        self._known += len(new)
        if penalties.presence or penalties.frequency:
            tokens, times = np.unique(counted[counted < self._vocabulary], return_counts=True)
            counts = (self._bytes[tokens] & (_SEEN - 1)) + times
            self.is_full |= bool((counts >= _SEEN).any())
            self._bytes[tokens] = (self._bytes[tokens] & _SEEN) | (counts & (_SEEN - 1)).astype(np.uint8)
        self._bytes[seen[seen < self._vocabulary]] |= _SEEN


@dataclass(frozen=True, slots=True)
class PassNodes:
    """The nodes of a captured pass, for its draws.

    Attributes:
        ids: int64, shape (rows, n).
        depths: int64, shape (rows, n).
        length: int64, shape (rows,). Tokens before each root.
        hidden: bool, shape (rows, n, n). As of `tree_masks`; None for roots alone.
        words: int64, shape (rows, words). Of `DrawWords`, each.
    """

    ids: Tensor
    depths: Tensor
    length: Tensor
    hidden: Tensor | None
    words: Tensor

    def scores(self, logits: Tensor) -> Tensor:
        """Logits after penalties, whose tokens are those of the text and of the nodes that a node sees.

        Args:
            logits: (rows * n, vocabulary).

        Returns:
            float32, of the same shape.
        """
        rows, nodes = self.ids.shape
        vocabulary = logits.shape[-1]
        held = self.words[:, _HEADER:].view(torch.uint8)[:, None, :vocabulary]
        drafted = torch.zeros((rows, nodes, vocabulary), dtype=torch.int32, device=logits.device)
        if self.hidden is not None:
            # Roots are part of the text.
            ids = self.ids[:, None, 1:].expand(-1, nodes, -1)
            drafted.scatter_add_(2, ids, (~self.hidden[:, :, 1:]).int())
        seen = (held >= _SEEN) | (drafted > 0)
        counts = (held & (_SEEN - 1)).int() + drafted
        parts = self._numbers()[:, 1:, None, None].unbind(1)
        repetition = parts[0].masked_fill(parts[0] == 0, 1.0)  # lanes without a row hold zeros
        return penalised(logits.view(rows, nodes, -1), seen, counts, repetition, *parts[1:]).flatten(0, 1)

    def candidates(self, scores: Tensor) -> Tensor:
        """The first tokens of a draw at each node: int32, (rows * n, columns), as `Candidates` has them.

        Args:
            scores: float, shape (rows * n, vocabulary).
        """
        temperature = self._numbers()[:, :1]
        temperature = temperature.masked_fill(temperature == 0, 1.0).expand(-1, self.ids.shape[1])
        divided = scores.float() / temperature.reshape(-1, 1)
        keys = position_keys(self.words[:, :1], self.length[:, None] + self.depths + 1).flatten()
        tokens, sums, bounds = candidates(divided, keys, CANDIDATES)
        values = scores.gather(1, tokens).float().masked_fill(sums.isneginf(), -torch.inf)
        totals = (divided - divided.amax(-1, keepdim=True)).exp().sum(-1)
        floats = torch.stack([totals.double(), bounds], -1)
        columns = [scores.argmax(-1, keepdim=True), tokens]
        return torch.cat([*(each.int() for each in columns), *map(_bits, (values, floats))], -1)

    def _numbers(self) -> Tensor:
        """Temperature and penalties of each row: float32, shape (rows, 4)."""
        return self.words[:, 1:_HEADER].view(torch.float64).float()


def drawn_summary(logits: Tensor, nodes: PassNodes, k: int, wanted: Wanted) -> Tensor:
    """A pass's `summary`, with what its samplers choose among.

    Args:
        logits: (rows * n, vocabulary).
        nodes: Of the pass.
        k: As of `summary`.
        wanted: Parts of the logits.
    """
    scores = nodes.scores(logits) if wanted.penalties else None
    found = nodes.candidates(logits if scores is None else scores) if wanted.candidates else None
    return summary(logits, k, wanted.best, scores, found)


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)
