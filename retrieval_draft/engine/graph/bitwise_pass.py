"""The pass of `exact="bitwise"`: of fixed shape, over a cache at fixed addresses, its sums by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retrieval_draft.config import BITWISE_NODES
from retrieval_draft.engine.attention.tree_mask import packed_words
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.graph.arena import Arena
from retrieval_draft.engine.graph.captured import CapturedCalls, UncapturableError, run_capturable
from retrieval_draft.engine.graph.fixed_pass import ArenaCache, Call
from retrieval_draft.engine.graph.position_attention import PositionLayout, attending_by_position
from retrieval_draft.errors import UnsupportedModelError

__all__ = ["WIDTH", "BitwisePass"]

WIDTH = BITWISE_NODES + 1
"""Nodes of every pass: a root, drafts, and padding. Texts are equal only from passes of one width."""

_Results = tuple[Tensor, Tensor | None, Tensor | None]


class BitwisePass:
    """A pass over `WIDTH` nodes, captured or not.

    Args:
        call: The model, with attention by position.
        arena: Memory of the cache.
        keys: Committed tokens at most, a multiple of `FAR`; the arena has as many slots, or more.
        windows: Layer types with their windows.
        dtype: Of the masks.
        summarise: Makes of logits what the host reads of them, (n, columns), in the same capture.

    Attributes:
        logits: (n, vocabulary). Written by `run`.
        hidden: (n, d). States that draft sources read, written by `run`; None where none are read.
        summary: As `summarise` made it, written by `run`.
    """

    def __init__(
        self,
        call: Call,
        arena: Arena,
        keys: int,
        windows: Mapping[str, int | None],
        dtype: torch.dtype,
        summarise: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._call, self._keys = call, keys
        self._states, self._lanes = arena.keys_and_values(arena.slots), arena.lanes
        self._summarise = summarise
        device = arena.tensors[0].device
        self._given = torch.zeros(packed_words(WIDTH), dtype=torch.int64, device=device)
        # Attention reads the layout; from a mask it only learns the layer's type, by its address.
        masks = {
            kind: torch.zeros((1, 1, WIDTH, arena.slots), dtype=dtype, device=device) for kind in windows
        }
        self._windows = {masks[kind].data_ptr(): window for kind, window in windows.items()}
        self._mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
        self._captured: CapturedCalls | None = None
        self.logits: Tensor
        self.hidden: Tensor | None
        self.summary: Tensor | None

    def capture(self, cache: SpeculativeCache, packed: Tensor, by: CapturedCalls | None) -> None:
        """Runs the pass for the record, and compares the bits of the record with those of the calls.

        Args:
            cache: Works in the arena.
            packed: As for `run`.
            by: Makes the record; None for calls that are made anew each time.

        Raises:
            UnsupportedModelError: Shapes depend on values, so that a token's sums depend on its neighbours; a
                layer attends otherwise; or the record has other bits.
        """
        self._given.copy_(packed)
        calls = partial(self._calls, cache)
        try:
            logits, _, _ = run_capturable(calls)
        except UncapturableError as error:
            raise UnsupportedModelError(
                f"A pass of this model has shapes or values that the host chooses on the way, and so a token "
                f"may depend on those beside it: {error}",
                "Leave out exact='bitwise' for this model.",
            ) from error
        logits = logits.clone()
        self._captured = by
        self.logits, self.hidden, self.summary = calls() if by is None else by.capture(calls)
        if not torch.equal(_bits(self.logits), _bits(logits)):
            raise UnsupportedModelError(
                "The same calls have other bits the second time, or captured.",
                "Leave out exact='bitwise', or set graphs='off'.",
            )

    def run(self, cache: SpeculativeCache, packed: Tensor) -> Tensor:
        """One pass over a tree.

        Args:
            cache: Works in the arena.
            packed: The tree: `TreeInputs.packed`.

        Returns:
            (n, vocabulary), float, logits after each node, padded nodes included; they hold until the next
            run.
        """
        self._given.copy_(packed)
        if self._captured is None:
            self.logits, self.hidden, self.summary = self._calls(cache)
        else:
            self._captured.replay()
        return self.logits

    def _calls(self, cache: SpeculativeCache) -> _Results:
        ids, positions, depths = self._given[: 3 * WIDTH].view(3, 1, WIDTH).unbind()
        length = self._given[3 * WIDTH : 3 * WIDTH + 1]
        bits = self._given[3 * WIDTH + 1 :].view(torch.bool)
        hidden = bits[: WIDTH * WIDTH].view(WIDTH, WIDTH)
        layout = PositionLayout.of_tree(length, depths[0], hidden, self._keys, self._windows)
        slots = torch.arange(WIDTH, device=length.device) + length
        mask = {**self._mask} if isinstance(self._mask, dict) else self._mask
        with attending_by_position(layout):
            logits, states = self._call(
                ArenaCache(cache, self._states, self._lanes, slots[None]), ids, positions, mask
            )
        if layout.reads < sum(each is not None for each in self._states):
            raise UnsupportedModelError(
                "A layer of this model attends by code of its own.",
                "Leave out exact='bitwise' for this model.",
            )
        return logits, states, None if self._summarise is None else self._summarise(logits)


def _bits(values: Tensor) -> Tensor:
    """The bits of floats, so that NaN equals itself and signs of zero count."""
    return values.contiguous().view(torch.uint8)
