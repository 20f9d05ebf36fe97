"""Draft sources that say right, wrong and mixed things on purpose, and a plain fusion of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from retrieval_draft.drafting.hierarchy import SourceHierarchy, SourceSessions
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.source import NodeLogits, Proposal, SourceSession, TokenArray


def proposal(tokens: list[int], parents: list[int], source: str = "test") -> Proposal:
    """A proposal with plain evidence."""
    size = len(tokens)
    return Proposal(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.full(size, 0.5, np.float32),
        np.ones(size, np.int32),
        source,
        "request",
    )


def proposal_of(tokens: list[int], parents: list[int], probs: list[float], source: str = "a") -> Proposal:
    """A proposal with probabilities of its own."""
    made = proposal(tokens, parents, source)
    return dataclasses.replace(
        made, probs=np.array(probs, np.float32), match_lengths=np.ones(len(tokens), np.int32)
    )


class OracleSession:
    """Knows the reply and mixes wrong siblings and wrong branches into it."""

    def __init__(
        self, prompt: TokenArray, reply: Sequence[int], vocabulary: int, wrong: float, seed: int
    ) -> None:
        self.text = list(map(int, prompt))
        self.start = len(prompt)
        self.reply = list(reply)
        self.vocabulary, self.wrong = vocabulary, wrong
        self.rng = np.random.default_rng(seed)
        self.learned: list[NodeLogits] = []
        self.closed = False

    def propose(self, budget: int) -> Proposal:
        at = len(self.text) - self.start
        truth = [*self.reply[at:], *self.rng.integers(0, self.vocabulary, budget).tolist()]
        tokens: list[int] = []
        parents: list[int] = []
        parent, depth = -1, 0
        while len(tokens) < budget:
            children = {truth[depth]} if self.rng.random() >= self.wrong else set()
            children |= set(self.rng.integers(0, self.vocabulary, self.rng.integers(0, 3)).tolist())
            siblings = self.rng.permutation(sorted(children)).tolist() or [
                int(self.rng.integers(self.vocabulary))
            ]
            onward = -1
            for token in siblings[: budget - len(tokens)]:
                tokens.append(int(token))
                parents.append(parent)
                if onward < 0 or token == truth[depth]:
                    onward = len(tokens) - 1
            # A wrong branch grows on now and then.
            parent = onward if self.rng.random() >= 0.1 else len(tokens) - 1
            depth += 1
        return proposal(tokens, parents)

    def observe(self, tokens: TokenArray) -> None:
        self.text += tokens.tolist()

    def learn(self, logits: NodeLogits) -> None:
        assert logits.contexts.shape[0] == logits.top_tokens.shape[0] == logits.top_probs.shape[0]
        self.learned.append(logits)

    def close(self) -> None:
        self.closed = True


class OracleSource:
    """Opens `OracleSession`s; `replies` are the true replies of the requests in order."""

    name, level, nbytes = "oracle", "request", 0
    session: type[OracleSession] = OracleSession

    def __init__(
        self, *replies: Sequence[int], vocabulary: int = 97, wrong: float = 0.2, seed: int = 0
    ) -> None:
        self.replies = list(replies)
        self.options = (vocabulary, wrong, seed)
        self.sessions: list[OracleSession] = []

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> OracleSession:
        reply = self.replies[len(self.sessions) % len(self.replies)] if self.replies else ()
        self.sessions.append(self.session(prompt, reply, *self.options))
        return self.sessions[-1]

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing to end."""


class PlantedSession(OracleSession):
    """Proposes the reply as a chain, in which some tokens are wrong."""

    def propose(self, budget: int) -> Proposal:
        at = len(self.text) - self.start
        chain = self.reply[at : at + budget]
        wrong = self.rng.random(len(chain)) < self.wrong
        drafts = [
            (token + 1) % self.vocabulary if off else token for token, off in zip(chain, wrong, strict=True)
        ]
        return proposal(drafts, list(range(-1, len(drafts) - 1)))


class PlantedSource(OracleSource):
    """Opens `PlantedSession`s."""

    session = PlantedSession


class BrokenSource(OracleSource):
    """Raises in the given call after a few good ones."""

    name = "broken"

    def __init__(self, call: str, after: int = 2) -> None:
        super().__init__()
        self.call, self.after = call, after

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> OracleSession:
        if self.call == "open":
            raise OSError("broken on purpose")
        session = super().open(prompt, references)
        left = [self.after]

        def broken(*_: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise OSError("broken on purpose")
            return whole(*_)

        whole = getattr(session, self.call)
        setattr(session, self.call, broken)
        return session


def fuse(root: int, proposals: Sequence[Proposal], calibration: object, max_nodes: int) -> DraftTree:
    """The first proposal as a tree, in its own order."""
    first = proposals[0]
    depths = [0]
    for parent in first.parents:
        depths.append(depths[parent + 1] + 1)
    size = len(first) + 1
    return DraftTree(
        np.concatenate([[root], first.tokens]).astype(np.int32),
        np.concatenate([[-1], first.parents + 1]).astype(np.int32),
        np.array(depths, np.int32),
        np.ones(size, np.float32),
        np.linspace(1, 0.1, size, dtype=np.float32),
        np.concatenate([[0], np.ones(size - 1)]).astype(np.int64),
    ).truncate(max_nodes)


class NoCalibration:
    """Learns nothing and counts how often it was told."""

    def __init__(self) -> None:
        self.told = 0
        self.noise: object = None
        self.position = 0

    def open(self, prompt: TokenArray | None = None, *, noise: object = None) -> NoCalibration:
        return self

    def count(self, tokens: TokenArray) -> None: ...

    def observe(self, tree: DraftTree, proposals: Sequence[Proposal], emitted: TokenArray) -> None:
        self.told += 1


class OpenedAs:
    """A source whose one session is given."""

    name, level, nbytes = "given", "request", 0

    def __init__(self, session: SourceSession) -> None:
        self.session = session

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SourceSession:
        return self.session

    def flush(self) -> None: ...
    def close(self) -> None: ...


def sessions_of(*sessions: SourceSession) -> SourceSessions:
    """The given sessions, opened for one request."""
    return SourceHierarchy([OpenedAs(session) for session in sessions]).open(np.empty(0, np.int32))
