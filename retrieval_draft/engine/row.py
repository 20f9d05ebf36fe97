"""One request while it is decoded: a row of the running batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft.drafting.predictions import Predictions
from retrieval_draft.drafting.session import DraftPlan, DraftSession
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import MOVES, TreeAttention, TreeInputs, slots_of_moves
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.cache.prefix_cache import Keeper
from retrieval_draft.engine.graph.tree_rows import TreeRows, most_moves
from retrieval_draft.engine.logits import BestLogits, LogitReader, Wanted
from retrieval_draft.engine.placeholders import text_runs
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.sampling.node_draws import DrawWords
from retrieval_draft.engine.sampling.sampling import non_finite
from retrieval_draft.engine.target import Attention, Target
from retrieval_draft.engine.transcript import Transcript
from retrieval_draft.engine.verify import walk
from retrieval_draft.index.source import NodeLogits, TokenArray

__all__ = ["Row"]

_ROOM = 4096
"""Tokens of reply that the cache makes room for at once."""

_SPARE = 64
"""Tree nodes that the cache makes room for at once."""

_COPY_SECONDS = 0.02
"""Seconds of copying keys of an earlier text after which other rows may step."""

_log = logging.getLogger("retrieval_draft")


class _Feedback(NamedTuple):
    """Result of a step, for drafting: its drafts, the accepted path and tokens, and the predictions.

    `hidden` is (nodes of the path, d), the states there; None where no source drafts from them.
    """

    plan: DraftPlan
    path: Sequence[int]
    emitted: list[int]
    predictions: Predictions
    hidden: Tensor | None


class Row:
    """The state of a request: its text, its cache and the path that waits to be committed.

    A step's result reaches its sources as the next step begins, so that a step drafts first and verifies
    then, and its tokens are out before anything is learned from them. What is learned besides the tokens may
    wait until the next pass runs, where a device runs it, unless a source drafts from the last predictions.

    Args:
        target: The model.
        request: The request to decode.
        drafting: Source of drafts; None decodes one token a step.
        attention: Masks that no other row uses.
        stats: The request's counts.

    Attributes:
        text: Prompt and reply so far.
        cache: Holds all of it but the last token, once `finish` has run.
        done: Whether the reply is complete.
        prompt_logits: float32, shape (positions, vocabulary), if the request wants them.
    """

    def __init__(
        self,
        target: Target,
        request: DecodeRequest,
        drafting: DraftSession | None,
        attention: Attention,
        stats: DraftStats,
    ) -> None:
        self.target, self.request, self.drafting, self.stats = target, request, drafting, stats
        self.attention = attention
        needs_ids = request.sampler is not None or len(request.criteria) > 0
        reply = min(request.max_length - len(request.prompt), _ROOM)
        self._capacity = len(request.prompt) + reply + _SPARE
        self.text = Transcript(
            request.prompt, request.padded if needs_ids else None, len(request.prompt) + reply
        )
        self.cache = request.cache if request.cache is not None else target.cache(self._capacity)
        self.done = False
        self.prompt_logits: Tensor | None = None
        self._moved: NDArray[np.int64] | None = None
        self._path: Sequence[int] = ()
        self._kept = 0
        self._prompt_end: Tensor | None = None
        self._predictions: Predictions | None = None
        self._feedback: _Feedback | None = None
        self._unlearned: _Feedback | None = None
        self._learned_early: NodeLogits | None = None
        self._context = request.runs[-1]
        self._keeper: Keeper | None = None
        self._draws: DrawWords | None = None
        if request.sampler is not None and self.wanted.candidates and target.graphs is not None:
            assert request.padded is not None
            padding = request.padded[0, : request.padded.shape[1] - len(request.prompt)].cpu().numpy()
            self._draws = DrawWords(request.sampler, padding, target.logit_width)
        stats.requests += 1
        stats.prompt_tokens += len(request.prompt)

    def prefill(self, reader: LogitReader) -> Iterator[None]:
        """Passes the prompt through the model, emits the first token, and passes both to the sources.

        Yields after each pass but the last, when other rows may step.
        """
        request = self.request
        reads_all = request.keep_prompt_logits or request.read_prompt is not None
        yield from self._take_prefix(finds=not reads_all)
        begin = perf_counter()
        self._renews_cache()
        fed = request.prompt[self.cache.get_seq_length() :]
        prompt = torch.from_numpy(fed.astype(np.int64)).to(self.target.device)
        wanted = len(fed) if reads_all else min(request.prompt_rows, len(fed))
        parts, kept = [], []
        begun = passed = self.cache.get_seq_length()
        passes: Iterable[Tensor | None] = (
            self.target.prefill_passes(self.cache, prompt, wanted, lambda: request.prefill_chunk)
            if request.passed is None
            else [request.passed.logits]
        )
        for logits in passes:
            if self.target.hidden is not None and self.drafting is not None:
                self._learn_hidden(self.target.hidden, passed)
            if logits is not None:
                parts.append(reader.read(logits))
                if request.keep_prompt_logits:
                    kept.append(logits.to(torch.float32, copy=True))
                if request.read_prompt is not None:
                    request.read_prompt(logits)
                end = logits[-1:]
            if self._keeper is not None:
                self._keeper.extend(request.prompt, self.cache.get_seq_length())
            passed = self.cache.get_seq_length()
            if passed - begun < len(fed):
                self.stats.prefill_seconds += perf_counter() - begin
                yield
                begin = perf_counter()
        if kept:
            self.prompt_logits = torch.cat(kept)
        predictions = Predictions(*(np.concatenate([getattr(p, name) for p in parts]) for name in _FIELDS))
        self._prompt_end = end
        self._predictions = _last(predictions, 1)
        self._begin(self._prompt_end)
        self.stats.prefill_seconds += perf_counter() - begin
        if request.passed is not None and request.passed.hidden is not None and self.drafting is not None:
            self._learn_hidden(request.passed.hidden, len(request.prompt) - 1)
        self._begin_drafting(predictions)

    def _learn_hidden(self, hidden: Tensor, position: int) -> None:
        """Passes on states, (n, d), at the text's tokens from `position` on.

        Sources know the text after the last placeholder only, and none of the states before it.
        """
        assert self.drafting is not None
        begin = position - (self.text.prompt_length - len(self._context))
        if begin < 0:
            hidden, begin = hidden[-begin:], 0
        if len(hidden):
            self.drafting.learn_hidden(hidden, begin)

    def _take_prefix(self, finds: bool) -> Iterator[None]:
        """Continues an earlier text with the same beginning, if there is one, and has this text kept.

        Yields where other rows may step. An error costs the prefix only.
        """
        request, begin = self.request, perf_counter()
        if request.prefixes is None or request.cache is not None:
            if request.passed is not None and self.drafting is not None:
                self.drafting.share_hidden(object())  # of images, which no text tells apart
            return
        prefixes = request.prefixes()
        prefix = prefixes.find(request.prompt) if prefixes is not None and finds else None
        try:
            for _ in () if prefix is None else prefix.fill(self.cache):
                if perf_counter() - begin > _COPY_SECONDS:
                    self.stats.prefill_seconds += perf_counter() - begin
                    yield
                    begin = perf_counter()
            if prefix is not None:
                self.stats.cached_tokens += prefix.length
        except Exception as error:
            assert prefixes is not None
            prefixes.cache.failed("continued", error)
            self.cache = self.target.cache(self._capacity)
        if prefixes is not None:
            self._keeper = prefixes.keeper(self.cache)
            if self.drafting is not None:
                self.drafting.share_hidden(prefixes.key)
        self.stats.prefill_seconds += perf_counter() - begin

    def fork(self, prefix_owner: Row) -> None:
        """Takes over the result of `prefill` of a row with the same prompt, and emits its own first token."""
        begin = perf_counter()
        assert prefix_owner._prompt_end is not None
        self.cache = prefix_owner.cache.clone(self._capacity)
        if prefix_owner._keeper is not None:
            self._keeper = prefix_owner._keeper.beside(self.cache)
        self.prompt_logits = prefix_owner.prompt_logits
        self._predictions = prefix_owner._predictions
        self._begin(prefix_owner._prompt_end)
        self.stats.prefill_seconds += perf_counter() - begin
        if self.drafting is not None and prefix_owner.drafting is not None:
            self.drafting.fork_hidden(prefix_owner.drafting)
        self._begin_drafting(None)

    def _begin_drafting(self, predictions: Predictions | None) -> None:
        """Passes the first token on to the sources, if there are drafts."""
        if self.drafting is None or self._ends_drafting(self.text.reply):
            return
        context = self._context
        if predictions is not None and len(context) < len(predictions.next_tokens):
            predictions = _last(predictions, len(context)) if len(context) else None
        self.drafting.start(self.text.reply, context, predictions)

    def _ends_drafting(self, emitted: TokenArray) -> bool:
        """Ends drafting where a placeholder was emitted: nothing is learned of it or of the text after it."""
        (text, *more) = text_runs(emitted, self.request.placeholders)
        if not more:
            return False
        assert self.drafting is not None
        if len(text):
            self.drafting.observe(text)
        self.drafting.close()
        self.drafting = None
        return True

    def _begin(self, logits: Tensor) -> None:
        assert self._predictions is not None
        for _ in self._accept(DraftTree.root(int(self.request.prompt[-1])), logits, self._predictions):
            pass
        self._path = ()

    def propose(self) -> DraftPlan:
        """Drafts of all sources for the next step."""
        root, length, most = int(self.text.tokens[-1]), len(self.text) - 1, self.request.max_draft_tokens
        if self.drafting is None or most == 0:
            tree = DraftTree.root(root)
            return DraftPlan(tree, tree, ())
        wanted = self.request.max_length - len(self.text) - 1
        max_depth = 0 if root in self.target.blank else self.target.max_depth(length, wanted)
        if self.request.grammar is not None:
            self.request.grammar.follow(self.text.reply)
        is_tree = self.target.verification.way == "tree"
        is_captured = self.target.graphs is not None
        if is_tree and self.drafting.wants_cache(is_captured):
            # A pass of a source follows at once: the accepted path cannot wait for the target's.
            self._settle()
            self.drafting.lend_cache(self.cache, is_captured)
        propose = self.drafting.propose if is_tree else self.drafting.propose_chain
        plan = propose(root, length, max_depth)
        return plan if most is None else plan.cut(most)

    def prepare_drafts(self, plan: DraftPlan) -> None:
        """Has sources that draft beside the pass over a tree begin with it."""
        if self.drafting is not None:
            self.drafting.prepare(plan)

    def prepare(self, plan: DraftPlan) -> TreeInputs:
        """Packs the tree for the model. The last accepted path is committed, or left to a captured pass."""
        moved, moves = self._moved, None
        may_wait = self.target.graphs is not None and (moved is None or len(moved) <= MOVES)
        if may_wait and moved is not None:
            moves = slots_of_moves(moved, self.cache.get_seq_length(), self._kept)
        inputs = self._prepared(plan, moved, moves)
        if may_wait and isinstance(self.attention, TreeAttention):
            return self._settled_later(inputs)
        self._commit(inputs.moved)
        if self._renews_cache():
            text = torch.from_numpy(self.text.tokens[:-1].astype(np.int64)).to(self.target.device)
            self.target.refill(self.cache, text, self.request.prefill_chunk)
        return inputs

    def _prepared(
        self, plan: DraftPlan, moved: NDArray[np.int64] | None, moves: NDArray[np.int64] | None = None
    ) -> TreeInputs:
        length, shift = len(self.text) - 1, self.cache.shift
        if isinstance(self.attention, TreeAttention):
            return self.attention.prepare(plan.tree, length, moved, shift, moves, self._draw_words())
        return self.attention.prepare(plan.tree, length, moved, shift)

    def _draw_words(self) -> NDArray[np.int64] | None:
        words = self.target.draw_words
        if not words:
            return None
        return np.zeros(words, np.int64) if self._draws is None else self._draws.of(self.text, words)

    def pack(self, plan: DraftPlan, trees: TreeRows) -> None:
        """Writes the tree to its place among those of all rows, in place of `prepare`; see `packed`."""
        assert isinstance(self.cache, SpeculativeCache)
        if self._moved is not None and len(self._moved) > most_moves(trees.rows):
            self._settle()
        trees.pack(self.cache, plan.tree, len(self.text) - 1, self._moved, self._kept, self._draw_words())

    def packed(self, trees: TreeRows) -> TreeInputs:
        """The tree on the device. The last accepted path waits to be committed, and moved, by the pass."""
        assert isinstance(self.cache, SpeculativeCache)
        assert isinstance(self.attention, TreeAttention)
        return self._settled_later(trees.inputs(self.cache, self.attention))

    def _settled_later(self, inputs: TreeInputs) -> TreeInputs:
        """These inputs, that commit the last accepted path where they are used."""

        def commit(in_pass: bool) -> None:
            if in_pass:
                self._commit(None)
            elif inputs.moved is not None:
                self._commit(inputs.moved)
            else:
                self._settle()

        if self._path:
            inputs.waiting, inputs.commit = len(self._path), commit
        return inputs

    def _renews_cache(self) -> bool:
        """Empties the cache where its keys are not those of the present text."""
        rope = self.target.rope
        if rope is None or rope.fits(self.cache, len(self.text)):
            return False
        self.cache.reset()
        return True

    def prepare_again(self, plan: DraftPlan) -> TreeInputs:
        """Repeats `prepare` after a pass that failed: staged nodes are dropped, the committed text stays."""
        self._settle()
        self.cache.drop()
        return self._prepared(plan, None)

    def accept(
        self,
        plan: DraftPlan,
        logits: Tensor,
        predictions: Predictions,
        hidden: Tensor | None = None,
        best: BestLogits | None = None,
    ) -> list[int]:
        """Emits the target's choices along the tree, and notes which nodes to keep and what to learn.

        Args:
            plan: The verified drafts.
            logits: (n + 1, vocabulary) or more, float, after each node.
            predictions: Their summary.
            hidden: (n + 1, d) or more. States at the nodes that draft sources read, if any does.
            best: Their best logits, where the host has no others.
        """
        emitted = self._accept(plan.tree, logits, predictions, best)
        path = self._path
        kept = 0
        while kept < len(path) and path[kept] == kept:
            kept += 1
        self._kept = kept
        # They move with the next step's inputs, in the same copy to the device.
        self._moved = np.array(path[kept:], np.int64) if kept < len(path) else None
        self.stats.steps += 1
        if self.drafting is not None:
            wanted = hidden is not None and self.drafting.wants_hidden
            states = hidden[list(path)] if wanted and hidden is not None else None
            self._feedback = _Feedback(plan, path, emitted, predictions, states)
        return emitted

    def apply_feedback(self) -> None:
        """Updates sources and calibration with the result of the last step, once."""
        self.observe()
        self.learn()

    def observe(self) -> None:
        """Appends the last step's tokens to the text of every source, once; more is not needed to draft."""
        drafting, feedback = self.drafting, self._feedback
        self._feedback = None
        if drafting is None or feedback is None:
            return
        drafting.count(feedback.plan, feedback.path)
        accepted = np.array(feedback.emitted, np.int32)
        if self._ends_drafting(accepted):
            return
        drafting.observe(accepted)
        self._unlearned = feedback
        if drafting.learns_early:
            self._learned_early = self._logits_of(feedback)
            drafting.learn_early(self._learned_early)
        if feedback.hidden is not None:
            # A head's next drafts begin with them, after what it learns.
            self.learn()
            self._learn_hidden(feedback.hidden, len(self.text) - 1 - len(feedback.emitted))

    def learn(self) -> None:
        """Updates sources and calibration with the predictions of the step last observed, once."""
        drafting, feedback, known = self.drafting, self._unlearned, self._learned_early
        self._unlearned = self._learned_early = None
        if drafting is None or feedback is None:
            return
        emitted = np.array(feedback.emitted, np.int32)
        if known is None:
            drafting.learn(feedback.plan, emitted, self._logits_of(feedback))
        else:
            drafting.learn(feedback.plan, emitted, known, early=False)

    def _logits_of(self, feedback: _Feedback) -> NodeLogits:
        """Predictions at the nodes of the last step, before another one emits tokens."""
        plan, _, emitted, predictions, _ = feedback
        before = len(self.text) - len(emitted) - 1
        begin = self.text.prompt_length - len(self._context)
        contexts = plan.tree.contexts(self.text.tokens[max(begin, before - 3) : before])
        return NodeLogits(contexts, predictions.top_tokens, predictions.top_probs)

    def finish(self) -> None:
        """Moves the last accepted path into place, so that the cache can be used further."""
        self._settle()
        self.cache.text = self.text.tokens[: self.cache.get_seq_length()].copy()
        if self._keeper is not None:
            self._keeper.extend(self.cache.text, len(self.cache.text))
        self._prompt_end = self._predictions = None
        if self.request.finished is not None:
            self.request.finished(self.text.reply)

    def _accept(
        self, tree: DraftTree, logits: Tensor, predictions: Predictions, best: BestLogits | None = None
    ) -> list[int]:
        """Emits the accepted tokens one by one, each as if it had been decoded alone."""
        emitted: list[int] = []
        path: list[int] = []
        self._path = path
        choose = (
            self._argmax(predictions)
            if self.request.sampler is None
            else self._sample(logits, predictions, best)
        )
        for node, token in walk(tree, choose):
            path.append(node)
            emitted.append(token)
            self._emit(token)
            if self.done:
                break
        return emitted

    def _argmax(self, predictions: Predictions) -> Callable[[int], int]:
        tokens, finite = predictions.next_tokens.tolist(), predictions.finite.tolist()

        def choose(node: int) -> int:
            if not finite[node]:
                raise non_finite(len(self.text))
            return int(tokens[node])

        return choose

    def _sample(
        self, logits: Tensor, predictions: Predictions, best: BestLogits | None
    ) -> Callable[[int], int]:
        sampler = self.request.sampler
        assert sampler is not None
        is_full = self._draws is not None and self._draws.is_full

        def choose(node: int) -> int:
            if not predictions.finite[node]:
                raise non_finite(len(self.text))
            if best is not None and sampler.wanted != Wanted() and not is_full:
                token = sampler.choose_among(best, node, len(self.text))
                if token is not None:
                    return token
            ids = self.text.ids
            assert ids is not None
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
            # Called even when done: criteria may keep state, and plain decoding calls all of them.
            self.done |= bool(request.criteria(text.ids, scores).all())
        if self.done and request.ended is not None:
            request.ended()

    def _settle(self) -> None:
        """Commits the last accepted path, unless that is done, with a copy to the device of its own."""
        self._commit(None if self._moved is None else torch.from_numpy(self._moved).to(self.target.device))

    def _commit(self, moved: Tensor | None) -> None:
        if self._path:
            self.cache.commit(moved, self._kept, len(self._path))
        self._path, self._moved = (), None

    @property
    def wanted(self) -> Wanted:
        """Parts of a node's logits that its token is chosen among; none for all of them, or the best."""
        return Wanted() if self.request.sampler is None else self.request.sampler.wanted

    @property
    def carried(self) -> int | None:
        """Accepted tokens that the next pass repeats in front of its drafts; None where none ever are."""
        carried: int | None = self.cache.carries(len(self._path))
        return carried

    @property
    def path(self) -> Sequence[int]:
        """Nodes of the last step's tree that were accepted, the root first."""
        return self._path

    @property
    def length(self) -> int:
        """Tokens that are, or are about to be, committed."""
        return len(self.text) - 1

    def forget(self) -> None:
        """Releases the state that only the running batch needs. Sources get the text so far."""
        if self.drafting is None:
            return
        try:
            self.apply_feedback()
        except Exception as error:  # the request is over: what is learned of it may not harm others
            _log.warning("The last step of a request was not learned from: %r", error, exc_info=error)
        if self.drafting is not None:  # a placeholder in the last step has ended it
            self.drafting.close()
        self.drafting = None


_FIELDS = ("next_tokens", "finite", "top_tokens", "top_probs")


def _last(predictions: Predictions, count: int) -> Predictions:
    return Predictions(*(getattr(predictions, name)[-count:] for name in _FIELDS))
