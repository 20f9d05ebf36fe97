"""vLLM's persistent batch as a proposer sees it: rows fill up, move and are reused as in ``InputBatch``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class FakeBatch:
    """Texts of running requests in rows, by vLLM's rules.

    A row that falls free is taken by the next request that comes, else by the last row; whatever stood in a
    row stays there behind the text that is there now, and so do drafts.

    Args:
        rows: At most.
        width: Of each row.
    """

    def __init__(self, rows: int, width: int) -> None:
        self.token_ids = np.zeros((rows, width), np.int32)
        self.lengths = np.zeros(rows, np.int32)
        self.names: list[str] = []
        self.texts: dict[str, list[int]] = {}

    def add(self, name: str, prompt: list[int]) -> None:
        """A new request, in the first row that is free."""
        self.texts[name] = list(prompt)
        self.restore(name)

    def restore(self, name: str) -> None:
        """A preempted request, with all of its text."""
        self.names.append(name)
        self._write(len(self.names) - 1)

    def remove(self, name: str) -> None:
        """A request leaves, and the last row moves into the gap."""
        row = self.names.index(name)
        last = self.names.pop()
        if row < len(self.names):
            self.names[row] = last
            self._write(row)

    def replace(self, name: str, other: str, prompt: list[int]) -> None:
        """A request leaves, and a new one takes its row in the same step."""
        self.texts[other] = list(prompt)
        row = self.names.index(name)
        self.names[row] = other
        self._write(row)

    def swap(self, left: str, right: str) -> None:
        """Two rows swap slots, as attention backends want it."""
        one, other = self.names.index(left), self.names.index(right)
        self.names[one], self.names[other] = right, left
        self._write(one)
        self._write(other)

    def step(
        self, tokens: dict[str, list[int]]
    ) -> tuple[list[list[int]], NDArray[np.int32], NDArray[np.int32]]:
        """Rows sample tokens, those not named have none yet; returns what a proposer is called with."""
        sampled = []
        for row, name in enumerate(self.names):
            new = tokens.get(name, [])
            sampled.append(list(new))
            self.texts[name] += new
            self._write(row)
        return sampled, self.lengths, self.token_ids

    def show_drafts(self, drafts: list[list[int]]) -> None:
        """Writes what was drafted behind the texts, where vLLM puts it before a step."""
        for row, draft in enumerate(drafts):
            length = int(self.lengths[row])
            self.token_ids[row, length : length + len(draft)] = draft[: self.token_ids.shape[1] - length]

    def _write(self, row: int) -> None:
        text = self.texts[self.names[row]]
        self.token_ids[row, : len(text)] = text
        self.lengths[row] = len(text)
