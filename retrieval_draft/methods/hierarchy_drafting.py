"""Hierarchy Drafting: guesses from the request, then from the model's own outputs, then from a corpus.

Cho et al. (2025), "Lossless Acceleration of Large Language Models with Hierarchical Drafting based on
Temporal Locality in Speculative Decoding" (arXiv:2502.05609): 7 guesses of 4 tokens for the last token,
verified in parallel. W, the context: those last seen after that token in prompt and output, and in a window
of 7 further positions, which is verified beside the guesses and takes the target's predictions (Jacobi
iterations, as in lookahead decoding, Fu et al. 2024, arXiv:2402.02057). If they are fewer than 7, S, the
model: the most frequent of the 100,000 most frequent 5-grams of its own outputs. If still fewer, L,
statistics: the most frequent continuations in a corpus, looked up as in REST. Between S and L, the replies of
other processes, in the shared store, and earlier requests, looked up like the corpus.

Differences: the window's nodes, 4 rows of 7, come after the guesses and are part of their tree, so that a
small budget has less of them (28 nodes: none), and what is right of them is accepted too. S is made of this
process's earlier outputs and not of a data set's; beyond 100,000 5-grams the rarest are removed, of equal
ones the oldest. Guesses with the same beginning share nodes, newer ones come first, and all levels fill up to
7 together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from heapq import nlargest
from random import Random

from retrieval_draft._forks import lock_for_moments
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray
from retrieval_draft.methods.datastore import Datastore, StoredSource
from retrieval_draft.methods.lookup import GuessTree, LookupSession, after_references
from retrieval_draft.methods.method import Method, MethodContext, as_proposed
from retrieval_draft.methods.rest import LONGEST, SHORTEST, TextEnd, common_prefixes

__all__ = ["METHOD", "HierarchyDraftingSession", "ModelStore"]

GUESSES = 7
COPIED = 4
WINDOW = 7
MAX_STORED = 100_000
KEPT = 75_000
"""5-grams kept when there are more: the rarest are found by sorting all, so many are removed at a time."""
ENTRY_BYTES = 240
"""A 5-gram's Python objects, measured."""

UNLIKELY = 0.01
"""Told of the window's nodes: they are verified for what the target predicts after them."""

Guess = tuple[int, ...]


class ModelStore:
    """Counts of the 5-grams in the model's outputs. Safe for sessions in several threads.

    Example:
        add 1 2 3 4 5 1 2 3 4 6 1 2 3 4 5  ->  best(1) is [(2, 3, 4, 5), (2, 3, 4, 6)]
    """

    def __init__(self) -> None:
        self._counts: dict[int, dict[Guess, tuple[int, int]]] = {}  # count, time of the last
        self._best: dict[int, list[Guess]] = {}  # the first of each token's
        self._size = 0
        self._time = 0
        self._lock = lock_for_moments()

    @property
    def nbytes(self) -> int:
        """Bytes held, estimated."""
        return self._size * ENTRY_BYTES

    def add(self, text: Sequence[int]) -> None:
        """Counts the 5-grams of an output."""
        with self._lock:
            for index in range(len(text) - COPIED):
                token, guess = text[index], tuple(text[index + 1 : index + 1 + COPIED])
                known = self._counts.setdefault(token, {})
                self._size += guess not in known
                self._time += 1
                known[guess] = (known.get(guess, (0, 0))[0] + 1, self._time)
                best = self._best.setdefault(token, [])
                if guess not in best:
                    best.append(guess)
                best.sort(key=known.__getitem__, reverse=True)
                del best[2 * GUESSES :]
                if self._size > MAX_STORED:
                    self._forget()

    def best(self, token: int) -> list[Guess]:
        """The most frequent continuations of `token`, of equals the newest first: 2 * GUESSES at most."""
        with self._lock:
            return list(self._best.get(token, ()))

    def _forget(self) -> None:
        ranked = (
            (*rank, token, guess) for token, known in self._counts.items() for guess, rank in known.items()
        )
        kept = nlargest(KEPT, ranked)
        self._counts, self._best, self._size = {}, {}, len(kept)
        for count, when, token, guess in kept:
            self._counts.setdefault(token, {})[guess] = (count, when)
            best = self._best.setdefault(token, [])
            if len(best) < 2 * GUESSES:
                best.append(guess)


class JacobiWindow:
    """Guesses of the positions after the next one, each of which the target's predictions move on.

    Row r has at column c a guess of the token r + c + 1 positions after the text's last one, made when the
    token of row 0 in that column was at hand: a column is an n-gram, row by row.

    Example:
        columns 1 2 3 4 and 5 6 7 8; after 4 the target predicts 9, after 8 it predicts 6: the guesses 2 3 4 9
        after 1 and 6 7 8 6 after 5, and then the columns 2 3 4 9 and 6 7 8 6
    """

    def __init__(self) -> None:
        self._columns: list[Guess] = []
        self._random = Random(0)

    def paths(self, text: Sequence[int]) -> list[Guess]:
        """The window as paths below the text's last token; at first its tokens are some of the text's."""
        while len(self._columns) < WINDOW:
            self._columns.append(tuple(self._random.choices(text, k=COPIED)))
        spine = [column[0] for column in self._columns]
        return [(*spine[:index], *column) for index, column in enumerate(self._columns)]

    def learn(self, logits: NodeLogits, moved: int) -> list[Guess]:
        """Moves on by the predictions after its columns, and `moved` tokens along the text.

        Returns:
            The n-grams that are whole now: a token and the guess after it.
        """
        best = logits.top_tokens[:, 0].tolist()
        predicted = dict(zip(map(tuple, logits.contexts.tolist()), best, strict=True))
        whole = [(*column, predicted[column]) for column in self._columns if column in predicted]
        if whole:
            self._columns = [gram[1:] for gram in whole[max(0, moved - 1) :]]
        return whole


class HierarchyDraftingSession(LookupSession):
    """A request's own guesses, beside the model's, those of other processes and those of the corpora.

    Args:
        model: Shared by all requests.
        stores: Segments of the levels beyond these, by the level's name, nearest first; may be none.
        prompt: int32, shape (length,).

    Attributes:
        learns_early: True, as the window drafts from the last predictions.

    Example:
        text 7 1 2 3 4 7 1 2 5 6 7  ->  guesses 1 2 5 6 and 1 2 3 4: tokens [1, 2, 5, 6, 3, 4, ..],
        parents [-1, 0, 1, 2, 1, 4, ..], and then the window
    """

    learns_early = True

    def __init__(self, model: ModelStore, stores: Mapping[str, Segments], prompt: TokenArray) -> None:
        super().__init__(prompt)
        self._model = model
        self._prompted = len(self.text)
        self._context: dict[int, dict[Guess, None]] = {}  # of each token, the newest last
        self._indexed, self._moved = 0, 0
        self._window = JacobiWindow()
        self._ends = {level: TextEnd(segments, prompt) for level, segments in stores.items()}
        self._index()

    def propose(self, budget: int) -> Proposal:
        """Guess by guess: the context's, the model's, those of the other levels."""
        last = self.text[-1] if self.text else -1
        guesses = {guess: 1 for guess in reversed(self._context.get(last, {}))}
        level = "request"
        if len(guesses) < GUESSES:
            level = level if guesses else "history"
            _fill(guesses, self._model.best(last), 1)
        for name, end in self._ends.items():
            for span in range(min(LONGEST, max(end.length, 4)), SHORTEST - 1, -1):
                if len(guesses) >= GUESSES:
                    break
                found = common_prefixes(end.behind(span), COPIED, 2 * GUESSES, COPIED)
                level = level if guesses else name
                _fill(guesses, [guess for guess, _ in found], span)
                if found:
                    break
        tree = _merged(guesses, level)
        if budget > GUESSES * COPIED and self.text:
            for path in self._window.paths(self.text):
                tree.add_path(path, prob=UNLIKELY, match_length=1)
        return tree.proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        super().observe(tokens)
        for end in self._ends.values():
            end.observe(tokens)
        self._moved += len(tokens)
        self._index()

    def learn(self, logits: NodeLogits) -> None:
        """Moves the window on; its n-grams are guesses of the context."""
        for token, *guess in self._window.learn(logits, self._moved):
            self._guess(token, tuple(guess))
        self._moved = 0

    def close(self) -> None:
        """Adds the output to the model's store."""
        self._model.add(self.text[self._prompted :])

    def _index(self) -> None:
        text = self.text
        for index in range(self._indexed, len(text) - COPIED):
            self._guess(text[index], tuple(text[index + 1 : index + 1 + COPIED]))
        self._indexed = max(self._indexed, len(text) - COPIED)

    def _guess(self, token: int, guess: Guess) -> None:
        known = self._context.setdefault(token, {})
        known.pop(guess, None)
        known[guess] = None
        if len(known) > GUESSES:
            del known[next(iter(known))]


def _fill(guesses: dict[Guess, int], more: Sequence[Guess], match: int) -> None:
    """Adds guesses that are new, up to GUESSES."""
    for guess in more:
        if len(guesses) < GUESSES:
            guesses.setdefault(guess, match)


def _merged(guesses: dict[Guess, int], level: str) -> GuessTree:
    """One tree of all guesses; a node's probability is its share of the guesses that reach its parent."""
    tree = GuessTree("hierarchy_drafting", level)
    reached = Counter(guess[:depth] for guess in guesses for depth in range(COPIED + 1))
    for guess, match in guesses.items():
        node = -1
        for depth, token in enumerate(guess):
            share = reached[guess[: depth + 1]] / reached[guess[:depth]]
            node = tree.add(node, token, share, match)
    return tree


def _sources(parts: MethodContext) -> Sequence[StoredSource]:
    model, store = ModelStore(), Datastore(parts)
    between = "shared" if parts.stores.shared else "history"

    def opened(prompt: TokenArray, references: Sequence[TokenArray]) -> HierarchyDraftingSession:
        own = model if parts.config.history_replies else ModelStore()
        stores = {between: store.learned, "corpus": store.corpora}
        return HierarchyDraftingSession(own, stores, after_references(prompt, references))

    return [StoredSource("hierarchy_drafting", store, opened, lambda: model.nbytes)]


METHOD = Method(
    name="hierarchy_drafting",
    paper="Cho et al. 2025, arXiv:2502.05609",
    sources=_sources,
    tree=as_proposed,
    nodes=(GUESSES + WINDOW) * COPIED,
)
