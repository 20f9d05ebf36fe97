"""Phrases: fixed texts from the user, whose rest is proposed once their first words occur."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import accumulate
from typing import Any

import numpy as np

from retrieval_draft._settings import check_range
from retrieval_draft.config import DraftConfig
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import BaseSession, BaseSource, Proposal, TokenArray

__all__ = ["PhraseSession", "PhraseSource", "PhraseTable", "make_source"]

SHORTEST = 3
"""Phrases of fewer tokens are ignored: two start a phrase, and there must be one to propose."""

LONGEST = 32
"""Tokens of the text that are compared with a phrase."""

KEPT = 64
"""Occurrences kept of one trigger, and read in one step."""

CAP = 16
"""Match length from which on the probability stays the same. Below it, an occurrence weighs twice as much for
each token of its match."""

SURE = [1 - 0.65 * 0.775**length for length in range(CAP + 1)]
"""Probability that the text continues like the phrases, by match length: .61 after 2 tokens, .70 after 3, .95
after 10, .99 after 16."""

_TOKEN = 4  # bytes: texts are kept as bytes, which Python compares, sorts and slices without a loop


class PhraseTable:
    """An Aho-Corasick automaton over the n-grams of phrases, and their occurrences.

    Besides the n-grams, each phrase's first 2 to `trigger` - 1 tokens start it; no single token does. Of an
    n-gram that occurs more than 64 times, 64 occurrences spread over all are kept, and those of twice its
    length are triggers too, and so on up to 32 tokens, so that a long match is found among many short ones.
    The table never changes; it takes 100 to 180 bytes a token, more the fewer n-grams repeat.

    Args:
        phrases: int32, shape (length,) each, ids of 0 and above. Those of less than 3 tokens are ignored.
        trigger: Tokens of an n-gram, 2 to 32.

    Attributes:
        ignored: Number of phrases that were too short.
        flat: The others, one after the other, as the bytes of int32.
        ends: End of each of them, in tokens.

    Raises:
        InvalidInputError: A phrase is no row of token ids, or `trigger` is out of range.

    Example:
        phrase 5 6 7 8 9, trigger 3: after "5 6", its start, come 7 8 9; after "6 7 8" comes 9; after "5", or
        after "7 8" without the 6, nothing
    """

    def __init__(self, phrases: Sequence[TokenArray], trigger: int = 3) -> None:
        check_range("trigger", trigger, 2, LONGEST)
        checked = [_checked(phrase, number) for number, phrase in enumerate(phrases)]
        kept = [phrase for phrase in checked if len(phrase) >= SHORTEST]
        self.ignored = len(checked) - len(kept)
        self.flat = b"".join(phrase.tobytes() for phrase in kept)
        self.ends = array("i", accumulate(len(phrase) for phrase in kept))
        # Trigger g occurs before the tokens positions[groups[g]:groups[g + 1]], counted over all phrases.
        self._groups = array("i", [0])
        self._positions = array("i")
        self._reach = 0
        self._automaton = self._build(trigger)
        self._automaton_bytes = int(self._automaton.get_stats()["total_size"])

    def __len__(self) -> int:
        """Phrases, the ignored ones not counted."""
        return len(self.ends)

    @property
    def phrases(self) -> list[TokenArray]:
        """The phrases, int32 each, the ignored ones left out."""
        return np.split(np.frombuffer(self.flat, np.int32), self.ends[:-1]) if self.ends else []

    @property
    def nbytes(self) -> int:
        """Bytes held; constant."""
        arrays = (self.ends, self._groups, self._positions)
        return self._automaton_bytes + len(self.flat) + sum(len(each) * each.itemsize for each in arrays)

    def propose(self, tail: bytes, budget: int) -> Proposal:
        """The `budget` most probable nodes after a text.

        Args:
            tail: The text's last 32 tokens or all of fewer, as the bytes of int32.
            budget: The most nodes to return.
        """
        found = self._occurrences(tail) if budget > 0 else []
        if not found:
            return _proposal([], [], [], [])
        flat = self.flat
        return _Continuations(
            (flat[at * _TOKEN : min(end, at + budget) * _TOKEN], length) for at, end, length in found
        ).tree(budget)

    def _occurrences(self, tail: bytes) -> list[tuple[int, int, int]]:
        """Next token's position, end of its phrase and match length, wherever a trigger ends the text."""
        if not self._reach:
            return []
        letters = _letters(tail[-self._reach * _TOKEN :])
        groups = [group for last, group in self._automaton.iter(letters) if last == len(letters) - 1]
        positions: dict[int, None] = {}  # the longest trigger comes first, and may fill it
        for group in groups:
            positions.update(dict.fromkeys(self._positions[self._groups[group] : self._groups[group + 1]]))
        found = []
        for at in list(positions)[:KEPT]:
            begin, end = self._phrase(at)
            known = min(len(tail) // _TOKEN, at - begin, LONGEST)
            before = self.flat[(at - known) * _TOKEN : at * _TOKEN]
            found.append((at, end, _common_end(before, tail[-known * _TOKEN :])))
        return found

    def _phrase(self, position: int) -> tuple[int, int]:
        """Begin and end of the phrase that contains `position` or ends at it; no phrase begins there."""
        number = bisect_left(self.ends, position)
        return (self.ends[number - 1] if number else 0), self.ends[number]

    def _build(self, trigger: int) -> Any:
        import ahocorasick

        automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS, ahocorasick.KEY_SEQUENCE)
        starts: list[tuple[int, int]] = []
        inner: list[tuple[int, int]] = []
        begin = 0
        for end in self.ends:
            starts.extend((at - begin, at) for at in range(begin + 2, min(begin + trigger, end + 1)))
            inner.extend((trigger, at) for at in range(begin + trigger, end + 1))
            begin = end
        self._add(automaton, starts)
        length = trigger
        while inner:
            crowded = self._add(automaton, inner)
            length *= 2
            long_enough = (at for at in crowded if length <= LONGEST and at - self._phrase(at)[0] >= length)
            inner = [(length, at) for at in long_enough]
        if self._reach:
            automaton.make_automaton()
        return automaton

    def _add(self, automaton: Any, triggers: list[tuple[int, int]]) -> list[int]:
        """Adds the tokens before each position as triggers; returns the positions of those kept in part."""
        grams: dict[bytes, list[int]] = {}
        for length, at in triggers:
            grams.setdefault(self.flat[(at - length) * _TOKEN : at * _TOKEN], []).append(at)
        crowded: list[int] = []
        for gram, positions in grams.items():
            if len(positions) > KEPT:
                crowded.extend(positions)
                positions = [positions[i * len(positions) // KEPT] for i in range(KEPT)]
            automaton.add_word(_letters(gram), len(self._groups) - 1)
            self._positions.extend(positions)
            self._groups.append(len(self._positions))
            self._reach = max(self._reach, len(gram) // _TOKEN)
        return crowded


class _Continuations:
    """Continuations, sorted: a tree node is a range of rows, and forks where neighbours differ.

    A row weighs 2 to the power of its match length, 16 at most. A child gets its share of the weight of all
    rows at its parent, those that end there included, times `SURE` of their longest match.
    """

    def __init__(self, found: Iterable[tuple[bytes, int]]) -> None:
        self._rows = sorted(found)
        texts = [text for text, _ in self._rows]
        self._ids = [memoryview(text).cast("i") for text in texts]
        self._lengths = [length for _, length in self._rows]
        self._weights = [0, *accumulate(1 << min(length, CAP) for length in self._lengths)]
        self._common = [0, *map(_common_start, texts, texts[1:])]  # with the row above
        # Of each pending node: -path probability, -longest match, rows, depth, depth of its fork, parent,
        # probability. Longer matches win ties; no two nodes hold the same first row, so nothing else decides.
        self._heap: list[tuple[float, int, int, int, int, int, int, float]] = []

    def tree(self, budget: int) -> Proposal:
        """The `budget` most probable nodes, best first."""
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        lengths: list[int] = []
        heap = self._heap
        self._fork(-1.0, -max(self._lengths), 0, len(self._rows), 0, -1)
        while heap and len(tokens) < budget:
            path, longest, first, last, depth, fork, parent, prob = heappop(heap)
            node = len(tokens)
            tokens.append(self._ids[first][depth])
            parents.append(parent)
            probs.append(prob)
            lengths.append(depth - longest)
            depth += 1
            if depth == fork:
                self._fork(path, longest, first, last, depth, node)
            else:
                prob = SURE[min(depth - longest, CAP)]
                heappush(heap, (path * prob, longest, first, last, depth, fork, node, prob))
        return _proposal(tokens, parents, probs, lengths)

    def _fork(self, path: float, longest: int, first: int, last: int, depth: int, node: int) -> None:
        """Pushes the children of a node whose rows no longer agree, or end."""
        ids, common, weights = self._ids, self._common, self._weights
        sure = SURE[min(depth - longest, CAP)] / (weights[last] - weights[first])
        while first < last and len(ids[first]) == depth:  # sorted, rows that end here come first
            first += 1
        while first < last:
            end = first + 1
            fork = len(ids[first])
            while end < last and common[end] > depth:
                fork = min(fork, common[end])
                end += 1
            prob = sure * (weights[end] - weights[first])
            longest = -max(self._lengths[first:end])
            heappush(self._heap, (path * prob, longest, first, end, depth, fork, node, prob))
            first = end


class PhraseSession(BaseSession):
    """One request's last 32 tokens."""

    def __init__(self, table: PhraseTable, prompt: TokenArray) -> None:
        self._table = table
        self._tail = b""
        self.observe(prompt)

    def propose(self, budget: int) -> Proposal:
        """The rest of the phrases that the text's end matches."""
        return self._table.propose(self._tail, budget)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,).

        Raises:
            InvalidInputError: An id is negative.
        """
        ids = np.asarray(tokens, np.int32)
        if len(ids) and int(ids.min()) < 0:
            raise InvalidInputError(f"Token id {int(ids.min())} is negative.", "Ids start at 0.")
        self._tail = (self._tail + ids[-LONGEST:].tobytes())[-LONGEST * _TOKEN :]


class PhraseSource(BaseSource):
    """Drafts the rest of fixed texts: templates, schemas, licence headers.

    Args:
        table: The phrases.
    """

    name = "phrases"
    level = "corpus"

    def __init__(self, table: PhraseTable) -> None:
        self.table = table

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> PhraseSession:
        """Starts at the end of the prompt, int32, shape (length,); references are not used."""
        return PhraseSession(self.table, prompt)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.table.nbytes


def make_source(config: DraftConfig, stores: DraftStores) -> PhraseSource | None:
    """A source over the phrases; None without any."""
    return None if stores.phrases is None else PhraseSource(stores.phrases)


def _checked(phrase: TokenArray, number: int) -> TokenArray:
    """Token ids of one phrase, int32, shape (length,)."""
    ids = np.asarray(phrase)
    if ids.size == 0:
        return np.empty(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        found = f"has shape {ids.shape} and dtype {ids.dtype}"
        raise InvalidInputError(f"Phrase {number} {found}; it must be a row of token ids.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= 2**31:
        wrong = low if low < 0 else high
        raise InvalidInputError(f"Phrase {number} holds the id {wrong}; ids must lie in 0..{2**31 - 1}.")
    return ids.astype(np.int32)


def _letters(tokens: bytes) -> tuple[int, ...]:
    """Two letters for each token, the first from 256 on, so that the two ranges are disjoint.

    pyahocorasick searches a node's edges one by one: with a letter a token, the root's alone would take 40
    microseconds where phrases hold 50,000 different tokens. This way it has one edge for 256 of them.
    """
    return tuple([letter for id in memoryview(tokens).cast("i") for letter in (256 + (id >> 8), id & 255)])


def _common_start(one: bytes, other: bytes) -> int:
    """Length of the common start of two texts in tokens, from their lowest differing bit, without a loop."""
    size = min(len(one), len(other))
    differ = int.from_bytes(one[:size], "little") ^ int.from_bytes(other[:size], "little")
    return ((differ & -differ).bit_length() - 1) // (8 * _TOKEN) if differ else size // _TOKEN


def _common_end(one: bytes, other: bytes) -> int:
    """Length of the common end of two texts of equal length in tokens, from their highest differing bit."""
    differ = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    return len(one) // _TOKEN - (-(-differ.bit_length() // (8 * _TOKEN)))


def _proposal(tokens: list[int], parents: list[int], probs: list[float], lengths: list[int]) -> Proposal:
    return Proposal(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.array(probs, np.float32),
        np.array(lengths, np.int32),
        PhraseSource.name,
        PhraseSource.level,
    )
