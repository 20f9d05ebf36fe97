"""A draft model's own tree: expand the likeliest nodes level by level, then keep the best."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.target import Target
from retrieval_draft.index.source import TokenArray

__all__ = ["Expansion", "ExpansionLimits", "ModelTree"]

_LONG = 64
"""Missing tokens from which on a pass takes them as text and not as a tree."""


@dataclass(frozen=True, slots=True)
class ExpansionLimits:
    """Limits on the growth of a draft model's tree.

    Attributes:
        top_k: Children of a node, and nodes expanded in one level.
        depth: Levels, each a forward pass of the draft model.
        entropy_stop: Children of a node are not expanded where ``sqrt(0.15 * H)`` of its distribution exceeds
            this, H in nats (SVIP, arXiv:2411.18462); None expands them all.
        gain_stop: A level ends the expansion where it adds less than this to the expected accepted tokens
            (OPT-Tree, arXiv:2406.17276); None continues to `depth`.
    """

    top_k: int = 8
    depth: int = 6
    entropy_stop: float | None = 0.6
    gain_stop: float | None = None


@dataclass(frozen=True, slots=True)
class ModelTree:
    """Tree of a draft model's guesses, best path first.

    Attributes:
        tokens: int32, shape (n,).
        parents: int32, shape (n,). -1 for children of the root.
        probs: float32, shape (n,). The model's q(token | path).
    """

    tokens: TokenArray
    parents: NDArray[np.int32]
    probs: NDArray[np.float32]


_SVIP = 0.15


class Expansion:
    """A draft model with its cache of one text.

    The cache holds text only. Nodes are staged after it and dropped: each level passes the expanded part of
    the tree again, which costs ``1 + top_k * level`` tokens a pass and keeps one kind of mask.

    Args:
        target: The draft model.
        limits: Limits on the growth of the tree.
        applied: Entered around forward passes.
        slack: Last tokens of the text that are not kept in the cache, since they may still change.

    Example:
        q(9 | root) = .6, q(3 | root) = .3, q(4 | 9) = .7, two children each, budget 3:
        tokens [9, 4, 3], parents [-1, 0, -1], probs [.6, .7, .3]
    """

    def __init__(
        self,
        target: Target,
        limits: ExpansionLimits,
        applied: Callable[[], AbstractContextManager[object]] = nullcontext,
        slack: int = 0,
    ) -> None:
        self._target = target
        self._limits = limits
        self._applied = applied
        self._slack = slack
        self._cache: SpeculativeCache | None = None
        self._cached: TokenArray = np.empty(0, np.int32)

    @torch.no_grad()
    def grow(
        self, text: TokenArray, budget: int, allowed: Tensor | None = None, depth: int | None = None
    ) -> ModelTree:
        """The `budget` most probable nodes after `text` (EAGLE-2's expand and rerank, arXiv:2406.16858).

        Args:
            text: int32, shape (length,), at least one token; the last one is the root.
            budget: The most nodes to return.
            allowed: bool, shape (vocabulary,). Tokens that may be drafted; None for all.
            depth: Levels instead of the limit's.
        """
        limits = self._limits
        depth = limits.depth if depth is None else depth
        tokens, parents, probs, paths, depths = [int(text[-1])], [-1], [1.0], [1.0], [0]
        with self._applied():
            frontier, rows = [0], self._root(text)
            expected, expanded = 0.0, [0]
            for level in range(depth):
                likely, entropy = _best(rows, limits.top_k, allowed)
                added, stopped = len(tokens), []
                for node, (row_tokens, row_probs), h in zip(frontier, likely, entropy, strict=True):
                    uncertain = limits.entropy_stop is not None and (_SVIP * h) ** 0.5 > limits.entropy_stop
                    for token, prob in zip(row_tokens, row_probs, strict=True):
                        if prob > 0.0:
                            tokens.append(token)
                            parents.append(node)
                            probs.append(prob)
                            paths.append(paths[node] * prob)
                            depths.append(depths[node] + 1)
                            stopped.append(uncertain)
                reached = sum(sorted(paths[1:], reverse=True)[:budget])
                gained, expected = reached - expected, reached
                if limits.gain_stop is not None and gained <= limits.gain_stop:
                    break
                # A child of a node is at most as likely as that: below the budget's last it cannot enter.
                min_prob = sorted(paths[1:], reverse=True)[budget - 1] if len(tokens) > budget else 0.0
                fresh = [
                    n for n in range(added, len(tokens)) if not stopped[n - added] and paths[n] > min_prob
                ]
                frontier = sorted(fresh, key=lambda n: -paths[n])[: limits.top_k]
                if not frontier or level + 1 == depth:
                    break
                expanded += sorted(frontier)
                frontier = sorted(frontier)
                rows = self._pass(tokens, parents, depths, expanded, len(text))[-len(frontier) :]
        order = sorted(range(1, len(tokens)), key=lambda n: (-paths[n], depths[n], n))[:budget]
        index_of = {0: -1, **{node: index for index, node in enumerate(order)}}
        return ModelTree(
            np.array([tokens[node] for node in order], np.int32),
            np.array([index_of[parents[node]] for node in order], np.int32),
            np.array([probs[node] for node in order], np.float32),
        )

    @torch.no_grad()
    def review(self, text: TokenArray, chain: TokenArray) -> Tensor:
        """Scores a chain of guesses.

        Args:
            text: int32, shape (length,), at least one token.
            chain: int32, shape (n,). Guesses after it.

        Returns:
            (n + 1, vocabulary), float: log probabilities after the text and after each guess.
        """
        with self._applied():
            root = self._root(text)
            if not len(chain):
                return root.float().log_softmax(-1)
            tokens = [int(text[-1]), *chain.tolist()]
            indices = list(range(len(tokens)))
            rows = self._pass(tokens, [index - 1 for index in indices], indices, indices, len(text))
            return rows.float().log_softmax(-1)

    def close(self) -> None:
        """Frees the cache."""
        self._cache, self._cached = None, np.empty(0, np.int32)

    def _root(self, text: TokenArray) -> Tensor:
        """Logits after the last token, (1, vocabulary); text that is missing in the cache enters it."""
        target = self._target
        same = len(self._cached)
        if same >= len(text) or not np.array_equal(self._cached, text[:same]):
            self.close()
            same = 0
        if self._cache is None:
            self._cache = target.cache(len(text) + 256)
        keep = max(len(text) - 1 - self._slack, same)
        if keep - same > _LONG:
            ids = torch.from_numpy(text[same:keep].astype(np.int64)).to(target.device)
            for _ in target.append(self._cache, ids, same):
                pass
            same = keep
        chain = text[same:]
        logits = target.verify_tree(self._cache, _chain(chain), same)[: len(chain)]
        if keep > same:
            self._cache.commit(None, keep - same, keep - same)
        self._cached = text[:keep].copy()
        # Tokens that are not kept stand between cache and root in every later pass of this step.
        self._between = text[keep:-1]
        return logits[-1:]

    def _pass(
        self, tokens: list[int], parents: list[int], depths: list[int], nodes: list[int], length: int
    ) -> Tensor:
        """Logits of `nodes`, which hold their own ancestors, parents first."""
        assert self._cache is not None
        skip = len(self._between)
        index_of = {node: skip + index for index, node in enumerate(nodes)}
        size = skip + len(nodes)
        ones = np.ones(size, np.float32)
        tree = DraftTree(
            np.concatenate((self._between, [tokens[node] for node in nodes])).astype(np.int32),
            np.array(
                [*range(-1, skip - 1), *(index_of[parents[n]] if n else skip - 1 for n in nodes)], np.int32
            ),
            np.array([*range(skip), *(skip + depths[n] for n in nodes)], np.int32),
            ones,
            ones,
            np.zeros(size, np.int64),
        )
        return self._target.verify_tree(self._cache, tree, length - 1 - skip)[skip:size]


def _chain(tokens: TokenArray) -> DraftTree:
    size = len(tokens)
    ones = np.ones(size, np.float32)
    indices = np.arange(size, dtype=np.int32)
    return DraftTree(np.array(tokens, np.int32), indices - 1, indices, ones, ones, np.zeros(size, np.int64))


def _best(
    logits: Tensor, k: int, allowed: Tensor | None
) -> tuple[list[tuple[list[int], list[float]]], list[float]]:
    """The k best tokens of each row with their probabilities, and each row's entropy in nats."""
    logits = logits.float()
    if allowed is not None:
        logits = logits[:, : len(allowed)].masked_fill(~allowed[: logits.shape[1]], float("-inf"))
    logs = logits.log_softmax(-1)
    probs, tokens = logs.exp().topk(min(k, logs.shape[1]))
    entropy = torch.special.entr(logs.exp()).sum(-1)
    rows = list(zip(tokens.tolist(), probs.nan_to_num(0.0).tolist(), strict=True))
    return rows, entropy.nan_to_num(0.0).tolist()
