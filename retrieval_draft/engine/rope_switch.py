"""Rotary factors that a model chooses for a whole pass by its last position: LongRoPE and dynamic NTK."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from retrieval_draft.engine.cache.chain_cache import ChainCache
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.compat import makes_cache_anew
from retrieval_draft.errors import UnsupportedModelError

__all__ = ["RopeSwitch", "rope_switch"]


@dataclass(frozen=True, slots=True, eq=False)
class RopeSwitch:
    """The length of text at which a model's rotary factors change.

    Every pass has the factors that the row's text gets alone and without drafts. So

    * a tree never reaches over the switch, and rows on different sides of it share no pass;
    * a text that is passed in parts has in each the factors of the whole: a part that ends too early gets one
      more token after it, which no token sees and which is removed again;
    * a cache is continued only for texts with the factors of its keys.

    Attributes:
        length: Tokens of the longest text with the factors of short ones.
        renews: Whether all keys of a text that grows beyond it are computed again, as in Phi-3; otherwise
            keys stay as they were made.
        rotary: Modules whose frequencies change with every token beyond it, and which keep the longest text
            seen (dynamic NTK); none where there are two sets of factors only (LongRoPE).

    Example:
        of length 4096  ->  a root at position 4093 may have drafts of depth 2, one at 4096 of any depth
    """

    length: int
    renews: bool = False
    rotary: Sequence[nn.Module] = field(default=(), repr=False)

    def max_depth(self, root: int, wanted: int) -> int:
        """The largest depth, at most `wanted`, of a tree with its root at position `root`."""
        if root >= self.length:
            return 0 if self.rotary else wanted
        return min(wanted, self.length - 1 - root)

    def shared(self, roots: Sequence[int]) -> list[list[int]]:
        """Rows that may share a pass, as indices in `roots`, the positions of their trees' roots."""
        groups: dict[int, list[int]] = {}
        for row, root in enumerate(roots):
            beyond = root >= self.length
            groups.setdefault(row + 1 if beyond and self.rotary else beyond, []).append(row)
        return [*groups.values()]

    def extra_position(self, end: int, whole: int) -> int | None:
        """Position of one more token that gives a pass the factors of a text of `whole` tokens, or None.

        Args:
            end: Tokens of the text up to the end of the pass.
            whole: Tokens of all of it.
        """
        if whole <= self.length or end == whole or (end > self.length and not self.rotary):
            return None
        return whole - 1

    def fits(self, cache: SpeculativeCache | ChainCache, length: int) -> bool:
        """True if the keys of `cache` are those that begin a text of `length` tokens."""
        longest = cache.longest
        if longest == 0:
            return True
        if self.renews:
            return (longest > self.length) == (length > self.length)
        # Keys stay as they were made, unless the text was cut and would get other ones now.
        return longest == cache.get_seq_length() or max(longest, length) <= self.length

    @contextmanager
    def as_new(self) -> Iterator[None]:
        """Resets modules that keep the longest text seen inside the context, and restores them afterwards."""
        if not self.rotary:
            yield
            return
        kept = [(module, _growth(module)) for module in self.rotary]
        for module, growth in kept:
            for name, (_, new) in growth.items():
                setattr(module, name, new)
        try:
            yield
        finally:
            for module, growth in kept:
                for name, (before, _) in growth.items():
                    setattr(module, name, before)


def _growth(module: Any) -> dict[str, tuple[Any, Any]]:
    """State that a rotary module keeps of earlier passes: names with the present and the initial values."""
    found: dict[str, tuple[Any, Any]] = {}
    for original in [name for name in (*vars(module), *module._buffers) if name.endswith(_ORIGINAL)]:
        prefix, first = original.removesuffix(_ORIGINAL), module.original_max_seq_len
        now = getattr(module, f"{prefix}inv_freq")
        found[f"{prefix}inv_freq"] = now, getattr(module, original).to(now.device)
        cached = f"{prefix}max_seq_len_cached"
        found[cached] = getattr(module, cached, first), first
    return found


_ORIGINAL = "original_inv_freq"


def rope_switch(model: Any) -> RopeSwitch | None:
    """The switch of a model, read from its configuration; None for constant factors.

    Raises:
        UnsupportedModelError: Layers switch at different lengths.
    """
    text = model.config.get_text_config(decoder=True)
    given = getattr(text, "rope_parameters", None)
    if not isinstance(given, dict):
        return None
    switches: set[tuple[int, bool]] = set()
    for rope in (given, *given.values()):  # one for all layers, or one for each type of layer
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if not isinstance(kind, str) or kind == "default":
            continue
        if "dynamic" in kind:
            switches.add((int(text.max_position_embeddings), True))
        if kind == "longrope" or "long_mscale" in rope:  # PhiMoE scales by length with other types too
            length = rope.get("original_max_position_embeddings", text.max_position_embeddings)
            switches.add((int(length), False))
    if not switches:
        return None
    if len(switches) > 1:
        raise UnsupportedModelError(
            f"Layers of {type(model).__name__} change their rotary factors at different lengths, or in "
            f"different ways: rope_parameters={given}.",
            "One switch for all layers is supported; use model.generate for this model.",
        )
    ((length, grows),) = switches
    if grows:
        modules = [module for module in model.modules() if hasattr(module, "original_max_seq_len")]
        return RopeSwitch(length, rotary=modules)
    return RopeSwitch(length, renews=makes_cache_anew(model, DynamicCache(config=text), length + 1))
