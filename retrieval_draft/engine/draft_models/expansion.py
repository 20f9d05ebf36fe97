"""A draft model's own tree: expand the likeliest nodes level by level, then keep the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.cache.prefix_tree import common_length
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import TokenizerMismatchError
from retrieval_draft.index.source import TokenArray

__all__ = ["Expansion", "ExpansionLimits", "Growth", "LentExpansion", "ModelTree"]

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


class Growth:
    """A tree that grows level by level: the likeliest nodes are expanded, the best of all are kept.

    EAGLE-2's expand and rerank (arXiv:2406.16858). The caller supplies the next tokens' logits at the
    nodes of the frontier, until there is none.

    Args:
        limits: Limits on the growth.
        budget: The most nodes to keep.
        allowed: bool, shape (vocabulary,). Tokens that may be drafted; None for all.
        ids: int64, shape (columns of the logits,). Token of each column; None where they are the same.
        sure: Levels of which the target is known to emit a token: more than the limit's, and expanded always.

    Attributes:
        tokens: Of all nodes so far, the root first.
        parents: Index of each node's parent, -1 for the root.
        depths: Of all nodes, 0 for the root.
        expanded: Nodes of which the next tokens are known or asked for, parents first.
        frontier: The last of them, whose next tokens are asked for.

    Example:
        q(9 | root) = .6, q(3 | root) = .3, q(4 | 9) = .7, two children each, budget 3:
        tokens [9, 4, 3], parents [-1, 0, -1], probs [.6, .7, .3]
    """

    def __init__(
        self,
        limits: ExpansionLimits,
        budget: int,
        allowed: Tensor | None = None,
        ids: NDArray[np.int64] | None = None,
        sure: int = 0,
    ) -> None:
        self._limits, self._budget, self._allowed, self._ids = limits, budget, allowed, ids
        self._sure = sure
        self._probs, self._paths = [1.0], [1.0]
        self._level, self._expected = 0, 0.0
        self.tokens: list[int] = []
        self.parents, self.depths = [-1], [0]
        self.expanded, self.frontier = [0], [0]

    def begin(self, root: int, rows: Tensor, ids: NDArray[np.int64] | None = None) -> None:
        """Starts with a root token and the logits after it, (1, columns); see `add`."""
        self.tokens = [root]
        self.add(rows, ids)

    def add(self, rows: Tensor, ids: NDArray[np.int64] | None = None) -> None:
        """Adds the children of the frontier's nodes, and chooses the next frontier.

        Args:
            rows: (nodes of the frontier, columns). Logits of the next tokens.
            ids: int64, shape (columns,). Token of each column here; None for those of the tree.
        """
        ids = self._ids if ids is None else ids
        limits, budget, paths, tokens = self._limits, self._budget, self._paths, self.tokens
        likely, entropy = _best(rows, limits.top_k, self._allowed)
        added, stopped = len(tokens), []
        for node, (row_tokens, row_probs), h in zip(self.frontier, likely, entropy, strict=True):
            may_stop = limits.entropy_stop is not None and self._level >= self._sure
            uncertain = may_stop and (_SVIP * h) ** 0.5 > limits.entropy_stop
            for token, prob in zip(row_tokens, row_probs, strict=True):
                if prob > 0.0:
                    tokens.append(token if ids is None else int(ids[token]))
                    self.parents.append(node)
                    self._probs.append(prob)
                    paths.append(paths[node] * prob)
                    self.depths.append(self.depths[node] + 1)
                    stopped.append(uncertain)
        self._level += 1
        self.frontier = []
        ordered = sorted(paths[1:], reverse=True)
        gained, self._expected = sum(ordered[:budget]) - self._expected, sum(ordered[:budget])
        after = self._level - self._sure
        if after == limits.depth or (
            limits.gain_stop is not None and after > 0 and gained <= limits.gain_stop
        ):
            return
        # A child of a node is at most as likely as that: below the budget's last it cannot enter.
        min_prob = ordered[budget - 1] if len(tokens) > budget else 0.0
        fresh = [n for n in range(added, len(tokens)) if not stopped[n - added] and paths[n] > min_prob]
        self.frontier = sorted(sorted(fresh, key=lambda n: -paths[n])[: limits.top_k])
        self.expanded = self.expanded + self.frontier

    def follow(self, token: int) -> Growth:
        """Has the next tokens of one more node asked for: `token`, below the node before. Returns itself."""
        self.tokens.append(token)
        self.parents.append(self.frontier[-1])
        self.depths.append(self.depths[-1] + 1)
        self.frontier = [len(self.tokens) - 1]
        self.expanded = self.expanded + self.frontier
        return self

    def tree(self) -> ModelTree:
        """The most probable nodes, the best first."""
        paths, depths = self._paths, self.depths
        order = sorted(range(1, len(self.tokens)), key=lambda n: (-paths[n], depths[n], n))[: self._budget]
        index_of = {0: -1, **{node: index for index, node in enumerate(order)}}
        return ModelTree(
            np.array([self.tokens[node] for node in order], np.int32),
            np.array([index_of[self.parents[node]] for node in order], np.int32),
            np.array([self._probs[node] for node in order], np.float32),
        )


class Expansion:
    """A draft model with its cache of one text.

    The cache holds text only; where the text has changed, it goes back to what is still the same. Nodes are
    staged after it and dropped: each level passes the expanded part of the tree again, which costs
    ``1 + top_k * level`` tokens a pass and keeps one kind of mask.

    Args:
        target: The draft model.
        limits: Limits on the growth of the tree.
        applied: Entered around forward passes.
        slack: Last tokens of the text that are not kept in the cache, since they may still change.

    Example:
        text 7 8 after a cache of 7: one pass over 8, then one over 8 and the first frontier, and so on
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
        self,
        text: TokenArray,
        budget: int,
        allowed: Tensor | None = None,
        depth: int | None = None,
        ids: NDArray[np.int64] | None = None,
        sure: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> ModelTree:
        """The `budget` most probable nodes after `text` (EAGLE-2's expand and rerank, arXiv:2406.16858).

        Args:
            text: int32, shape (length,), at least one token; the last one is the root.
            budget: The most nodes to return.
            allowed: bool, shape (vocabulary,). Tokens that may be drafted; None for all.
            depth: Levels instead of the limit's.
            ids: int64, shape (columns of the logits,). Token of each column; None where they are the same.
            sure: As for `Growth`.
            stop: True where the tree is not to grow on.
        """
        limits = self._limits if depth is None else replace(self._limits, depth=depth)
        growing = Growth(limits, budget, allowed, ids, sure)
        with self._applied():
            growing.begin(int(text[-1]), self._root(text))
            while growing.frontier and not stop():
                nodes = (growing.tokens, growing.parents, growing.depths, growing.expanded)
                growing.add(self._pass(*nodes, len(text))[-len(growing.frontier) :])
        return growing.tree()

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
            self._check_known(chain)
            tokens = [int(text[-1]), *chain.tolist()]
            indices = list(range(len(tokens)))
            rows = self._pass(tokens, [index - 1 for index in indices], indices, indices, len(text))
            return rows.float().log_softmax(-1)

    @torch.no_grad()
    def grow_parallel(
        self, text: TokenArray, budget: int, masks: TokenArray, allowed: Tensor | None
    ) -> ModelTree:
        """The most probable nodes by one pass, for a model that guesses at masks; see `grow`.

        Args:
            text: int32, shape (length,), at least one token; the last one is the root.
            budget: The most nodes to return.
            masks: int32, shape (levels - 1,). Tokens in place of those to be guessed.
            allowed: bool, shape (vocabulary,). Tokens that may be drafted; None for all.
        """
        growing = Growth(replace(self._limits, depth=len(masks) + 1), budget, allowed)
        with self._applied():
            rows = self._root(text, masks)
        growing.begin(int(text[-1]), rows[:1])
        while growing.frontier:
            depth = growing.depths[growing.frontier[0]]
            growing.add(rows[depth].expand(len(growing.frontier), -1))
        return growing.tree()

    def knows(self, tokens: TokenArray) -> bool:
        """True if the model has a row for each of `tokens`, int32, shape (n,)."""
        return not len(tokens) or int(tokens.max()) < self._target.embedding_rows

    def _check_known(self, tokens: TokenArray) -> None:
        if not self.knows(tokens):
            raise TokenizerMismatchError(
                f"Token {int(tokens.max())} is unknown to the draft model, which has "
                f"{self._target.embedding_rows} tokens.",
                "Pass (model, tokenizer) as draft_model, so that its text is translated.",
            )

    def close(self) -> None:
        """Frees the cache."""
        self._cache, self._cached = None, np.empty(0, np.int32)

    def _root(self, text: TokenArray, masks: TokenArray | None = None) -> Tensor:
        """Logits after the last token and each mask, (1 + masks, vocabulary).

        Text that is missing in the cache enters it.
        """
        target = self._target
        same = common_length(self._cached, text[:-1])
        self._check_known(text[same:])
        if same < len(self._cached) and (self._cache is None or not self._cache.keep(same)):
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
        passed = chain if masks is None else np.concatenate((chain, masks))
        logits = target.verify_tree(self._cache, _chain(passed), same)[len(chain) - 1 : len(passed)]
        if keep > same:
            self._cache.commit(None, keep - same, keep - same)
        self._cached = text[:keep].copy()
        # Tokens that are not kept stand between cache and root in every later pass of this step.
        self._between = text[keep:-1]
        return logits

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


class LentExpansion(Expansion):
    """Drafts after the text in a cache that another engine keeps, or in one of its own where none is lent.

    Args:
        target, limits, applied: As for `Expansion`.
        used: Returns what its passes depend on. Where that has changed, its own cache is filled anew.

    Attributes:
        cache: Holds the text but for its last token, for this step; None where it is not lent. Staged nodes
            are dropped again.
    """

    cache: Any = None

    def __init__(
        self,
        target: Target,
        limits: ExpansionLimits,
        applied: Callable[[], AbstractContextManager[object]],
        used: Callable[[], object],
    ) -> None:
        super().__init__(target, limits, lambda: self._lent(applied))
        self._used = used
        self._filled_by: object = None

    def _root(self, text: TokenArray, masks: TokenArray | None = None) -> Tensor:
        if self.cache is None or masks is not None:
            if self._filled_by != (now := self._used()):
                self.close()
                self._filled_by = now
            return super()._root(text, masks)
        self._cached, self._between = text[:0], text[:0]
        self._cache = self.cache
        return self._target.verify_tree(self.cache, _chain(text[-1:]), self.cache.get_seq_length())[:1]

    def _pass(
        self, tokens: list[int], parents: list[int], depths: list[int], nodes: list[int], length: int
    ) -> Tensor:
        lent = self.cache
        return super()._pass(
            tokens, parents, depths, nodes, length if lent is None else lent.get_seq_length() + 1
        )

    @contextmanager
    def _lent(self, applied: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Context of a call, after which a lent cache is as before."""
        with applied():
            try:
                yield
            finally:
                if self.cache is not None:
                    self.cache.drop()
                    self.close()


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
