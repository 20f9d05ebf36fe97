"""A functional check that a model verifies trees as it would have decoded their paths."""

from __future__ import annotations

import numpy as np
import torch

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.target import Target, disagreement, tolerance
from retrieval_draft.errors import RetrievalDraftError, UnsupportedModelError

__all__ = ["probe"]

_PROMPT = 8
_LONG_WINDOW = 64

_LONGEST_PROBE = 4096
"""The longest text that is tried; a window of a configuration above it is not seen."""


_MANY = 256
"""Children of a root, so that a window that counts slots loses keys enough to be noticed in any dtype."""


_WORDS = 8
"""Different tokens of a probed text: few, so that a model that keeps the best keys finds equal ones in it."""


@torch.no_grad()
def probe(target: Target) -> float:
    """Compares a small tree's logits with those of its paths decoded token by token.

    Costs one pass over a few prompt tokens, one over 4 nodes and 4 over one token; as much again, with more
    nodes, on a text beyond each window that the configuration names and its layer types do not: models that
    choose keys by their index in the pass, not by position, fail only there. GPT-Neo cuts a
    window by index; Doge keeps the best keys, and of equal ones those that its search meets first.

    Args:
        target: The model.

    Returns:
        The largest difference found, RMS over the standard deviation of the logits.

    Raises:
        UnsupportedModelError: The model fails on trees or its logits differ from those for single tokens,
            as models with ALiBi or with code that ignores the mask do.
    """
    windows = [window for window in target.windows.values() if window is not None and window <= _LONG_WINDOW]
    tried = [(max([_PROMPT, *(window + 2 for window in windows)]), 2)]
    longest = 2 * _LONGEST_PROBE if target.max_positions is None else target.max_positions - 4
    tried += [
        (min(window + max(2, window // 4), longest), _MANY)
        for window in _own_windows(target)
        if window < longest
    ]
    found = max((_compare(target, *text) for text in tried if text[0] <= longest), default=0.0)
    _refuse_fixed_masks(target)
    return found


def _refuse_fixed_masks(target: Target) -> None:
    """Refuses attention that cuts its mask from one for the longest text, by a token's index in the pass.

    Near its end it has no columns for the last nodes of a tree. Attention that transformers can exchange uses
    the given mask, even if a layer keeps another one.
    """
    longest = target.max_positions
    if longest is None or getattr(target.model, "_supports_sdpa", False):
        return
    for name, buffer in target.model.named_buffers():
        if buffer.shape[-2:] == (longest, longest):
            raise UnsupportedModelError(
                f"{type(target.model).__name__} has a mask of its own for {longest} tokens in a pass. "
                f"Near the end of so long a text the nodes of a tree lie outside it ({name}).",
                "Use model.generate for this model.",
            )


def _own_windows(target: Target) -> list[int]:
    """Windows and chunks that the configuration names beside those of its layer types."""
    text = target.model.config.get_text_config(decoder=True)
    known = set(target.windows.values())
    return [
        value
        for name, value in text.to_dict().items()
        if ("window" in name or "chunk" in name)
        and not name.endswith("layers")
        and type(value) is int
        and value not in known
        and _PROMPT < value <= _LONGEST_PROBE
    ]


def _compare(target: Target, length: int, width: int = 2) -> float:
    """`probe` of one text, with a tree of a root, its children, and last a child of the first of them.

    The more children, the further apart are a node's index in the pass and its position.
    """
    if target.rope is not None and length < target.rope.length <= length + 2:
        length = target.rope.length  # no tree reaches over it
    model, tokens = target.model, min(target.vocabulary, 1000)
    slots = tokens if target.max_positions is None else target.max_positions - length - 2
    width = min(width, tokens - 1, slots)
    random = np.random.default_rng(0)
    words = random.integers(0, tokens, _WORDS)
    prompt = torch.from_numpy(random.choice(words, length)).to(target.device)
    root, first, second = (int(token) for token in random.choice(words, 3))
    children = [(first + step) % tokens for step in range(width)]
    size = width + 2
    tree = DraftTree(
        tokens=np.array([root, *children, second], np.int32),
        parents=np.array([-1, *[0] * width, 1], np.int32),
        depths=np.array([0, *[1] * width, 2], np.int32),
        probs=np.ones(size, np.float32),
        path_probs=np.ones(size, np.float32),
        sources=np.zeros(size, np.int64),
    )
    last = size - 1
    try:
        cache = target.cache(length + size)
        for _ in target.prefill(cache, prompt, 1):
            pass
        together = target.verify_tree(cache, tree, length)[[0, 1, 2, last]]
        cache.drop()
        alone = []
        for node, position, keep in ((0, 0, 1), (2, 1, 0), (1, 1, 1), (last, 2, 0)):
            single = DraftTree.root(int(tree.tokens[node]))
            alone.append(target.verify_tree(cache, single, length + position)[:1])
            cache.commit(None, keep, keep)
            cache.drop()
        apart = torch.cat([alone[0], alone[2], alone[1], alone[3]])
    except RetrievalDraftError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} failed on a draft tree: {type(error).__name__}: {error}",
            "It may take no 4-D attention mask, or one cache layout only; use model.generate for this model.",
        ) from error
    difference, limit = disagreement(together, apart), tolerance(model.dtype)
    # NaN compares false: a model that returns NaN is reported when it generates, with the position.
    if difference > limit:
        raise UnsupportedModelError(
            f"{type(model).__name__} says something else for a tree than for its paths: the logits differ by "
            f"{difference:.2g} of their standard deviation, at most {limit:g} is allowed.",
            "It ignores the tree mask or the positions, as ALiBi does, or chooses keys by their index in the "
            "pass; use model.generate for this model.",
        )
    return difference
