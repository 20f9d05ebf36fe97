"""Index builds: documents are read, tokenised and sorted into segments, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.build.documents import (
    NO_TEXT,
    DocumentFile,
    NoTextColumnError,
    ReadReport,
    read_documents,
)
from retrieval_draft.index.build.encoder import Encoder
from retrieval_draft.index.build.journal import Journal, Position, work_key
from retrieval_draft.index.build.merge import compacted, joined_texts
from retrieval_draft.index.build.options import RUN_TOKENS, BuildOptions
from retrieval_draft.index.segments.index_folder import IndexFolder, SegmentEntry
from retrieval_draft.index.segments.segment import Segment, text_dtype
from retrieval_draft.index.source import TokenArray

__all__ = [
    "BuildState",
    "build_index",
    "check_columns",
    "publish",
    "read_runs",
    "save_journal",
]

_BATCH_CHARACTERS = 1 << 21
_BATCH_TEXTS = 1024


@dataclass(slots=True)
class BuildState:
    """Progress of a build, for a display.

    Attributes:
        report: Documents read and skipped.
        tokens: Tokens so far, of earlier runs of an interrupted build too.
        file: Files begun.
        done_bytes: Bytes of the files that are done.
        file_bytes: Bytes of the file being read.
        file_characters: Characters read before that file.
        resumed: Documents that an interrupted build had done.
    """

    report: ReadReport = field(default_factory=ReadReport)
    tokens: int = 0
    file: int = 0
    done_bytes: int = 0
    file_bytes: int = 0
    file_characters: int = 0
    resumed: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of files read, about: a character counts for one within a file."""
        return self.done_bytes + min(int(self.report.characters) - self.file_characters, self.file_bytes)


Watch = Callable[[BuildState], object]


def build_index(
    index: IndexFolder,
    files: Sequence[DocumentFile],
    encoder: Encoder,
    options: BuildOptions,
    watch: Watch | None = None,
    replace: bool = False,
) -> BuildState:
    """Adds documents to an index. Readers see the old index until all is done.

    After an interruption the same call continues after the last finished run, if the files did not change;
    where all was published already, it does nothing.

    Args:
        index: The index to extend; its tokenizer is the encoder's.
        files: Files to read.
        encoder: The tokenizer.
        options: Options of reading and sorting.
        watch: Called regularly with the state.
        replace: Whether to drop the present contents of the index.

    Raises:
        DatastoreError: Another process changes the index, or the disk is full: it stays as it was.
        InvalidInputError: There is no text at all, and some file lacks the column.
    """
    index.check(encoder.fingerprint, encoder.vocabulary)
    state = BuildState()
    with index.locked():
        index.reload()
        base = [] if replace else list(index.manifest.segments)
        names = [entry.name for entry in base]
        key = work_key(files, options.text_column, options.skip, options.limit, options.segment_tokens)
        if any(file.is_stream for file in files):
            Journal.remove(index.path)  # a pipe may yield other data this time
        journal = Journal.load(index.path, key, names, index.manifest)
        index.sweep(journal.names)
        if journal.is_published:
            Journal.remove(index.path)
            return state
        state.tokens = journal.tokens
        state.report.merge(journal.position.left_out)
        state.resumed = journal.position.documents
        _read_all(index, files, encoder, options, journal, state, watch)
        _sort_all(index, options, journal)
        publish(index, journal, _all_segments(index, base, journal.segments, options))
    return state


def publish(index: IndexFolder, journal: Journal, segments: list[SegmentEntry]) -> None:
    """Makes `segments` the index and removes the journal, which until then names the segments to publish."""
    journal.result = [entry.name for entry in segments]
    save_journal(index, journal)
    index.publish(segments)
    Journal.remove(index.path)
    index.sweep()


def _read_all(
    index: IndexFolder,
    files: Sequence[DocumentFile],
    encoder: Encoder,
    options: BuildOptions,
    journal: Journal,
    state: BuildState,
    watch: Watch | None,
) -> None:
    """Reads and tokenises into runs."""
    if journal.all_read:
        return
    size = min(RUN_TOKENS, options.most)
    for texts, documents, position in read_runs(
        files, encoder, options, size, journal.position, state, watch
    ):
        journal.runs.append(index.write_run(texts, documents))
        journal.position = position
        save_journal(index, journal)
    check_columns(state)
    journal.position = msgspec.structs.replace(journal.position, left_out=state.report.left_out())
    journal.all_read = True
    save_journal(index, journal)


def check_columns(state: BuildState) -> None:
    """Refuses an empty build where all texts may be in another column.

    Raises:
        InvalidInputError: Nothing was read, and some file lacks the column.
    """
    if not state.tokens and state.report.no_column:
        raise InvalidInputError(state.report.no_column, "Name the field with --text-column.")


def _sort_all(index: IndexFolder, options: BuildOptions, journal: Journal) -> None:
    """Sorts runs into segments, as many runs as fit into each."""
    while journal.runs:
        count, size = 0, 0
        while count < len(journal.runs):
            size += journal.runs[count].tokens + journal.runs[count].documents
            if count and size > options.most:
                break
            count += 1
        texts, documents = joined_texts([index.read_run(entry) for entry in journal.runs[:count]])
        segment = Segment.join(texts, documents, index.manifest.vocabulary_size, options.workers)
        journal.segments.append(index.write(segment))
        del texts, segment
        journal.runs = journal.runs[count:]
        save_journal(index, journal)
        index.sweep(journal.names)


def _all_segments(
    index: IndexFolder, base: list[SegmentEntry], added: list[SegmentEntry], options: BuildOptions
) -> list[SegmentEntry]:
    """Segments to publish; small additions are joined, the segments of a first build are kept."""
    if not base:
        return added
    return compacted(index, [*base, *added], options.most, options.workers)


def save_journal(index: IndexFolder, journal: Journal) -> None:
    """Saves a journal; an error names a remedy."""
    try:
        journal.save(index.path)
    except OSError as error:
        raise DatastoreError(
            f"Cannot write to {index.path}: {error.strerror or error}.",
            "Free space or permit writing, and run the same command again: what is finished is kept.",
        ) from error


Run = tuple[NDArray[Any], NDArray[np.int32], Position]


def read_runs(
    files: Sequence[DocumentFile],
    encoder: Encoder,
    options: BuildOptions,
    size: int,
    start: Position,
    state: BuildState,
    watch: Watch | None = None,
) -> Iterator[Run]:
    """Reads and tokenises, one run ahead of the caller.

    Yields:
        Texts in one array as `Segment.join` takes them, at most `size` long; their start indices; and the
        position after them.
    """
    with ThreadPoolExecutor(1) as ahead:
        filled = _fill(files, encoder, options, size, start, state, watch)
        waiting = ahead.submit(next, filled, None)
        while (run := waiting.result()) is not None:
            waiting = ahead.submit(next, filled, None)
            yield run


def _fill(
    files: Sequence[DocumentFile],
    encoder: Encoder,
    options: BuildOptions,
    size: int,
    start: Position,
    state: BuildState,
    watch: Watch | None,
) -> Iterator[Run]:
    buffer = _Buffer(size, encoder.vocabulary)
    last = start
    for texts, positions in _batches(files, options, start, state):
        for tokens, position in zip(
            _encoded(encoder, texts, positions, files, state), positions, strict=True
        ):
            begin = position.offset
            while begin < len(tokens):
                taken = buffer.take(tokens[begin:])
                begin += taken
                state.tokens += taken
                done = begin == len(tokens)
                last = Position(
                    position.file,
                    position.record + done,
                    0 if done else begin,
                    position.documents + done,
                    position.left_out,
                )
                if buffer.is_full:
                    yield (*buffer.empty(), last)
        if watch is not None:
            watch(state)
    if buffer.used:
        yield (*buffer.empty(), last)


def _encoded(
    encoder: Encoder,
    texts: Sequence[str],
    positions: Sequence[Position],
    files: Sequence[DocumentFile],
    state: BuildState,
) -> list[TokenArray]:
    """Ids of each text; empty for a text that the tokenizer cannot encode."""
    try:
        return encoder.encode(texts)
    except Exception:
        if len(texts) == 1:
            position = positions[0]
            state.report.documents -= 1
            state.report.skip(f"{files[position.file].path}, document {position.record}", "not tokenised")
            return [np.empty(0, np.int32)]
    middle = len(texts) // 2
    return [
        tokens
        for part in (slice(middle), slice(middle, None))
        for tokens in _encoded(encoder, texts[part], positions[part], files, state)
    ]


def _batches(
    files: Sequence[DocumentFile], options: BuildOptions, start: Position, state: BuildState
) -> Iterator[tuple[list[str], list[Position]]]:
    """Documents, enough at a time to keep the tokenizer's threads busy."""
    texts: list[str] = []
    positions: list[Position] = []
    characters = 0
    taken = start.documents
    for number, file in enumerate(files):
        if number < start.file:
            state.done_bytes += file.nbytes
            continue
        state.file = number + 1
        state.file_bytes, state.file_characters = file.nbytes, state.report.characters
        first = start.record if number == start.file else 0
        offset = start.offset if number == start.file else 0
        before = state.report.left_out()
        found = read_documents(file, state.report, text_column=options.text_column, start=first)
        while (document := _next(found, file, state.report)) is not None:
            record, text = document
            if taken < options.skip:
                taken += 1
                continue
            texts.append(text)
            positions.append(Position(number, record, offset if record == first else 0, taken, before))
            taken += 1
            characters += len(text)
            if characters >= _BATCH_CHARACTERS or len(texts) == _BATCH_TEXTS:
                yield texts, positions
                texts, positions, characters = [], [], 0
            if options.limit is not None and taken - options.skip >= options.limit:
                break
        state.done_bytes += file.nbytes
        state.file_bytes = 0
        if options.limit is not None and taken - options.skip >= options.limit:
            break
    if texts:
        yield texts, positions


def _next(
    documents: Iterator[tuple[int, str]], file: DocumentFile, report: ReadReport
) -> tuple[int, str] | None:
    """The next document of a file; None at its end, and where it has no column with text."""
    try:
        return next(documents, None)
    except NoTextColumnError as error:
        report.skip(file.path, NO_TEXT)
        report.no_column = report.no_column or error.message
        return None


class _Buffer:
    """Texts of one run while it is filled."""

    def __init__(self, size: int, vocabulary: int) -> None:
        self._size = size
        self._end = vocabulary
        self._dtype = text_dtype(vocabulary)
        self._array: NDArray[Any] = np.empty(size, self._dtype)
        self._starts: list[int] = []
        self.used = 0

    @property
    def is_full(self) -> bool:
        """True if fewer than two slots are left, of which the separator takes one."""
        return self.used + 1 >= self._size

    def take(self, tokens: TokenArray) -> int:
        """Copies as much of a text as there is room for, and ends it."""
        count = min(len(tokens), self._size - self.used - 1)
        self._starts.append(self.used)
        self._array[self.used : self.used + count] = tokens[:count]
        self._array[self.used + count] = self._end
        self.used += count + 1
        return count

    def empty(self) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Returns its contents and empties it."""
        filled = self._array[: self.used], np.array(self._starts, np.int32)
        self._array = np.empty(self._size, self._dtype)
        self._starts = []
        self.used = 0
        return filled
