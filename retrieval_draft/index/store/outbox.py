"""Runs that wait to be sent."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retrieval_draft.index.source import NodeLogits, TokenArray

__all__ = ["Outbox", "Run"]


MOST_LEARNED = 1 << 15
"""Predictions that wait, of about 80 bytes each; as many rows wait in a `RowOutbox`. Texts beyond it go
alone."""


class Run(NamedTuple):
    """A finished request.

    Attributes:
        prompt: int32, shape (n,). The shared part of it; may be empty.
        reply: int32, shape (m,). May be empty.
        learned: Predictions after contexts of the text.
    """

    prompt: TokenArray
    reply: TokenArray
    learned: Sequence[NodeLogits] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and reply."""
        return len(self.prompt) + len(self.reply)

    @property
    def num_learned(self) -> int:
        """Positions that `learned` has predictions for."""
        return sum(len(each.contexts) for each in self.learned)


class Outbox:
    """A bounded queue that never blocks `put`: the oldest runs beyond the limit are dropped and counted.

    Args:
        max_tokens: Tokens that may wait.

    Attributes:
        dropped: Runs that were not sent because too many were waiting.
        unfinished: Runs that wait, or were taken and not reported by `finish` yet.
        calibration: File of a calibration that goes with the next runs; empty for none.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._runs: deque[Run] = deque()
        self._tokens = 0
        self._learned = 0
        self._woken = False
        self._changed = threading.Condition()
        self.dropped = 0
        self.unfinished = 0
        self.calibration = b""

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def nbytes(self) -> int:
        """Bytes of waiting texts and predictions."""
        learned = sum(
            each.contexts.nbytes + each.top_tokens.nbytes + each.top_probs.nbytes
            for run in tuple(self._runs)
            for each in run.learned
        )
        return 4 * self._tokens + learned

    def put(self, prompt: TokenArray, reply: TokenArray, learned: Sequence[NodeLogits] = ()) -> None:
        """Adds a copy of a run: prompt and reply, int32, shape (n,) and (m,), and predictions as they are."""
        run = Run(np.array(prompt, np.int32), np.array(reply, np.int32), learned)
        if not run.num_tokens:
            return
        with self._changed:
            if self._learned + run.num_learned > MOST_LEARNED:
                run = run._replace(learned=())
            self._runs.append(run)
            self._learned += run.num_learned
            self._tokens += run.num_tokens
            self.unfinished += 1
            while self._tokens > self._max_tokens and len(self._runs) > 1:
                oldest = self._runs.popleft()
                self._tokens -= oldest.num_tokens
                self._learned -= oldest.num_learned
                self.dropped += 1
                self.unfinished -= 1
            self._changed.notify_all()

    def take(self, runs: int, tokens: int, timeout: float) -> list[Run]:
        """Removes and returns the oldest runs.

        Args:
            runs: Limit of their number.
            tokens: Number of tokens from which on no run is added.
            timeout: Seconds to wait for the first.
        """
        taken: list[Run] = []
        with self._changed:
            self._changed.wait_for(lambda: self._runs or self._woken, timeout)
            self._woken = False
            size = 0
            while self._runs and len(taken) < runs and size < tokens:
                taken.append(self._runs.popleft())
                size += taken[-1].num_tokens
                self._learned -= taken[-1].num_learned
            self._tokens -= size
        return taken

    def finish(self, runs: int) -> None:
        """Records that taken runs are finished."""
        with self._changed:
            self.unfinished -= runs

    def wake(self) -> None:
        """Ends a wait in `take`."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()
