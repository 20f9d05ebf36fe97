"""Drafts for an engine that keeps its own model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._settings import check_range
from retrieval_draft.config import MAX_NODES, DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.hierarchy import SourceHierarchy
from retrieval_draft.drafting.kept_calibration import (
    FleetCalibration,
    calibration_file,
    keep_calibration,
    load_calibration,
)
from retrieval_draft.drafting.open_stores import open_draft_stores
from retrieval_draft.drafting.session import DraftPlan, DraftSession
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.drafting.warm_up import compile_drafting
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import CONTEXT, DraftSource, NodeLogits, TokenArray, checked_ids
from retrieval_draft.index.store.config import check_share
from retrieval_draft.index.store.store import SharedStore
from retrieval_draft.methods.method import Method, MethodContext
from retrieval_draft.methods.registry import get_method
from retrieval_draft.models.fingerprint import vocabulary_size

__all__ = ["Proposer", "ProposerSession"]

_ENDLESS = 1 << 30


class Proposer:
    """Proposes draft trees and chains from text only; the caller verifies them with a model of its own.

    The same sources, fusion and calibration as `RetrievalDrafter`, without a model: no cost is measured, so
    the caller chooses the number of nodes, and the adjacency matrix learns from the emitted tokens, or from
    logits that the caller passes. Sessions may be used from several threads; they take turns.

    Args:
        stores: Data to draft from besides the requests.
        config: The drafting configuration.

    Attributes:
        config: As given.
        stats: Counts of all sessions.
        store: Store that servers share; None without one.

    Example:
        with Proposer.for_tokenizer(tokenizer) as proposer:
            session = proposer.open(prompt)
            tree = session.propose(16)  # verify it, then pass the emitted tokens:
            session.observe(emitted)
            session.close()
    """

    def __init__(self, stores: DraftStores, config: DraftConfig) -> None:
        self._method: Method = get_method(config.method)
        if self._method.needs_model:
            raise InvalidInputError(
                f"The method {config.method!r} drafts with a model, which a proposer does not have.",
                "Choose a method that looks text up, such as calibrated.",
            )
        self.config, self.stores = config, stores
        self.stats = DraftStats()
        self.store: SharedStore | None = stores.shared
        # Sessions are opened one by one, so none has siblings.
        names = tuple(name for name in config.sources if name != "siblings")
        parts = MethodContext(replace(config, sources=names), stores)
        self._hierarchy = SourceHierarchy(self._method.sources(parts))
        kept = calibration_file(config)
        self._fleet = FleetCalibration(stores.shared, is_new=kept is None or not kept.exists())
        self.calibration: Calibration = load_calibration(kept)
        self.lock = threading.RLock()
        """Lock of sources and calibration, which all sessions share."""

    @classmethod
    def for_tokenizer(
        cls,
        tokenizer: Any,
        *,
        vocabulary: int | None = None,
        corpora: Sequence[Any] = (),
        phrases: Any = None,
        store: Any = None,
        config: DraftConfig | None = None,
    ) -> Proposer:
        """Makes a proposer for the ids of a tokenizer.

        Args:
            tokenizer: Of the model that verifies. None where there are only ids; `vocabulary` is needed then,
                and drafts come from requests only.
            vocabulary: Number of token ids; None for that of the tokenizer.
            corpora: Folders of ``retrieval-draft index build``, or opened ones.
            phrases: Fixed texts that the model often repeats: a file, or a list of texts.
            store: Store that servers share: a URL, a `StoreConfig`, or an opened `SharedStore`.
            config: All other settings.

        Raises:
            InvalidInputError: There is neither tokenizer nor vocabulary, or another argument needs the
                tokenizer.
            TokenizerMismatchError: A corpus or the opened store belongs to another tokenizer.
            DatastoreError: A corpus is missing or torn.
        """
        if vocabulary is None:
            if tokenizer is None:
                raise InvalidInputError(
                    "A proposer needs to know which ids there are.", "Pass a tokenizer, or vocabulary=."
                )
            vocabulary = vocabulary_size(tokenizer)
        config = config if config is not None else DraftConfig()
        return cls(open_draft_stores(tokenizer, vocabulary, config, corpora, phrases, store), config)

    def open(
        self, prompt: TokenArray, references: Sequence[TokenArray] = (), *, share: str | None = None
    ) -> ProposerSession:
        """Starts a request.

        Args:
            prompt: int32, shape (length,), one token at least: all of the text so far.
            references: int32, shape (length,) each. Texts that the reply may quote.
            share: Parts that other servers may learn: "none", "reply" or "all"; None for the store's default.

        Raises:
            InvalidInputError: The prompt is empty or has ids outside the vocabulary, or there is no store.
        """
        ids = checked_ids(prompt, "The prompt", self.stores.vocabulary)
        if not len(ids):
            raise InvalidInputError("The prompt is empty.", "Pass one token at least, such as the bos token.")
        if share is not None and check_share(share) != "none" and self.store is None:
            raise InvalidInputError(f"share={share!r} needs a store.", "Pass store= to for_tokenizer.")
        texts = [checked_ids(text, "A reference", self.stores.vocabulary) for text in references]
        stats = DraftStats(requests=1, prompt_tokens=len(ids))
        opened = self._hierarchy.open(ids, texts)  # outside the lock, as a long text takes time
        with self.lock:
            self._fleet.exchange(self.calibration)
            drafting = DraftSession(
                opened,
                self._method.tree,
                self.calibration.open(ids),
                self.config.max_nodes,
                self.stores.vocabulary,
                stats,
            )
        return ProposerSession(self, drafting, ids, share, stats)

    def warm_up(self) -> None:
        """Compiles kernels and reads the store's log ahead of the first request."""
        spare = MethodContext(replace(self.config, history_folder=None), DraftStores(vocabulary=16))
        compile_drafting(self._method.sources(spare), self._method.tree, self.config.top_k)
        if self.store is not None:
            self.store.wait_ready()

    def flush(self) -> None:
        """Waits until finished requests' texts can be drafted from; no request waits for that."""
        self._hierarchy.flush()
        keep_calibration(self.calibration, calibration_file(self.config))
        if self.store is not None:
            self.store.flush()

    def close(self) -> None:
        """Saves and sends pending data, and stops background threads."""
        self._hierarchy.close()
        keep_calibration(self.calibration, calibration_file(self.config))
        if self.store is not None and self.stores.owns_shared:
            self.store.close()

    @property
    def sources(self) -> list[DraftSource]:
        """The draft sources themselves, nearest first."""
        return list(self._hierarchy.sources)

    @property
    def nbytes(self) -> int:
        """Bytes held by all sources, sessions excluded."""
        return self._hierarchy.nbytes

    @property
    def nbytes_by_source(self) -> dict[str, int]:
        """Bytes held by each source, by its name."""
        return {source.name: source.nbytes for source in self._hierarchy.sources}

    def __enter__(self) -> Proposer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ProposerSession:
    """One request of a `Proposer`. One thread at a time may use it.

    Attributes:
        stats: Its counts. Steps are calls of `observe`.
    """

    def __init__(
        self,
        proposer: Proposer,
        drafting: DraftSession,
        prompt: TokenArray,
        share: str | None,
        stats: DraftStats,
    ) -> None:
        self.stats = stats
        self._proposer, self._drafting, self._share = proposer, drafting, share
        self._prompt = prompt
        self._reply: list[TokenArray] = []
        self._tail = prompt[-CONTEXT:]
        self._length = len(prompt)
        self._plan: DraftPlan | None = None
        self._unlearned: _Feedback | None = None
        self._closed = False

    @property
    def length(self) -> int:
        """Tokens of prompt and reply so far."""
        return self._length

    def propose(self, nodes: int, max_depth: int | None = None) -> DraftTree:
        """The most probable continuations, as a tree below the last token of the text.

        Args:
            nodes: Draft nodes at most, the root not counted.
            max_depth: Largest useful length of a path; None for any.

        Returns:
            The tree; its root alone where no source has a guess.

        Raises:
            InvalidInputError: `nodes` is negative or too large, or the session is closed.
        """
        check_range("nodes", nodes, 0, MAX_NODES)
        self._check_open()
        with self._proposer.lock:
            root = int(self._tail[-1])
            limit = _ENDLESS if max_depth is None else max_depth
            self._plan = self._drafting.propose(root, self._length - 1, limit, nodes)
        return self._plan.tree

    def propose_chain(
        self, max_tokens: int, min_prob: float = 0.0, nodes: int | None = None
    ) -> tuple[TokenArray, NDArray[np.float32]]:
        """The one continuation with the most accepted tokens on average.

        Args:
            max_tokens: Limit of its length.
            min_prob: Smallest path probability of its tokens.
            nodes: Size of the tree it is chosen from; None for twice its length, 16 at least.

        Returns:
            int32, shape (n,), its tokens; float32, shape (n,), P(all up to this one are accepted).

        Raises:
            InvalidInputError: As `propose`.

        Example:
            the text 7 8 9 4 7 8: propose_chain(2)  ->  tokens [9, 4]
        """
        check_range("max_tokens", max_tokens, 0, MAX_NODES)
        wanted = min(MAX_NODES, max(16, 2 * max_tokens)) if nodes is None else nodes
        tree = self.propose(wanted, max_tokens)
        assert self._plan is not None
        kept = tree.best_path(max_tokens, min_prob)
        self._plan = DraftPlan(tree.path(kept), self._plan.fused, self._plan.proposals)
        return tree.tokens[kept], tree.path_probs[kept]

    def cut(self, nodes: int) -> None:
        """Limits verification to the first `nodes` draft nodes of the last proposal.

        Args:
            nodes: 0 or more; the others are neither counted nor learned from as verified.
        """
        if self._plan is not None:
            self._plan = self._plan.cut(max(nodes, 0))

    def observe(self, tokens: TokenArray, logits: NodeLogits | None = None, *, later: bool = False) -> int:
        """Appends the tokens that the model emitted since the last call, in order, the bonus token included.

        Args:
            tokens: int32, shape (m,).
            logits: The model's predictions at positions of the text or of the tree, if the caller has them;
                else the sources learn that each token followed its context.
            later: Whether learning from the step, but for its tokens, waits for `apply_feedback`, so that the
                next proposal comes sooner; the next call of this or `close` does it at the latest.

        Returns:
            Number of the tokens that had been drafted, from the first on.

        Raises:
            InvalidInputError: An id lies outside the vocabulary, or the session is closed; no token is
                appended.
        """
        emitted = checked_ids(tokens, "What was emitted", self._proposer.stores.vocabulary)
        self._check_open()
        if not len(emitted):
            return 0
        self.apply_feedback()
        plan, self._plan = self._plan, None
        text = np.concatenate((self._tail, emitted))
        if plan is None:
            root = DraftTree.root(int(self._tail[-1]))
            plan = DraftPlan(root, root, ())
        path = plan.tree.walk(emitted)
        with self._proposer.lock:
            self._drafting.observe(emitted)
        self._unlearned = _Feedback(plan, path, text, emitted, logits)
        if not later:
            self.apply_feedback()
        self._reply.append(emitted)
        self._tail = text[-CONTEXT:]
        self._length += len(emitted)
        self.stats.tokens += len(emitted)
        self.stats.steps += 1
        return len(path) - 1

    def apply_feedback(self) -> None:
        """Learns from the last `observe`. Further calls do nothing."""
        feedback, self._unlearned = self._unlearned, None
        if feedback is None:
            return
        logits = (
            feedback.logits
            if feedback.logits is not None
            else _emitted_logits(feedback.text, len(feedback.emitted))
        )
        with self._proposer.lock:
            self._drafting.count(feedback.plan, feedback.path)
            self._drafting.learn(feedback.plan, feedback.emitted, logits)

    def close(self, *, finished: bool = True) -> None:
        """Ends the request: adds its text to the history, and, if finished, to the store. Idempotent.

        Args:
            finished: False where the request was aborted: other servers learn nothing of it then.
        """
        if self._closed:
            return
        self.apply_feedback()
        self._closed = True
        proposer = self._proposer
        if finished and proposer.store is not None:  # first, while the sources know what they learned
            reply = np.concatenate(self._reply) if self._reply else np.empty(0, np.int32)
            proposer.store.share(self._prompt, reply, self._share)
        with proposer.lock:
            self._drafting.close()
            proposer.stats.add(self.stats)

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidInputError("The session is closed.", "Open another one.")


class _Feedback(NamedTuple):
    """Result of a step, until it is learned."""

    plan: DraftPlan
    path: Sequence[int]
    text: TokenArray
    emitted: TokenArray
    logits: NodeLogits | None


def _emitted_logits(text: TokenArray, count: int) -> NodeLogits:
    """Predictions with probability 1 that each of the last `count` tokens of `text` followed its context."""
    padded = np.concatenate((np.full(CONTEXT, -1, np.int32), text))
    first = np.arange(len(text) - count, len(text))
    contexts = padded[first[:, None] + np.arange(CONTEXT)]  # a view of windows takes four times as long
    return NodeLogits(contexts, text[-count:, None].copy(), np.ones((count, 1), np.float32))
