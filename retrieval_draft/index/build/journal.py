"""Journal of an unfinished build, from which the same command resumes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import xxhash

from retrieval_draft._files import replace_file
from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.build.documents import DocumentFile, ReadReport
from retrieval_draft.index.segments.index_folder import Manifest, RunEntry, SegmentEntry

__all__ = ["Journal", "Position", "work_key"]

_NAME = "journal.json"


class Position(msgspec.Struct, frozen=True):
    """The next document to read.

    Attributes:
        file: Number of its file.
        record: Number of the document within it.
        offset: Tokens of it that are done already.
        documents: Documents taken before it.
        left_out: Items skipped in the files before that one.
    """

    file: int = 0
    record: int = 0
    offset: int = 0
    documents: int = 0
    left_out: ReadReport = msgspec.field(default_factory=ReadReport)


class Journal(msgspec.Struct, kw_only=True):
    """Finished but unpublished work of a build.

    Attributes:
        key: Digest of the work, see `work_key`.
        base: Names of the segments that the index had when the work began.
        runs: Texts that are read but not sorted, in order.
        segments: Texts that are sorted, which come before the runs.
        shards: For builds in shards, which are done: their number to the segments of each.
        position: The next document to read.
        all_read: Whether all documents are read.
        result: Names of the segments that are about to be published; empty before.
        is_published: Whether they were.
    """

    key: str
    base: list[str]
    runs: list[RunEntry] = msgspec.field(default_factory=list)
    segments: list[SegmentEntry] = msgspec.field(default_factory=list)
    shards: dict[int, list[SegmentEntry]] = msgspec.field(default_factory=dict)
    position: Position = Position()
    all_read: bool = False
    result: list[str] = msgspec.field(default_factory=list)
    is_published: bool = False

    @classmethod
    def load(cls, folder: Path, key: str, base: Sequence[str], manifest: Manifest) -> Journal:
        """The journal of the work `key`, or a new one where there is none or one of other work.

        Args:
            folder: The index.
            key: From `work_key`.
            base: Names of the segments that are to be kept.
            manifest: Of the index: shows whether a process ended between publishing and updating the journal.
        """
        try:
            found = msgspec.json.decode((folder / _NAME).read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            found = None
        published = [entry.name for entry in manifest.segments]
        if found is not None and found.key == key and found.result and found.result == published:
            return cls(key=key, base=list(base), is_published=True)
        whole = found is not None and found._is_whole(folder)
        if found is not None and whole and found.key == key and found.base == list(base):
            return found
        return cls(key=key, base=list(base))

    def _is_whole(self, folder: Path) -> bool:
        """True if its values are ones that `save` can have written, and all named folders exist."""
        try:
            for entry in self._entries:
                entry.check(folder / _NAME)
        except DatastoreError:
            return False
        position = self.position
        numbers = (position.file, position.record, position.offset, position.documents)
        sound = all(0 <= number < 2**63 for number in numbers)
        return sound and all((folder / name).is_dir() for name in self.names)

    @property
    def names(self) -> list[str]:
        """Folders of everything finished."""
        return [entry.name for entry in self._entries]

    @property
    def tokens(self) -> int:
        """Tokens of everything finished."""
        return sum(entry.tokens for entry in self._entries)

    @property
    def _entries(self) -> list[SegmentEntry | RunEntry]:
        shards = [entry for entries in self.shards.values() for entry in entries]
        return [*self.segments, *shards, *self.runs]

    def save(self, folder: Path) -> None:
        """Replaces the journal on disk."""
        replace_file(folder / _NAME, msgspec.json.encode(self))

    @staticmethod
    def exists(folder: Path) -> bool:
        """True if an interrupted build left one."""
        return (folder / _NAME).exists()

    @staticmethod
    def remove(folder: Path) -> None:
        """Removes the journal after the work is published."""
        (folder / _NAME).unlink(missing_ok=True)


def work_key(files: Sequence[DocumentFile], *settings: object) -> str:
    """A digest of files and settings; files count by path, size and time of change."""
    digest = xxhash.xxh3_128(repr(settings).encode())
    for file in files:
        changed = 0
        if not file.is_stream:
            with suppress(OSError):  # gone since it was found: reading it will report that
                changed = Path(file.path).stat().st_mtime_ns
        digest.update(
            f"{file.path}\0{file.kind}\0{file.nbytes}\0{changed}\n".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()
