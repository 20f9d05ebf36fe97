"""Recorded replies in place of a model's choices: real drafts and acceptance with real kernel times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.bench.replay import read_traces
from retrieval_draft.drafting.session import DraftSession
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine import row as row_module
from retrieval_draft.engine.row import Row
from retrieval_draft.engine.verify import walk
from retrieval_draft.index.source import NodeLogits

__all__ = ["Recorded", "forced", "recorded"]

TokenArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A prompt and the reply of a 7B model.

    Attributes:
        task: Of Spec-Bench.
        prompt: Token ids.
        reply: Token ids.
    """

    task: str
    prompt: list[int]
    reply: list[int]


def recorded(path: Path, vocabulary: int, number: int, shortest: int) -> list[Recorded]:
    """The first `number` recorded replies of at least `shortest` tokens with all ids in a vocabulary."""
    found = (
        Recorded(trace.task, trace.prompt.tolist(), trace.output.tolist())
        for trace in read_traces([path])
        if len(trace.output) >= shortest
        and max(int(trace.prompt.max()), int(trace.output.max())) < vocabulary
    )
    return list(islice(found, number))


@contextmanager
def forced(replies: Mapping[tuple[int, ...], Sequence[int]]) -> Iterator[None]:
    """Makes drafters accept recorded tokens: the token after a node at depth d is the recorded one.

    Passes, reading, sampling and drafting run as usual; only the target's choices are replaced, and the
    predictions that sources learn from: the recorded token at each accepted node, for as many nodes as were
    verified.

    Args:
        replies: Recorded replies by prompt, as long as the generated ones.
    """
    by_prompt = {np.array(prompt, np.int32).tobytes(): list(reply) for prompt, reply in replies.items()}
    current: list[Row] = []
    accept, start, learn = Row._accept, DraftSession.start, DraftSession.learn

    def accept_recorded(row: Row, *rest: Any) -> list[int]:
        current[:] = [row]
        return accept(row, *rest)

    def walk_recorded(tree: DraftTree, choose: Callable[[int], int]) -> Iterator[tuple[int, int]]:
        row = current[0]
        reply = by_prompt[row.request.prompt.tobytes()]
        emitted = len(row.text) - len(row.request.prompt)
        depths = tree.depths.tolist()

        def choose_recorded(node: int) -> int:
            choose(node)  # for its time
            return int(reply[emitted + depths[node]])

        return walk(tree, choose_recorded)

    def start_recorded(
        drafting: DraftSession, first: TokenArray, prompt: TokenArray, predictions: Any
    ) -> None:
        start(drafting, first, prompt, None)

    def learn_recorded(
        drafting: DraftSession, plan: Any, emitted: TokenArray, logits: NodeLogits, early: bool | None = None
    ) -> None:
        """All sources learn now: which predictions are recorded is not known earlier."""
        if not len(emitted):  # of the warm-up
            learn(drafting, plan, emitted, logits)
            return
        path = plan.tree.walk(emitted)[: len(emitted)]
        repeated = np.resize(np.arange(len(path)), len(logits.contexts))
        contexts = logits.contexts[np.array(path)][repeated]
        tokens = np.asarray(emitted, np.int32)[: len(path)][repeated][:, None]
        probs = np.ones((len(repeated), 1), np.float32)
        learn(drafting, plan, emitted, NodeLogits(np.ascontiguousarray(contexts), tokens, probs))

    with (
        mock.patch.object(Row, "_accept", accept_recorded),
        mock.patch.object(row_module, "walk", walk_recorded),
        mock.patch.object(DraftSession, "start", start_recorded),
        mock.patch.object(DraftSession, "learn", learn_recorded),
        mock.patch.object(DraftSession, "learn_early", return_value=None),
    ):
        yield
