"""RASD: a draft model's tree and a retrieval tree, pruned by the model and joined by longest prefix.

Quan et al. (Findings of ACL 2025, arXiv:2503.03434; no code). The draft model grows an EAGLE-2 tree;
retrieved continuations whose first token is not among the model's best at the root are dropped; the others
are joined to the tree along equal tokens. The number of the best, and the sizes of the trees, were not
published: here 10, and half of the nodes each, where one may use the other's rest. Retrieval here is the
request's suffix automaton, history, shared store and corpora.
"""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_draft.drafting.hierarchy import SourceHierarchy, SourceSessions
from retrieval_draft.drafting.sources import make_sources
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.index.source import DraftSource, Proposal, TokenArray
from retrieval_draft.methods.drafted import DraftedSession, Drafter, drafter
from retrieval_draft.methods.lookup import GuessTree
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["METHOD", "RasdSession", "RasdSource", "join"]

LIMITS = ExpansionLimits(top_k=10, depth=6, entropy_stop=None)
KEPT_FIRST = 10
RETRIEVAL = ("automaton", "history", "shared", "corpus")


def join(model: Proposal, found: Sequence[Proposal], budget: int) -> GuessTree:
    """The model's tree with retrieved paths joined to it.

    Args:
        model: The draft model's nodes, best first.
        found: Proposals of each retrieval source, best first.
        budget: The most nodes.

    Example:
        model "9 4", "3"; retrieved "9 5" and "7 1", budget 4: 7 is none of the model's first tokens, so
        9 4 3 and 5 below 9
    """
    first = {int(t) for t, parent in zip(model.tokens, model.parents, strict=True) if parent < 0}
    tree = GuessTree("rasd", "model")
    half = (budget + 1) // 2
    _add(tree, model, half, None)
    for proposal in found:
        _add(tree, proposal, budget, first)
    _add(tree, model, budget, None)
    return tree


def _add(tree: GuessTree, proposal: Proposal, size: int, first: set[int] | None) -> None:
    """Adds nodes until the tree has `size`, leaving out those below a first token that is not in `first`."""
    nodes: list[int | None] = []
    for token, parent, prob, length in zip(
        proposal.tokens.tolist(),
        proposal.parents.tolist(),
        proposal.probs.tolist(),
        proposal.match_lengths.tolist(),
        strict=True,
    ):
        above = -1 if parent < 0 else nodes[parent]
        if above is None or (parent < 0 and first is not None and token not in first):
            nodes.append(None)
        elif len(tree) < size or tree.find(above, token) is not None:
            nodes.append(tree.add(above, token, prob, length))
        else:
            nodes.append(None)


class RasdSession(DraftedSession):
    """The draft model's view of a request, and the retrieval sources'."""

    def __init__(self, model: Drafter, drafts: SourceSessions, prompt: TokenArray) -> None:
        super().__init__([model], prompt)
        self._drafts = drafts

    def propose(self, budget: int) -> Proposal:
        """The joined tree."""
        if not self.text or budget <= 0:
            return GuessTree("rasd", "model").proposal(0)
        model = self.inner[0].propose(max(budget, KEPT_FIRST))
        return join(model, self._drafts.propose(budget), budget).proposal(budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        super().observe(tokens)
        self._drafts.observe(tokens)

    def close(self) -> None:
        """Ends the request in the retrieval sources."""
        super().close()
        self._drafts.close()


class RasdSource:
    """Retrieval sources and a draft model."""

    name = "rasd"
    level = "model"

    def __init__(self, parts: MethodContext) -> None:
        self._model = drafter(parts, "rasd")
        names = [source for source in make_sources(parts.config, parts.stores) if source.name in RETRIEVAL]
        self._hierarchy = SourceHierarchy(names)

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> RasdSession:
        """Starts a request with `prompt`, int32, shape (length,), and reference texts, int32 each."""
        model = self._model.session(prompt, LIMITS, 1)
        return RasdSession(model, self._hierarchy.open(prompt, references), prompt)

    def flush(self) -> None:
        """Waits until the replies of finished requests can be looked up."""
        self._hierarchy.flush()

    def close(self) -> None:
        """Closes the retrieval sources."""
        self._hierarchy.close()

    @property
    def nbytes(self) -> int:
        """Bytes of the retrieval sources."""
        return self._hierarchy.nbytes


def _sources(parts: MethodContext) -> Sequence[DraftSource]:
    return [RasdSource(parts)]


METHOD = Method(
    "rasd", "Quan et al. 2025, arXiv:2503.03434", _sources, as_proposed, nodes=60, needs_model=True
)
