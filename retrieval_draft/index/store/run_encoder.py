"""Entries of finished requests: their texts, and what was learned since the last ones."""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_draft.index.segments.new_texts import new_texts
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.store.entry import EntryCodec
from retrieval_draft.index.store.learned import other_id
from retrieval_draft.index.store.learned_entry import MOST_MARKS, pack_calibration, pack_learned
from retrieval_draft.index.store.log_replica import LogReplica
from retrieval_draft.index.store.outbox import Run
from retrieval_draft.index.store.row_outbox import RowOutbox

__all__ = ["RunEncoder"]

_OVERLAP = 31
"""Tokens that a run cut in two has in both parts; no lookup needs a longer context."""


class RunEncoder:
    """Encodes the runs of one server, and numbers their entries.

    Args:
        server: This server's id.
        mirror: Finds the part of a prompt that is known already.
        codec: Writes entries.
        vocabulary: Number of token ids.
        most_tokens: Of an entry.
        row_share: Bytes of rows for each byte of tokens; 0 for texts alone.

    Attributes:
        sequence: Number of entries with texts so far.
    """

    def __init__(
        self,
        server: bytes,
        mirror: LogReplica,
        codec: EntryCodec,
        vocabulary: int,
        most_tokens: int,
        row_share: float,
    ) -> None:
        self._server = server
        self._mirror = mirror
        self._codec = codec
        self._vocabulary = vocabulary
        self._most_tokens = most_tokens
        self._learns = row_share > 0
        self._rows = RowOutbox(vocabulary, row_share)
        self._tokens = 0
        self._learned_sequence = 0
        self._marks: list[tuple[int, int]] = []
        self.sequence = 0

    @property
    def nbytes(self) -> int:
        """Bytes of rows that wait."""
        return self._rows.nbytes

    def encode(self, taken: Sequence[Run]) -> list[bytes]:
        """Entries with the runs' texts, after one with the begin of each reply where prompts are shared."""
        texts: list[bytes] = []
        for run in taken:
            found = new_texts(self._mirror.segments, run.prompt, run.reply)
            for number, text in enumerate(found, 1):
                replied = len(run.reply) if number == len(found) else 0  # the last one ends with the reply
                texts += self._pieces(text, len(text) - replied)
        marks, self._marks = self._marks[:MOST_MARKS], []
        return [self._learned(pack_learned(None, marks, self._vocabulary)), *texts] if marks else texts

    def rows(self, taken: Sequence[Run]) -> list[bytes]:
        """An entry with rows, if any may go; apart from the texts, which need not wait for the choice."""
        for run in taken:
            self._rows.learn(run.learned)
        rows = self._rows.take(4 * self._tokens)
        self._tokens = 0
        return [] if rows is None else [self._learned(pack_learned(rows, (), self._vocabulary))]

    def calibration(self, content: bytes) -> bytes:
        """An entry with a calibration's file."""
        return self._learned(pack_calibration(content))

    def _pieces(self, text: TokenArray, start: int) -> list[bytes]:
        """The entries of a text whose reply begins at `start`."""
        inside = (text >= 0) & (text < self._vocabulary)
        prompt = int(inside[:start].sum())
        tokens = text[inside]
        pieces = []
        for begin in range(0, max(len(tokens) - _OVERLAP, 1), self._most_tokens - _OVERLAP):
            piece = tokens[begin : begin + self._most_tokens]
            if len(piece) > 1:
                if self._learns and prompt > begin:
                    self._marks.append((self.sequence, min(prompt - begin, len(piece))))
                pieces.append(self._codec.encode(self._server, self.sequence, piece))
                self.sequence += 1
                self._tokens += len(piece)
        return pieces

    def _learned(self, packed: bytes) -> bytes:
        entry = self._codec.encode_learned(other_id(self._server), self._learned_sequence, packed)
        self._learned_sequence += 1
        return entry
