"""Ouroboros: a draft model's chain, extended by phrases of a pool.

Zhao et al. (EMNLP 2024, arXiv:2402.13720): the pool keeps for each token the 20 newest phrases of 6 tokens
after it and outlives the request; the draft's last token is extended by the 3 newest of them, and all is
verified in one pass. Published, the draft model itself decodes with lookahead over the pool, which makes
drafting faster and leaves the draft as it is; here it decodes plainly. The pool takes phrases from drafts,
from text that was verified, and from what the target predicted at the nodes of one path, rejected ones too: a
phrase that was wrong at one token is corrected. Published ones also come from the lookahead's own
guesses. The draft's length is per task there; 8 here.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from retrieval_draft._forks import lock_for_moments
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.index.source import DraftSource, NodeLogits, Proposal, TokenArray
from retrieval_draft.methods.drafted import DraftedSession, Drafter, drafter
from retrieval_draft.methods.lookup import GuessTree, MethodSource
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["METHOD", "OuroborosSession", "PhrasePool"]

DRAFTED = 8
PHRASE = 6
KEPT = 20
EXTENDED = 3
MAX_TOKENS = 100_000
"""Limit of tokens with phrases in the pool; the least recently used one is evicted first."""


class PhrasePool:
    """Phrases by the token before them, newest last. Several requests may use it at once.

    Example:
        after add([5, 1, 2, 3, 4, 6, 7]), newest(5)  ->  [(1, 2, 3, 4, 6, 7)]
    """

    def __init__(self) -> None:
        self._phrases: OrderedDict[int, deque[tuple[int, ...]]] = OrderedDict()
        self._lock = lock_for_moments()

    def add(self, tokens: Sequence[int]) -> None:
        """Adds every phrase of a run of tokens, complete ones only."""
        with self._lock:
            for start in range(len(tokens) - PHRASE):
                phrase = tuple(tokens[start + 1 : start + 1 + PHRASE])
                known = self._phrases.setdefault(tokens[start], deque(maxlen=KEPT))
                if phrase in known:
                    known.remove(phrase)
                known.append(phrase)
                self._phrases.move_to_end(tokens[start])
            while len(self._phrases) > MAX_TOKENS:
                self._phrases.popitem(last=False)

    def newest(self, token: int) -> list[tuple[int, ...]]:
        """The newest phrases after `token`, newest first."""
        with self._lock:
            return list(self._phrases.get(token, ()))[: -EXTENDED - 1 : -1]

    @property
    def nbytes(self) -> int:
        """Bytes of the phrases' tokens, as Python counts them: about 100 a phrase."""
        with self._lock:
            return sum(100 * len(known) for known in self._phrases.values())


class OuroborosSession(DraftedSession):
    """One request: the draft model, and the pool of all requests."""

    def __init__(
        self,
        model: Drafter,
        pool: PhrasePool,
        prompt: TokenArray,
        references: Sequence[TokenArray] = (),
    ) -> None:
        super().__init__([model], prompt)
        self._quoted = PhrasePool()
        for text in references:
            self._quoted.add(text.tolist())
        self._pool = pool
        self._drafts = False
        pool.add(self.text)

    def propose(self, budget: int) -> Proposal:
        """The model's greedy chain, then three phrases after its last token."""
        tree = GuessTree("ouroboros", "model")
        if not self.text or budget <= 0:
            return tree.proposal(0)
        self._drafts = True
        grown = self.inner[0].propose(min(DRAFTED, budget))
        chain = grown.tokens.tolist()
        last = tree.add_path(chain)
        end = chain[-1] if chain else self.text[-1]
        for phrase in [*self._quoted.newest(end), *self._pool.newest(end)][:EXTENDED]:
            tree.add_path(phrase, last)
        self._pool.add([*self.text[-1:], *chain])
        return tree.proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,); their phrases enter the pool."""
        before = len(self.text)
        super().observe(tokens)
        self._pool.add(self.text[max(0, before - PHRASE) :])

    def learn(self, logits: NodeLogits) -> None:
        """Adds the phrases that the target predicted, token by token, along the paths of verified nodes."""
        if not self._drafts:  # predictions at the prompt
            return
        runs: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}  # by the end of a node's context
        for context, best in zip(logits.contexts.tolist(), logits.top_tokens[:, 0].tolist(), strict=True):
            tokens, predicted = runs.get(tuple(context[:-1]), ([], []))
            tokens, predicted = [*tokens, context[-1]][-PHRASE:], [*predicted, best][-PHRASE:]
            runs[tuple(context[1:])] = tokens, predicted
            if len(predicted) == PHRASE:
                self._pool.add([tokens[0], *predicted])


def _sources(parts: MethodContext) -> Sequence[DraftSource]:
    model = drafter(parts, "ouroboros")
    limits = ExpansionLimits(top_k=1, depth=DRAFTED, entropy_stop=None)
    pool = PhrasePool()

    def open_session(prompt: TokenArray, references: Sequence[TokenArray]) -> OuroborosSession:
        return OuroborosSession(model.session(prompt, limits, 1), pool, prompt, references)

    return [MethodSource("ouroboros", open_session, lambda: pool.nbytes)]


METHOD = Method(
    "ouroboros",
    "Zhao et al. 2024, arXiv:2402.13720",
    _sources,
    as_proposed,
    nodes=DRAFTED + EXTENDED * PHRASE,
    needs_model=True,
)
