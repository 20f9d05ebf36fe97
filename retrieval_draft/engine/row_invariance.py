"""The test on a model that a token's bits depend neither on its slot nor on the tokens beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.bitwise_target import BitwiseTarget
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.graph.bitwise_pass import WIDTH
from retrieval_draft.engine.target import Target, disagreement, tolerance
from retrieval_draft.errors import UnsupportedModelError
from retrieval_draft.index.source import TokenArray

__all__ = ["check_row_invariance"]

_TEXTS = ((5, WIDTH), (2 * WIDTH + 7, WIDTH // 2))
"""Lengths of the texts that are tried, prompt and reply: with near keys alone, and with far ones."""

_PATH = 8
"""Drafts of a tree that belong to the text, at most, but for the chain."""

_HINT = "Leave out exact='bitwise' for this model, on this machine."

_Slots = Callable[[int], NDArray[np.int64]]
"""Slots of a tree for the next tokens of the text, at most so many, ascending; 0 is the root's."""


@torch.no_grad()
def check_row_invariance(target: BitwiseTarget) -> None:
    """Passes a random text token by token, and then as paths of trees; all bits must be equal.

    The trees hold the text's next tokens as a chain, in the last slots, and in random ones, among random
    drafts, so that each slot holds a token of the text beside different neighbours. Compared are the logits
    after each token, and all keys and values once they are committed. Passes without this mode must agree but
    for rounding.

    Args:
        target: The model. Nothing stays in its caches.

    Raises:
        UnsupportedModelError: Some bit differs, or the logits are not those of the model's own passes.
    """
    random = np.random.default_rng(0)
    name = type(target.model).__name__
    orders: dict[str, _Slots] = {
        "in a chain": lambda left: np.arange(1, left + 1),
        "in the last slots": lambda left: np.arange(WIDTH - min(left, _PATH), WIDTH),
        "in random slots": lambda left: np.sort(
            random.choice(np.arange(1, WIDTH), min(left, int(random.integers(1, _PATH))), replace=False)
        ),
    }
    most = target.max_positions
    fitting = [tried for tried in _TEXTS if most is None or sum(tried) <= most]
    for length, reply in fitting or [(1, (most or 0) - 1)]:
        text = random.integers(0, target.vocabulary, length + reply).astype(np.int32)
        alone, logits = _passed(target, text, length, lambda left: np.arange(0), random)
        _compare_with_usual(target, text, logits)
        for order, slots in orders.items():
            drafted, others = _passed(target, text, length, slots, random)
            for index, (row, other) in enumerate(zip(logits, others, strict=True)):
                if not _same(row, other):
                    raise UnsupportedModelError(
                        f"{name} is not exact in bits here: the logits after token {length + index} of a "
                        f"text are others in a pass over it alone than as a draft {order} beside others.",
                        _HINT,
                    )
            for number, (layer, same) in enumerate(
                zip(alone.attention_layers, drafted.attention_layers, strict=True)
            ):
                if layer.is_initialized and not all(map(_same, layer.held(), same.held())):
                    raise UnsupportedModelError(
                        f"{name} is not exact in bits here: keys or values of layer {number} are others of "
                        f"tokens passed alone than of drafts {order}.",
                        _HINT,
                    )


def _passed(
    target: BitwiseTarget, text: TokenArray, length: int, slots_of: _Slots, random: np.random.Generator
) -> tuple[SpeculativeCache, list[Tensor]]:
    """A cache of all of a text, and the logits after each token of its reply.

    Args:
        target: The model.
        text: Prompt and reply.
        length: Tokens of the prompt. Where the reply is passed token by token, its chains end elsewhere.
        slots_of: Chooses slots for the tokens after a root.
        random: Draws the other drafts.
    """
    cache: SpeculativeCache = target.cache(len(text), keeps_all=True)
    prompt = torch.from_numpy(text[:length].astype(np.int64)).to(target.device)
    cut = 3 if len(slots_of(1)) == 0 else length
    for part in prompt.split([cut, length - cut]) if cut < length else [prompt]:
        for _ in target.prefill(cache, part, 1):
            pass
    logits: list[Tensor] = []
    while len(logits) < len(text) - length:
        at = length + len(logits)
        slots = slots_of(min(len(text) - at - 1, WIDTH - 1))
        path = np.concatenate([[0], slots]).astype(np.int64)
        tree = _tree(text[at : at + len(path)], path, target.vocabulary, random)
        found = target.verify_tree(cache, tree, at)
        logits += list(found[torch.from_numpy(path).to(found.device)].clone())
        kept = next((index for index, node in enumerate(path) if index != node), len(path))
        moved = torch.from_numpy(path[kept:]).to(target.device) if kept < len(path) else None
        cache.commit(moved, kept, len(path))
    return cache, logits


def _tree(
    tokens: TokenArray, path: NDArray[np.int64], vocabulary: int, random: np.random.Generator
) -> DraftTree:
    """A tree in whose nodes `path` these tokens lie one below the other; those between are random."""
    size = int(path[-1]) + 1
    held = random.integers(0, vocabulary, size).astype(np.int32)
    parents = np.array([-1, *(random.integers(0, node) for node in range(1, size))], np.int32)
    held[path], parents[path[1:]] = tokens, path[:-1]
    depths = np.zeros(size, np.int32)
    for node in range(1, size):
        depths[node] = depths[parents[node]] + 1
    ones = np.ones(size, np.float32)
    return DraftTree(held, parents, depths, ones, ones, np.zeros(size, np.int64))


def _compare_with_usual(target: BitwiseTarget, text: TokenArray, logits: list[Tensor]) -> None:
    usual = Target(target.model, "off")
    ids = torch.from_numpy(text.astype(np.int64)).to(target.device)
    expected = torch.cat(list(usual.prefill(usual.cache(len(text)), ids, len(logits))))
    # Where two experts are equally good, rounding chooses: of a few tokens all logits may be others.
    each = [disagreement(row[None], other[None]) for row, other in zip(logits, expected, strict=True)]
    found, limit = float(np.median(each)), tolerance(target.model.dtype)
    if found > limit:
        raise UnsupportedModelError(
            f"{type(target.model).__name__} has other logits with attention by position: they differ by "
            f"{found:.2g} of their standard deviation at half of the tokens, at most {limit:g} is allowed.",
            "Leave out exact='bitwise' for this model.",
        )


def _same(values: Tensor, others: Tensor) -> bool:
    """True if floats are equal bit for bit: NaN equals itself, and signs of zero count."""
    return torch.equal(values.contiguous().view(torch.uint8), others.contiguous().view(torch.uint8))
