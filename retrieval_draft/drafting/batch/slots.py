"""The arrays of a batch's sessions, one slot each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.suffix_automaton import SuffixAutomaton

__all__ = ["Slots"]

FIRST = 8
RESERVE = 512
"""Tokens of a reply for which room is reserved at the start."""

GROWTH = 1.25


class Slots:
    """Sessions side by side, so that a kernel iterates over all of them. Slots are reused.

    Args:
        max_chain: The longest chain.
        most: Maximum number of candidates of a node of a chain.
        sources: Sources that are asked.

    Attributes:
        fields: int64, shape (slots, SLOT_FIELDS). See `_kernels.slots`.
        nodes: int32, shape (slots, 2, nodes). Tokens and parents of the proposals.
        evidence: float32, shape (slots, nodes, columns). See `fusion`.
        chosen: int32, shape (slots, max_chain). Nodes of the chain.
        request: float64, shape (slots, SOURCES). Calibration of the request alone.
        occurrences: uint8, shape (slots, COUNTERS). Tokens of its text, see `fusion.count_tokens`.
        tail: int32, shape (slots, LONGEST). The text's end.
    """

    def __init__(self, max_chain: int, most: int, sources: int) -> None:
        from retrieval_draft.drafting._kernels import fusion
        from retrieval_draft.drafting.batch._kernels import slots
        from retrieval_draft.index._kernels.segment_match import LONGEST

        self._kernels: Any = slots
        self._fusion: Any = fusion
        self._opened = 0
        self._free: list[int] = []
        self._automata: list[SuffixAutomaton | None] = []
        self._texts: list[TokenArray | None] = []
        self._prompts: list[int] = []
        nodes = max_chain * most + 1
        self.fields: NDArray[np.int64] = np.empty((0, slots.SLOT_FIELDS), np.int64)
        self.nodes: NDArray[np.int32] = np.empty((0, 2, nodes), np.int32)
        self.evidence: NDArray[np.float32] = np.empty(
            (0, nodes, fusion.OWN + fusion.PER_SOURCE * sources), np.float32
        )
        self.chosen: NDArray[np.int32] = np.empty((0, max_chain), np.int32)
        self.request: NDArray[np.float64] = np.empty((0, fusion.SOURCES), np.float64)
        self.occurrences: NDArray[np.uint8] = np.empty((0, fusion.COUNTERS), np.uint8)
        self.tail: NDArray[np.int32] = np.empty((0, LONGEST), np.int32)

    def __len__(self) -> int:
        """Sessions that are open."""
        return len(self._automata) - len(self._free)

    @property
    def mask(self) -> int:
        """The bits of a session's id that are its slot."""
        return int(self._kernels.SLOT_MASK)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return len(self.fields)

    @property
    def used(self) -> NDArray[np.int64]:
        """Slots of the sessions that are open, ascending."""
        return np.flatnonzero(self.fields[:, self._kernels.ID] != self._kernels.CLOSED)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, those of the sessions included."""
        own = (
            self.fields, self.nodes, self.evidence, self.chosen, self.request, self.occurrences, self.tail,
        )  # fmt: skip
        texts = sum(text.nbytes for text in self._texts if text is not None)
        automata = sum(automaton.nbytes for automaton in self._automata if automaton is not None)
        return sum(array.nbytes for array in own) + texts + automata

    def open(self, prompt: TokenArray, references: Sequence[TokenArray], indexed: bool) -> int:
        """Puts a session into a free slot.

        Args:
            prompt: int32, shape (length,).
            references: int32, shape (length,) each. Texts that the reply may quote.
            indexed: Whether to build an automaton over all of them.

        Returns:
            The session's id, which is never used again.
        """
        automaton = SuffixAutomaton(
            len(prompt) + sum(len(text) + 1 for text in references) + RESERVE if indexed else 0
        )
        if indexed:
            for text in references:
                automaton.insert(text)
                automaton.end_text()
            automaton.insert(prompt)
        kernels = self._kernels
        if not self._free:
            self._grow()
        slot = self._free.pop()
        buffer = np.empty(len(prompt) + RESERVE, np.int32)
        buffer[: len(prompt)] = prompt
        session = int(self._opened << kernels.SLOT_BITS | slot)
        self._opened += 1
        self._automata[slot], self._texts[slot], self._prompts[slot] = automaton, buffer, len(prompt)
        self.request[slot] = 0.0
        self.occurrences[slot] = 0
        self._fusion.count_tokens(np.array(prompt, np.int32), self.occurrences[slot])
        fields = self.fields[slot]
        fields[:] = 0
        fields[kernels.STAMP] = -1
        fields[[kernels.LENGTH, kernels.INSERTED, kernels.LOCATED]] = len(prompt)
        self._address(slot)
        longest = self.tail.shape[1]
        end = prompt[-longest:]
        self.tail[slot] = -1
        self.tail[slot, longest - len(end) :] = end
        fields[kernels.ID] = session  # last: an interrupted call opens nothing
        return session

    def slot(self, session: int) -> int:
        """The slot of an open session, or -1."""
        slot = session & self._kernels.SLOT_MASK
        known = session >= 0 and slot < self.capacity and self.fields[slot, self._kernels.ID] == session
        return slot if known else -1

    def close(self, slot: int) -> None:
        """Frees a slot, and the session's arrays with it."""
        self.fields[slot] = 0
        self.fields[slot, self._kernels.ID] = self._kernels.CLOSED
        self._automata[slot] = self._texts[slot] = None
        self._free.append(slot)

    def text(self, slot: int) -> tuple[TokenArray, TokenArray]:
        """Prompt and reply so far: views; the next step may append after them."""
        text = self._texts[slot]
        assert text is not None
        length, prompt = int(self.fields[slot, self._kernels.LENGTH]), self._prompts[slot]
        return text[:prompt], text[prompt:length]

    def make_room(self, slots: NDArray[np.int64], more: NDArray[np.int64]) -> None:
        """Makes room for `more` tokens after the text of each of `slots`: int64, shape (rows,) both."""
        kernels = self._kernels
        needed = self.fields[slots, kernels.LENGTH] + more
        for index in np.flatnonzero(needed > self.fields[slots, kernels.TEXT_ROOM]):
            slot = int(slots[index])
            old = self._texts[slot]
            assert old is not None
            text = np.empty(max(int(needed[index]), int(len(old) * GROWTH)) + RESERVE, np.int32)
            text[: len(old)] = old
            self._texts[slot] = text
            self._address(slot)

    def insert(self, slot: int) -> None:
        """Brings a slot's automaton to the end of its text, growing it."""
        kernels = self._kernels
        automaton, text, fields = self._automata[slot], self._texts[slot], self.fields[slot]
        assert automaton is not None
        assert text is not None
        automaton.insert(text[fields[kernels.INSERTED] : fields[kernels.LENGTH]])
        fields[kernels.INSERTED] = fields[kernels.LENGTH]
        self._address(slot)

    def _address(self, slot: int) -> None:
        """Records the addresses of a slot's arrays."""
        kernels = self._kernels
        automaton, text, fields = self._automata[slot], self._texts[slot], self.fields[slot]
        assert automaton is not None
        assert text is not None
        states, edges, table, meta = automaton.arrays
        fields[kernels.TEXT], fields[kernels.TEXT_ROOM] = text.ctypes.data, len(text)
        fields[kernels.STATES_AT], fields[kernels.NUM_STATES] = states.ctypes.data, len(states)
        fields[kernels.EDGES_AT], fields[kernels.NUM_EDGES] = edges.ctypes.data, len(edges)
        fields[kernels.TABLE_AT], fields[kernels.TABLE_SIZE] = table.ctypes.data, len(table)
        fields[kernels.META_AT] = meta.ctypes.data

    def _grow(self) -> None:
        before = self.capacity
        after = max(FIRST, 2 * before)
        for name in ("fields", "nodes", "evidence", "chosen", "request", "occurrences", "tail"):
            old = getattr(self, name)
            grown = np.zeros((after, *old.shape[1:]), old.dtype)
            grown[:before] = old
            setattr(self, name, grown)
        self.fields[before:, self._kernels.ID] = self._kernels.CLOSED
        more = after - before
        self._automata += [None] * more
        self._texts += [None] * more
        self._prompts += [0] * more
        self._free += range(after - 1, before - 1, -1)
