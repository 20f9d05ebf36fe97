"""A model's own cache, which returns to its committed text where a chain of drafts was refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from retrieval_draft.engine.cache.saved_states import SavedStates, can_crop, crop_layers, tensors_of
from retrieval_draft.engine.compat import has_length
from retrieval_draft.index.source import TokenArray

__all__ = ["ChainCache"]


class ChainCache(Cache):
    """A cache of transformers, with the tokens that it has not committed yet.

    After a chain that is accepted as a whole the states of its pass stay. If every layer can be cropped, what
    was refused is cropped. Else the states before the pass come back, and the accepted tokens are *pending*:
    they go in front of the next drafts, so that no pass is spent on repair.

    Args:
        make: Makes an empty cache for the model; None where the model makes it in its first pass.

    Attributes:
        inner: The cache that the model is given.
        text: int32. The first committed tokens, as far as they are known.
        shift: As in `SpeculativeCache`.
        fixed: As in `SpeculativeCache`.

    Example:
        committed "a b", root "c", drafts "d x y", accepted "c d": the states of "a b" come back, "c d" is
        pending, and the next pass takes "c d e" and drafts, after which all of it is committed at once
    """

    def __init__(self, make: Callable[[], Cache | None]) -> None:
        self.inner: Any = make()
        super().__init__(layers=_layers(self.inner))
        self.text: TokenArray = np.zeros(0, np.int32)
        self._make = make
        self._length = self._longest = self.shift = self.fixed = 0
        self._pending = torch.empty((1, 0), dtype=torch.int64, device="cpu")
        self._staged: Tensor | None = None
        self._saved = SavedStates()
        self._is_saved = self._is_lost = self._has_others = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens; with those that passes of others have added, where a layer counts them."""
        if self._has_others and has_length(self):
            return int(super().get_seq_length(layer_idx))
        return self._length

    @property
    def pending(self) -> int:
        """Accepted tokens that the next pass repeats."""
        return self._pending.shape[1]

    def carries(self, accepted: int) -> int | None:
        """The number of `pending` tokens once so many of the staged chain are accepted.

        Returns:
            None where the cache can be cropped, so that nothing is ever repeated.
        """
        tokens = self.pending + accepted
        if can_crop(self.inner, self._length + tokens):
            return None
        if self._staged is None:
            return self.pending
        return 0 if tokens == self._staged.shape[1] else tokens

    def save(self, new: int) -> None:
        """Makes a pass over `new` tokens reversible: copies the states that could not be cropped after it."""
        if not self._is_saved and not can_crop(self.inner, self._length + self.pending + new):
            self._saved.take(self.inner)
            self._is_saved = True

    def stage(self, chain: Tensor) -> Tensor:
        """Begins a pass over a chain, int64, shape (1, n).

        Returns:
            int64, shape (1, pending + n): the tokens to pass.

        Raises:
            RuntimeError: An earlier pass failed, and its states cannot be taken back.
        """
        if self._is_lost:
            raise RuntimeError("A pass failed after it had changed the states of the text.")
        staged = torch.cat([self._pending.to(chain.device), chain], 1) if self.pending else chain
        self._staged = staged
        return staged

    def passed(self, inner: Any, new: int) -> None:
        """Notes that the model has added `new` tokens of text to the cache that it returned."""
        if inner is not None and inner is not self.inner:
            self.inner = inner
            self.layers = _layers(inner)
        if new:
            self._length += new
            self._is_saved = False

    def commit(self, moved: Tensor | None, kept: int, count: int) -> None:
        """Keeps the first `count` tokens of the staged chain; `moved` and `kept` are those of a tree."""
        staged, self._staged = self._staged, None
        if staged is None:
            return
        tokens = self.pending + count
        if tokens == staged.shape[1] or not self._is_saved:
            self._length += tokens
            self._is_saved = False
            crop_layers(self.inner, self._length)
            tokens = 0
        else:
            self._give_back()
        self._pending = staged[:, :tokens].clone()

    def _give_back(self) -> None:
        if self._is_saved:
            self._saved.give_back(self.inner)
        crop_layers(self.inner, self._length)

    def drop(self) -> None:
        """Takes the staged chain back, also after a pass that failed."""
        if self._staged is None:
            return
        new = self._staged.shape[1]
        self._staged = None
        # Without a copy the states of one more token stay.
        self._is_lost = not self._is_saved and not can_crop(self.inner, self._length + new)
        if not self._is_lost:
            self._give_back()

    def keep(self, length: int) -> bool:
        """Removes everything after the first `length` tokens, and pending ones.

        Returns:
            False, with nothing changed, where a layer cannot go back so far.
        """
        now = self.get_seq_length()
        if self._is_lost or self.inner is None or length > now:
            return False
        if (length < now or self._has_others) and not can_crop(self.inner, now):
            return False
        self._longest = self.longest
        crop_layers(self.inner, length)
        self._length, self._has_others, self._is_saved = length, False, False
        self._pending = self._pending[:, :0]
        self.text = self.text[:length]
        return True

    def load(self, given: Cache, length: int) -> None:
        """Takes over a copy of a caller's cache, of one text of `length` tokens."""
        self.passed(copy.deepcopy(given), length)

    def write_to(self, given: Cache) -> None:
        """Gives a caller's own cache of the same kind the states of the committed text."""
        given.layers = self.layers

    def clone(self, capacity: int = 0) -> ChainCache:
        """A copy with states of its own; staged tokens are left out, and layers grow as they need."""
        other = ChainCache(lambda: copy.deepcopy(self.inner))
        other._make = self._make
        other._length, other._pending, other._longest = self._length, self._pending, self._longest
        other.text, other.shift, other.fixed = self.text, self.shift, self.fixed
        return other

    def reset(self) -> None:
        """Forgets the text."""
        self.inner = self._make()
        self.layers = _layers(self.inner)
        self.text = self.text[:0]
        self._length = self._longest = self.shift = self.fixed = 0
        self._pending, self._staged = self._pending[:, :0], None
        self._is_saved = self._is_lost = self._has_others = False

    def hold(self, text: Tensor) -> None:
        """Makes the first tokens of an empty cache pending: int64, shape (length,)."""
        self._pending = text[None]

    @property
    def longest(self) -> int:
        """Tokens of the longest text since it was empty, cropped and expected ones included."""
        return max(self._longest, self._length)

    def made_for(self, length: int) -> None:
        """Records that the states were made for a text of `length` tokens."""
        self._longest = max(self._longest, length)

    @property
    def nbytes(self) -> int:
        """Bytes of all states and of their copy."""
        held = tensors_of([vars(layer) for layer in self.layers])
        return sum(each.numel() * each.element_size() for each in (*held, *self._saved.tensors()))

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """As in any cache; our own passes update `inner`, so that this one shows a pass of others."""
        self._has_others = True
        return super().update(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """As `update`."""
        self._has_others = True
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        """As `update`."""
        self._has_others = True
        return super().update_recurrent_state(*args, **kwargs)


def _layers(inner: Any) -> list[Any]:
    """The list of a cache's layers, not a copy: some caches make them pass by pass."""
    return getattr(inner, "layers", None) or []
