"""The decoding loop of one request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import StoppingCriteriaList

from retrieval_draft.engine.drafting import Drafting, Plan
from retrieval_draft.engine.kv_cache import SpeculativeCache
from retrieval_draft.engine.logits import LogitReader, Predictions
from retrieval_draft.engine.sampling import Sampler, non_finite
from retrieval_draft.engine.stats import DraftStats
from retrieval_draft.engine.target import Target
from retrieval_draft.engine.transcript import Transcript
from retrieval_draft.engine.tree import DraftTree
from retrieval_draft.engine.verify import walk
from retrieval_draft.index.source import TokenArray

__all__ = ["DecodeRequest", "decode"]

_ROOM = 4096
"""Tokens of reply that the cache makes room for at once."""


@dataclass(slots=True)
class DecodeRequest:
    """What to decode.

    Attributes:
        prompt: int32, shape (length,), padding stripped.
        max_length: Prompt and reply together.
        eos: Tokens that end the reply.
        criteria: Further stopping criteria, asked after each token.
        sampler: Chooses tokens where processors or sampling take part; None for the argmax.
        padded: int64, shape (1, length + padding). Needed by `criteria` and `sampler`.
        emit: Called with each new token, once and in order.
        prompt_rows: Last prompt positions whose predictions the sources learn from.
        prefill_chunk: Prompt tokens in one pass at most.
    """

    prompt: TokenArray
    max_length: int
    eos: frozenset[int] = frozenset()
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    sampler: Sampler | None = None
    padded: Tensor | None = None
    emit: Callable[[int], None] | None = None
    prompt_rows: int = 1
    prefill_chunk: int | None = None


class _Run:
    """The state of a request: its text, its cache and the path that waits to be committed."""

    def __init__(
        self, target: Target, request: DecodeRequest, reader: LogitReader, stats: DraftStats
    ) -> None:
        self.target, self.request, self.reader, self.stats = target, request, reader, stats
        needs_ids = request.sampler is not None or len(request.criteria) > 0
        reply = min(request.max_length - len(request.prompt), _ROOM)
        self.text = Transcript(
            request.prompt, request.padded if needs_ids else None, len(request.prompt) + reply
        )
        self.cache: SpeculativeCache = target.cache(len(request.prompt) + reply + 64)
        self.moved: NDArray[np.int64] | None = None
        self.path: Sequence[int] = ()
        self.done = False

    def prefill(self) -> Predictions:
        """Passes the prompt through the model and emits the first token."""
        request, begin = self.request, perf_counter()
        prompt = torch.from_numpy(request.prompt.astype(np.int64)).to(self.target.device)
        parts = []
        for logits in self.target.prefill(self.cache, prompt, request.prompt_rows, request.prefill_chunk):
            parts.append(self.reader.read(logits))
        said = Predictions(*(np.concatenate([getattr(p, name) for p in parts]) for name in _FIELDS))
        for _ in self._accept(DraftTree.root(int(request.prompt[-1])), logits[-1:], _last(said)):
            pass
        self.path = ()
        self.stats.prefill_seconds += perf_counter() - begin
        return said

    def step(self, drafting: Drafting | None) -> None:
        """Drafts, verifies and accepts."""
        text, stats = self.text, self.stats
        started = perf_counter()
        root, length = int(text.tokens[-1]), len(text) - 1
        if drafting is None:
            plan = Plan(tree := DraftTree.root(root), tree, ())
        else:
            plan = drafting.plan(root, length, self.request.max_length - len(text) - 1)
        drafted = perf_counter()
        inputs = self.target.attention.prepare(plan.tree, length, self.moved)
        self._commit(inputs.moved)
        packed = perf_counter()
        logits = self.target.verify(self.cache, inputs)
        launched = perf_counter()
        said = self.reader.read(logits, len(plan.tree))
        read = perf_counter()
        emitted = list(self._accept(plan.tree, logits, said))
        self._pend(self.path)
        accepted = perf_counter()
        # On CUDA the pass is over when its logits have been read; nothing else waits for it.
        forward = (read if self.target.device.type == "cuda" else launched) - packed
        if drafting is not None:
            drafting.count(plan, self.path)
            drafting.learn(plan, np.array(emitted, np.int32), text.tokens[max(0, length - 3) : length], said)
            if drafting.wants_hidden and self.target.hidden is not None:
                drafting.learn_hidden(self.target.hidden[self.path[-1]])
            drafting.timed(inputs.input_ids.shape[1], length, forward)
        stats.steps += 1
        stats.draft_seconds += drafted - started
        stats.commit_seconds += packed - drafted
        stats.forward_seconds += forward
        stats.accept_seconds += accepted - packed - forward
        learned = perf_counter()
        if drafting is not None:
            drafting.note_step(len(emitted), learned - started, forward)
        stats.learn_seconds += learned - accepted

    def finish(self) -> None:
        """Moves the last accepted path into place, so that the cache can be used further."""
        moved = None if self.moved is None else torch.from_numpy(self.moved).to(self.target.device)
        self._commit(moved)

    def _accept(self, tree: DraftTree, logits: Tensor, said: Predictions) -> list[int]:
        """Emits the accepted tokens one by one, each as if it had been decoded alone."""
        emitted: list[int] = []
        path: list[int] = []
        self.path = path
        choose = self._argmax(said) if self.request.sampler is None else self._sample(logits, said)
        for node, token in walk(tree, choose):
            path.append(node)
            emitted.append(token)
            self._emit(token)
            if self.done:
                break
        return emitted

    def _argmax(self, said: Predictions) -> Callable[[int], int]:
        tokens, finite = said.next_tokens.tolist(), said.finite.tolist()

        def choose(node: int) -> int:
            if not finite[node]:
                raise non_finite(len(self.text))
            return int(tokens[node])

        return choose

    def _sample(self, logits: Tensor, said: Predictions) -> Callable[[int], int]:
        sampler = self.request.sampler
        assert sampler is not None

        def choose(node: int) -> int:
            ids = self.text.ids
            assert ids is not None
            if not said.finite[node]:
                raise non_finite(len(self.text))
            return sampler.choose(logits[node], ids, len(self.text))

        return choose

    def _emit(self, token: int) -> None:
        request, text = self.request, self.text
        text.append(token)
        self.stats.tokens += 1
        if request.emit is not None:
            request.emit(token)
        self.done = token in request.eos or len(text) >= request.max_length
        if request.criteria:
            sampler = request.sampler
            scores = None if sampler is None or sampler.scores is None else tuple(sampler.scores)
            # Asked even when done: criteria may keep state, and plain decoding asks all of them.
            self.done |= bool(request.criteria(text.ids, scores).all())

    def _pend(self, path: Sequence[int]) -> None:
        """Notes which nodes to keep. They move with the next step's inputs, in the same copy up."""
        kept = 0
        while kept < len(path) and path[kept] == kept:
            kept += 1
        self.kept = kept
        self.moved = np.array(path[kept:], np.int64) if kept < len(path) else None

    def _commit(self, moved: Tensor | None) -> None:
        if self.path:
            self.cache.commit(moved, self.kept, len(self.path))
        self.path, self.moved = (), None

    kept = 0


_FIELDS = ("next_tokens", "finite", "top_tokens", "top_probs")


def _last(said: Predictions) -> Predictions:
    return Predictions(*(getattr(said, name)[-1:] for name in _FIELDS))


def decode(
    target: Target,
    request: DecodeRequest,
    reader: LogitReader,
    stats: DraftStats,
    drafting: Drafting | None = None,
) -> tuple[Transcript, SpeculativeCache]:
    """Decodes one request.

    Args:
        target: The model.
        request: What to decode.
        reader: Reads logits; its `k` is what the sources learn from.
        stats: Counts to add to.
        drafting: Where drafts come from; None decodes one token a step.

    Returns:
        The text, and the cache, which holds all of it but the last token.
    """
    run = _Run(target, request, reader, stats)
    stats.requests += 1
    stats.prompt_tokens += len(request.prompt)
    with target.watching_hidden(drafting is not None and drafting.wants_hidden):
        said = run.prefill()
        if drafting is not None:
            drafting.start(run.text.reply, request.prompt, said)
            if target.hidden is not None:
                drafting.learn_hidden(target.hidden[-1])
        while not run.done:
            run.step(drafting)
    run.finish()
    return run.text, run.cache
