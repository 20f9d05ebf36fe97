"""Trained heads on the target's hidden states (EAGLE, Medusa and their kin) as draft sources."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from time import perf_counter
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrieval_draft.engine.cache.prefix_tree import common_length
from retrieval_draft.engine.cpu.linear import CpuLinear
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, Growth, ModelTree
from retrieval_draft.engine.draft_models.vocab_trim import VocabTrim, VocabTrims, columns_for
from retrieval_draft.engine.hidden_states import HiddenStates
from retrieval_draft.engine.substitution import lend_forwards
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray, empty_proposal

__all__ = ["RERANKED", "DraftHead", "HeadDraft", "HeadSession", "HeadState", "proposal_of"]

RERANKED = 4
"""Nodes that a model offers for each node of the budget. Fusion chooses when the other sources' proposals are
known, and a node for which the model has a probability and does not offer it looks better than it is: on tiny
models the fused tree accepts 2% less than the model alone with 1, and as much with 4, where both accept
more."""

WAITING = 2048
"""Rows of hidden states that wait for a head that is not asked; it takes them up beyond that."""

UNCOUNTED = 256
"""Arrays of tokens that wait to be counted for a head that is not asked."""

KEPT_BYTES = 1 << 26
"""Most bytes of states of ended requests, which others with the same beginning continue."""


class HeadState(Protocol):
    """A head's view of one text."""

    length: int
    """Rows that were read, from the text's beginning on or from where its hidden states begin."""

    def copy(self, rows: int) -> HeadState:
        """The state after the first `rows` rows, with memory of its own."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        ...


class DraftHead(Protocol):
    """Interface of a trained head.

    A row is what the target made of one token of the text, its hidden states, with the token that came next:
    row i holds the states at token i and token i + 1. The next token follows from the last row.

    One with `reads_cache` finds the target's keys and values of the text but for its last token in the
    `cache` of each state that it reads and expands, and leaves them as they are.
    """

    layers: tuple[int, ...]
    """Layers whose states it reads; see `HiddenStates`."""

    reads_all: bool
    """True if it reads every row of a text; else the last one alone."""

    limits: ExpansionLimits
    """Limits on the growth of its trees."""

    levels: int | None
    """Levels of a tree that it has weights for; None for any number."""

    ids: NDArray[np.int64] | None
    """int64, shape (columns of its logits,): token of each column; None where they are the target's."""

    def bind(self, model: Any) -> None:
        """Takes over what it shares with the target, such as embeddings and output head."""
        ...

    def state(self) -> Any:
        """A state of no text."""
        ...

    def read(
        self, states: Sequence[Any], tokens: Sequence[Tensor], hidden: Sequence[Tensor], begins: Sequence[int]
    ) -> list[Tensor]:
        """Reads rows of several texts.

        Args:
            states: One for each text; they grow.
            tokens: int64, shape (n,) each. The rows' tokens, at least one.
            hidden: (n, d * number of layers) each. The rows' hidden states.
            begins: Index of the first row of each in its text.

        Returns:
            (1, columns) each: logits of the token after the last row.
        """
        ...

    def expand(self, states: Sequence[Any], growths: Sequence[Growth]) -> list[Tensor]:
        """Logits after the nodes of each growth's frontier, (nodes, columns) each; once for each level."""
        ...

    def drop(self, state: Any) -> None:
        """Forgets the nodes that were expanded after the text."""
        ...


class HeadSession:
    """One request: its text, the hidden states that wait to be read, and the head's state.

    Args:
        source: The head, and the other requests.
        prompt: int32, shape (length,).
        limits: Limits on the growth of its trees, but for the levels that the head has.
        reranked: Nodes offered for each node of the budget.
    """

    wants_hidden = True

    def __init__(
        self, source: HeadDraft, prompt: TokenArray, limits: ExpansionLimits, reranked: int = RERANKED
    ) -> None:
        self._source = source
        levels = source.head.levels
        self.limits = limits if levels is None else replace(limits, depth=min(limits.depth, levels))
        self.reranked = reranked
        self.text: TokenArray = np.array(prompt, np.int32)
        self.state: Any = None
        self.read = 0
        self.is_whole = True
        self._rows: list[tuple[int, Tensor]] = []
        self._found: Proposal | None = None
        self.root: Tensor | None = None
        self.root_ids: NDArray[np.int64] | None = None
        self._owner: HeadSession | None = None
        self._prompt = len(prompt)
        self._apart: Hashable = None
        self._trim: VocabTrim | None = None
        self._uncounted: list[NDArray[Any]] = []
        self._was_asked = self._is_asked = True
        self.key: Hashable = None
        self._lent: Any = None
        self.draft_seconds = 0.0
        self.budget = 0

    def learn_hidden(self, hidden: Tensor, begin: int) -> None:
        """Takes the target's states, (n, d), at tokens of the text from index `begin` on."""
        head = self._source.head
        hidden = self._source.states.columns(head.layers, hidden)
        if not head.reads_all:
            # The last row alone, with memory of its own: the others' is given back.
            self._rows = [(begin + len(hidden) - 1, hidden[-1:].clone())]
            return
        self._rows.append((begin, hidden))
        if begin + len(hidden) - self._rows[0][0] > WAITING:
            self._source.read([self])

    @property
    def wants_cache(self) -> bool:
        """True if the head reads the target's keys and values."""
        return bool(getattr(self._source.head, "reads_cache", False))

    def lend_cache(self, cache: Any) -> None:
        """Takes the target's cache of the text but for its last token, until that is observed."""
        self._lent = cache

    def share_hidden(self, key: Hashable) -> None:
        """Sets the state that it keeps and continues apart from those of requests with other keys."""
        self.key = key

    def fork(self, owner: HeadSession) -> None:
        """Takes over the states of a prompt that another request has passed, and read once for both."""
        self._rows, self._owner, self.key = list(owner._rows), owner, owner.key

    @property
    def is_due(self) -> bool:
        """True if it can propose, has not, and is asked in most steps."""
        return self._was_asked and self._found is None and self.budget > 0 and self.can_propose

    @property
    def can_propose(self) -> bool:
        """True if the state that chose the last token is there, and the target's cache if it is read."""
        if self.wants_cache and self._lent is None:
            return False
        if not self._rows:
            return self.root is not None
        begin, rows = self._rows[-1]
        return self.root is not None or begin + len(rows) == len(self.text) - 1

    def unread(self, end: int) -> tuple[int, Tensor, Tensor] | None:
        """The rows before index `end` of the text that the head has not read: first index, tokens, states."""
        parts: list[Tensor] = []
        first = -1
        for begin, rows in self._rows:
            part = rows[max(self.read - begin, 0) : max(end - begin, 0)]
            if len(part):
                if first < 0:
                    first = max(begin, self.read)
                parts.append(part)
        if not parts:
            return None
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        tokens = self.text[first + 1 : first + 1 + len(hidden)].astype(np.int64)
        return first, torch.from_numpy(tokens).to(hidden.device), hidden

    def has_read(self, first: int, count: int, logits: Tensor) -> None:
        """Notes that the head has read `count` rows from index `first` on, forgets them, keeps its guess."""
        self.is_whole, self.read = self.is_whole and first == self.read, first + count
        self._rows = [(begin, rows) for begin, rows in self._rows if begin + len(rows) > self.read]
        self.root = logits if self.read == len(self.text) - 1 else None
        self.root_ids = self.ids

    def keep_apart(self, key: Hashable) -> None:
        """Has tokens of requests with the same key drafted, and of no others; before the first proposal."""
        self._apart = key

    @property
    def trim(self) -> VocabTrim | None:
        """Tokens that the head's outputs choose among; None for all."""
        self._count_waiting()
        return self._trim

    def _count_waiting(self) -> None:
        """Counts the tokens that waited, the prompt's first."""
        if self._trim is None and self._source.trims is not None:
            self._trim = self._source.trims.of(self._apart)
            self._uncounted.append(self.text[: self._prompt])
        if self._trim is not None and self._uncounted:
            self._trim.add(np.concatenate([tokens.reshape(-1) for tokens in self._uncounted]))
            self._uncounted = []

    def _count(self, tokens: NDArray[Any]) -> None:
        """Has tokens drafted from now on, where not all are; counted together while the head sleeps."""
        if self._source.trims is not None:
            self._uncounted.append(tokens)
            if len(self._uncounted) > UNCOUNTED:
                self._count_waiting()

    @property
    def ids(self) -> NDArray[np.int64] | None:
        """int64, shape (columns of the logits,): token of each column now; None where they are the same."""
        return self._source.head.ids if self.trim is None else self.trim.ids

    def begin_state(self) -> None:
        """Makes the head's state, if there is none, and lends it the target's cache, if that is read."""
        if self.state is None:
            self._make_state()
        if self.wants_cache:
            self.state.cache = self._lent

    def _make_state(self) -> None:
        """The state of a request with the same beginning, as far as it goes, or none."""
        owner, self._owner = self._owner, None
        if owner is not None and self._source.head.reads_all and self._prompt > 1:
            # All rows of the prompt but the last, whose token is each sample's own.
            self._source.read([owner], self._prompt - 1)
            if owner.state is not None and owner.is_whole:
                self.read = min(owner.read, self._prompt - 1)
                self.state = owner.state.copy(self.read)
                return
        first = self._rows[0][0] if self._rows else 0
        found = self._source.find_state(self, first) if first else None
        if found is not None:
            self.read, self.state = found.length, found
        else:
            self.state = self._source.head.state()

    @torch.no_grad()
    def propose(self, budget: int) -> Proposal:
        """The head's guesses; none where the target's last hidden state is missing."""
        self._is_asked = self._is_asked or budget > 0
        self.budget = budget
        if budget <= 0 or len(self.text) < 2:
            return empty_proposal("model", "model")
        if self._found is None:
            self._source.propose(self)
        return empty_proposal("model", "model") if self._found is None else self._found

    @torch.no_grad()
    def review(self, chain: TokenArray) -> Tensor:
        """Log probabilities after the text and after each guess of a chain.

        Args:
            chain: int32, shape (n,).

        Returns:
            (rows, vocabulary): n + 1, fewer where the head has no more levels, none where the target's last
            hidden state is missing.
        """
        if len(self.text) < 2 or not self.can_propose:
            return torch.empty((0, 0), dtype=torch.float32, device="cpu")
        return self._source.review(self, chain.tolist())

    def found(self, tree: ModelTree) -> None:
        """Notes the guesses of this step."""
        self._found = proposal_of(tree)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        if len(tokens):
            self.text = np.concatenate((self.text, np.asarray(tokens, np.int32)))
            self._found = self.root = self._lent = None
            self._count(tokens)
            self._was_asked, self._is_asked = self._is_asked, False

    def learn(self, logits: NodeLogits) -> None:
        """Has tokens that the target ranks high drafted, where not all are; a head is trained elsewhere."""
        self._count(logits.top_tokens)

    def close(self) -> None:
        """Frees the rows, and leaves the state to requests with the same beginning."""
        self._count_waiting()  # for the texts that follow
        self._rows, self._owner, self._found, self._lent = [], None, None, None
        self._source.keep(self)
        self.state = None


class HeadDraft:
    """A trained head as a draft source.

    The requests of a batch that are asked in most steps are drafted for together, in the first one's turn.
    A prompt that continues an earlier text of the prefix cache has no hidden states there: the head continues
    its own state of that text.

    Args:
        head: Anything with the methods of `DraftHead`.
        columns: Tokens that its output heads choose among, see `VocabTrim`; 0 for all, None for an eighth of
            a large vocabulary. For heads that name their outputs in `outputs`.

    Attributes:
        head: As given, or a copy with the same weights.
        trims: Those tokens, by the key of a request; None for all.
        states: The target's, from which hidden states come.

    Example:
        RetrievalDrafter.for_model(model, draft_model=HeadDraft(my_head))
    """

    name = "model"
    level = "model"

    def __init__(self, head: DraftHead, columns: int | None = None) -> None:
        self.head = head
        self.trims: VocabTrims | None = None
        self._columns = columns
        self.states: HiddenStates
        self._linear: CpuLinear | None = None
        self._live: WeakSet[HeadSession] = WeakSet()
        self._kept: list[tuple[Hashable, TokenArray, Any]] = []

    def bind(self, target: Target) -> None:
        """Has the target's states read, and the head take what it shares with the target.

        Raises:
            InvalidInputError: The head was trained for another model.
            UnsupportedModelError: The target has no output head over a decoder.
        """
        self.states = target.hidden_states
        self.states.read(self.head.layers)
        self.head.bind(target.model)
        if self._columns is not None and self._columns < 0:
            raise InvalidInputError(
                f"columns is {self._columns}; it must be 0 or more.", "0 is for all tokens."
            )
        head: Any = self.head
        outputs = head.outputs() if hasattr(head, "outputs") else []
        known = min((len(each.weight) for each in outputs if each.weight.device.type != "meta"), default=0)
        most = 0 if self.head.ids is None else int(self.head.ids.max()) + 1
        self._vocabulary = max(target.embedding_rows, known, most)
        columns = columns_for(known) if self._columns is None else self._columns
        if columns and columns < known and all(type(each) is torch.nn.Linear for each in outputs):
            # One head may draft for several drafters, which have columns of their own: each takes a copy with
            # the same weights.
            self.head = copy(self.head)
            self.trims = VocabTrims(outputs, known, columns)
        self._linear = CpuLinear(self.head) if isinstance(self.head, nn.Module) else None

    def prepare(self) -> None:
        """Measures the fastest kernels for the head's layers on the CPU, once."""
        if self._linear is not None:
            self._linear.prepare()
        if self.trims is not None:
            self.trims.prepare()

    def _applied(self) -> AbstractContextManager[object]:
        """Context of the head's passes."""
        return nullcontext() if self._linear is None else lend_forwards(self._linear.forwards())

    def _use_trim(self, session: HeadSession) -> None:
        """Has the head's outputs choose among a session's tokens from now on."""
        if self.trims is not None:
            head: Any = self.head
            head.trim = session.trim

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> HeadSession:
        """Starts a request with `prompt`, int32, shape (length,); reference texts are not read."""
        return self.session(prompt)

    def session(
        self, prompt: TokenArray, limits: ExpansionLimits | None = None, reranked: int = RERANKED
    ) -> HeadSession:
        """Starts a request with limits of its own; see `HeadSession`."""
        session = HeadSession(self, prompt, limits or self.head.limits, reranked)
        self._live.add(session)
        return session

    def propose(self, session: HeadSession) -> None:
        """Makes a session's guesses, and in the same passes those of the others that are due."""
        if not session.can_propose:
            return
        others = [
            each for each in self._live if each is not session and each.is_due and each.trim is session.trim
        ]
        begin = perf_counter()
        with self._applied():
            try:
                self._grow([session, *others])
            except Exception:
                if not others:
                    raise
                self._grow([session])  # another one's fault is its own
                others = []
        share = (perf_counter() - begin) / (1 + len(others))
        for each in (session, *others):
            each.draft_seconds = share

    def _grow(self, sessions: Sequence[HeadSession]) -> None:
        head = self.head
        self.read([session for session in sessions if session.root is None])
        for session in sessions:
            session.begin_state()
        self._use_trim(sessions[0])
        states = [session.state for session in sessions]
        growths = []
        ids = sessions[0].ids
        for session in sessions:
            assert session.root is not None
            growth = Growth(session.limits, session.reranked * session.budget, None, ids)
            growth.begin(int(session.text[-1]), session.root, session.root_ids)
            growths.append(growth)
        try:
            while growing := [at for at, growth in enumerate(growths) if growth.frontier]:
                frontiers = [growths[at] for at in growing]
                added = head.expand([states[at] for at in growing], frontiers)
                for growth, rows in zip(frontiers, added, strict=True):
                    growth.add(rows)
        finally:
            for state in states:
                head.drop(state)
        for session, growth in zip(sessions, growths, strict=True):
            session.found(growth.tree())

    def review(self, session: HeadSession, chain: Sequence[int]) -> Tensor:
        """Log probabilities after a session's text and along a chain of guesses; see `HeadSession.review`."""
        if session.root is None:
            self.read([session])
        session.begin_state()
        assert session.root is not None
        self._use_trim(session)
        rows = [self._spread(session.root, session.root_ids)]
        levels = len(chain) + 1 if self.head.levels is None else self.head.levels
        path = Growth(self.head.limits, 1)
        path.tokens = [int(session.text[-1])]
        try:
            for token in chain[: levels - 1]:
                (row,) = self.head.expand([session.state], [path.follow(token)])
                rows.append(self._spread(row, session.ids))
        finally:
            self.head.drop(session.state)
        return torch.cat(rows).log_softmax(-1)

    def _spread(self, row: Tensor, ids: NDArray[np.int64] | None) -> Tensor:
        """Logits of the whole vocabulary, (1, vocabulary), from those of some tokens, (1, columns)."""
        if ids is None:
            return row.float()
        wide = row.new_full((1, self._vocabulary), float("-inf"), dtype=torch.float32)
        return wide.index_copy(1, torch.from_numpy(ids).to(row.device), row.float())

    @torch.no_grad()
    def read(self, sessions: Sequence[HeadSession], end: int | None = None) -> None:
        """Has the head read the rows that wait, before an index of each text or up to its last token.

        A session forgets its rows when they have been read: those of a read that fails are there again.
        """
        reading, begins, tokens, hidden = [], [], [], []
        for session in sessions:
            session.begin_state()
            unread = session.unread(len(session.text) - 1 if end is None else end)
            if unread is not None:
                reading.append(session)
                begins.append(unread[0])
                tokens.append(unread[1])
                hidden.append(unread[2])
        if reading:
            self._use_trim(reading[0])
            logits = self.head.read([session.state for session in reading], tokens, hidden, begins)
            for session, begin, rows, guess in zip(reading, begins, hidden, logits, strict=True):
                session.has_read(begin, len(rows), guess)

    def find_state(self, session: HeadSession, rows: int) -> Any:
        """A copy of the state of another text with the same key and beginning, after `rows` rows at most.

        None where there is no such text.
        """
        best, source = 0, None
        others = [each for each in self._live if each is not session and each.is_whole]
        texts = [(each.key, each.text, each.state) for each in others]
        for key, text, state in [*texts, *self._kept]:
            if state is not None and key == session.key:
                # Row i holds token i + 1 too.
                common = min(common_length(text, session.text) - 1, rows, state.length)
                if common > best:
                    best, source = common, state
        if source is None:
            return None
        session.is_whole = True
        return source.copy(best)

    def keep(self, session: HeadSession) -> None:
        """Keeps the state of a text that has ended, and forgets the oldest beyond `KEPT_BYTES`."""
        self._live.discard(session)
        if session.state is None or not session.is_whole or not self.head.reads_all or session.read < 2:
            return
        text = session.text[: session.read + 1]
        self._kept.append((session.key, text, session.state.copy(session.read)))
        while self._kept_bytes > KEPT_BYTES:
            del self._kept[0]

    @property
    def _kept_bytes(self) -> int:
        return sum(state.nbytes + text.nbytes for _, text, state in self._kept)

    def flush(self) -> None:
        """Does nothing: no text waits to be looked up."""

    def close(self) -> None:
        """Forgets the states of ended requests."""
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the states of ended requests, and of trimmed outputs; the head is its owner's."""
        trimmed = 0 if self.trims is None else self.trims.nbytes
        return trimmed + self._kept_bytes


def proposal_of(tree: ModelTree) -> Proposal:
    """A model's tree as a source's proposal."""
    zeros = np.zeros(len(tree.tokens), np.int32)
    return Proposal(tree.tokens, tree.parents, np.clip(tree.probs, 1e-6, 1.0), zeros, "model", "model")
