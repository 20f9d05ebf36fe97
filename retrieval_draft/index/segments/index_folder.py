"""A folder of segments and the manifest that lists the valid ones."""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from retrieval_draft._files import expanded, file_checksum, read_bounded, replace_file, sync_folder
from retrieval_draft.errors import DatastoreError, TokenizerMismatchError
from retrieval_draft.index.segments.segment import MAX_TOKENS, Segment, map_array, save_array, text_dtype

__all__ = ["FORMAT_VERSION", "KIND", "MANIFEST", "IndexFolder", "Manifest", "RunEntry", "SegmentEntry"]

KIND = "retrieval_draft index"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_LOCK = ".lock"
_PREFIX = "segment-"
_RUN = "run-"

MAX_MANIFEST_BYTES = 1 << 26
"""Largest size of a manifest or journal: a hundred thousand segments."""

_AGAIN = "Restore it from a copy, or build the index again."

_FILES = frozenset(f"{name}.npy" for name in ("tokens", "suffixes", "documents", "samples"))
_HEX = r"[0-9a-f]{16}"


class SegmentEntry(msgspec.Struct, frozen=True):
    """One segment in a manifest.

    Attributes:
        name: Its folder.
        tokens: Tokens, separators not counted.
        documents: Texts.
        separator: The value between texts.
        bits: Bits of a token in a sort key.
        files: For each file its bytes and xxh3 checksum.
    """

    name: str
    tokens: int
    documents: int
    separator: int
    bits: int
    files: dict[str, dict[str, Any]]

    def check(self, where: object) -> None:
        """Checks that every name and number is one that `IndexFolder.write` can have written.

        Args:
            where: The file that holds it, for the message.

        Raises:
            DatastoreError: Names the found and the allowed value.
        """
        _check_name(where, self.name, _PREFIX)
        _check_number(where, f"{self.name}: tokens", self.tokens, 0, MAX_TOKENS)
        _check_number(where, f"{self.name}: documents", self.documents, 0, MAX_TOKENS)
        _check_number(where, f"{self.name}: separator", self.separator, 0, 2**31)
        _check_number(where, f"{self.name}: bits", self.bits, 16, 32)
        if self.files.keys() != _FILES:
            raise _foreign(where, f"{self.name}: files", sorted(self.files), ", ".join(sorted(_FILES)))
        for name, file in self.files.items():
            _check_number(where, f"{self.name}/{name}: bytes", file.get("bytes"), 0, 2**40)
            checksum = file.get("xxh3")
            if not isinstance(checksum, str) or not re.fullmatch(r"[0-9a-f]{32}", checksum):
                raise _foreign(where, f"{self.name}/{name}: xxh3", checksum, "32 hexadecimal digits")


class RunEntry(msgspec.Struct, frozen=True):
    """Texts of an unfinished build, not sorted yet.

    Attributes:
        name: Its folder.
        tokens: Tokens, separators not counted.
        documents: Texts.
    """

    name: str
    tokens: int
    documents: int

    def check(self, where: object) -> None:
        """Checks the entry as `SegmentEntry.check` does, by the rules of `IndexFolder.write_run`."""
        _check_name(where, self.name, _RUN)
        _check_number(where, f"{self.name}: tokens", self.tokens, 0, MAX_TOKENS)
        _check_number(where, f"{self.name}: documents", self.documents, 0, MAX_TOKENS)


class Manifest(msgspec.Struct, kw_only=True):
    """Contents of an index's manifest.json.

    Attributes:
        kind: Always `KIND`.
        format_version: Of the folder's layout.
        fingerprint: Of the tokenizer; empty where there is none.
        vocabulary_size: Number of token ids.
        segments: Oldest first.
        tokenizer: Name of the tokenizer, as given when the index was built.
        library_version: Version that wrote it.
        created: UTC.
        changed: UTC.
        xxh3: Of the manifest itself, without this field.
    """

    kind: str
    format_version: int
    fingerprint: str
    vocabulary_size: int
    segments: list[SegmentEntry]
    tokenizer: str = ""
    library_version: str = ""
    created: str = ""
    changed: str = ""
    xxh3: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return sum(entry.tokens for entry in self.segments)

    @property
    def documents(self) -> int:
        """Texts of all segments."""
        return sum(entry.documents for entry in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all files of all segments."""
        return sum(int(file["bytes"]) for entry in self.segments for file in entry.files.values())


class IndexFolder:
    """An index on disk. Segments in the manifest are complete; anything else is left over and ignored.

    Args:
        path: The folder.
        manifest: Its manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(cls, path: Path, fingerprint: str, vocabulary_size: int, tokenizer: str = "") -> IndexFolder:
        """Makes an empty index, or opens an existing one.

        Raises:
            DatastoreError: The folder holds other things, or cannot be written.
            TokenizerMismatchError: The index there belongs to another tokenizer.
        """
        path = expanded(path)
        if (path / MANIFEST).exists():
            index = cls.open(path)
            index.check(fingerprint, vocabulary_size)
            return index
        if path.exists() and not path.is_dir():
            raise DatastoreError(f"{path} is a file; an index is a folder.", "Name another folder.")
        if path.is_dir() and any(not _is_ours(each.name) for each in path.iterdir()):
            raise DatastoreError(
                f"{path} holds other files and no {MANIFEST}.", "Name an empty folder, or a new one."
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatastoreError(
                f"Cannot make the folder {path}: {error.strerror or error}.",
                "Name a folder that can be written.",
            ) from error
        now = _now()
        manifest = Manifest(
            kind=KIND,
            format_version=FORMAT_VERSION,
            fingerprint=fingerprint,
            vocabulary_size=vocabulary_size,
            segments=[],
            tokenizer=tokenizer,
            created=now,
        )
        index = cls(path, manifest)
        index.publish([])
        return index

    @classmethod
    def open(cls, path: Path) -> IndexFolder:
        """Reads the manifest and nothing else.

        Raises:
            DatastoreError: No index, a torn or altered manifest, or an unknown format version.
        """
        path = expanded(path)
        return cls(path, _read_manifest(path / MANIFEST))

    def reload(self) -> None:
        """Reads the manifest again: another process may have changed it before the lock was taken."""
        self.manifest = _read_manifest(self.path / MANIFEST)

    def check(self, fingerprint: str, vocabulary_size: int) -> None:
        """Refuses another tokenizer.

        Raises:
            TokenizerMismatchError: Names both tokenizers.
        """
        mine = self.manifest
        if mine.fingerprint != fingerprint or mine.vocabulary_size != vocabulary_size:
            raise TokenizerMismatchError(
                f"The index {self.path} is for the tokenizer {mine.tokenizer or 'of its model'} "
                f"(fingerprint {mine.fingerprint}, {mine.vocabulary_size} ids); this one has fingerprint "
                f"{fingerprint} and {vocabulary_size} ids.",
                "Build an index with this tokenizer: retrieval-draft index build ... --tokenizer.",
            )

    def segments(self) -> tuple[Segment, ...]:
        """Maps every segment; oldest first.

        Raises:
            DatastoreError: A file is missing or torn.
        """
        return tuple(self.open_segment(entry) for entry in self.manifest.segments)

    def open_segment(self, entry: SegmentEntry) -> Segment:
        """Maps one segment.

        Raises:
            DatastoreError: A file is missing or torn, or the manifest disagrees with the files.
        """
        entry.check(self.path / MANIFEST)
        folder = self.path / entry.name
        vocabulary = self.manifest.vocabulary_size
        if entry.separator != vocabulary and not (vocabulary == 2**16 and entry.separator < vocabulary):
            raise DatastoreError(
                f"The manifest says that {folder} has the separator {entry.separator}; for {vocabulary} ids "
                f"it is {vocabulary}.",
                _AGAIN,
            )
        sizes = {name: int(file["bytes"]) for name, file in entry.files.items()}
        segment = Segment.open(folder, entry.separator, entry.bits, sizes)
        if (segment.num_tokens, segment.num_documents) != (entry.tokens, entry.documents):
            raise DatastoreError(
                f"The manifest says that {folder} has {entry.tokens} tokens in {entry.documents} texts; its "
                f"files hold {segment.num_tokens} in {segment.num_documents}.",
                _AGAIN,
            )
        return segment

    def write(self, segment: Segment) -> SegmentEntry:
        """Writes a segment's files. The segment is part of the index only after `publish`.

        Raises:
            DatastoreError: The disk is full or the folder cannot be written; no files are left.
        """
        name = f"{_PREFIX}{uuid.uuid4().hex[:16]}"
        with self._new_folder(name) as folder:
            files = segment.write(folder)
        return SegmentEntry(
            name=name,
            tokens=segment.num_tokens,
            documents=segment.num_documents,
            separator=segment.separator,
            bits=segment.bits,
            files=files,
        )

    def write_run(self, texts: NDArray[Any], documents: NDArray[np.int32]) -> RunEntry:
        """Keeps texts that are not sorted yet, for an interrupted build to find.

        Args:
            texts: As `Segment.join` takes them.
            documents: int32, shape (texts,). Start index of each.

        Raises:
            DatastoreError: The disk is full or the folder cannot be written; no files are left.
        """
        name = f"{_RUN}{uuid.uuid4().hex[:16]}"
        with self._new_folder(name) as folder:
            folder.mkdir()
            for part, array in (("tokens", texts), ("documents", documents)):
                save_array(folder / f"{part}.npy", array)
        return RunEntry(name=name, tokens=len(texts) - len(documents), documents=len(documents))

    def read_run(self, entry: RunEntry) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Maps the arrays that `write_run` wrote.

        Raises:
            DatastoreError: A file is missing, torn, or was altered.
        """
        entry.check(self.path)
        folder = self.path / entry.name
        tokens, documents = (map_array(folder / f"{part}.npy") for part in ("tokens", "documents"))
        found = (tokens.dtype, documents.dtype, len(tokens), len(documents))
        kind = np.dtype(text_dtype(self.manifest.vocabulary_size))
        expected = (kind, np.dtype(np.int32), entry.tokens + entry.documents, entry.documents)
        if found != expected:
            raise DatastoreError(
                f"{folder} holds texts of {found[0]} and {found[1]}, lengths {found[2]} and {found[3]}; "
                f"expected {expected[0]}, {expected[1]}, {expected[2]} and {expected[3]}.",
                "Remove the folder, and run the same command again.",
            )
        return tokens, documents

    @contextmanager
    def _new_folder(self, name: str) -> Iterator[Path]:
        """A temporary path for a folder, which is renamed when it is complete."""
        unfinished = self.path / f"{name}.tmp"
        try:
            yield unfinished
            sync_folder(unfinished)
            unfinished.rename(self.path / name)
            sync_folder(self.path)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise DatastoreError(
                f"Cannot write to {self.path}: {error.strerror or error}.",
                "Free space or permit writing, and run the same command again: what is finished is kept.",
            ) from error

    def publish(self, segments: Sequence[SegmentEntry]) -> None:
        """Makes `segments` the index, atomically: before that readers see the old one.

        Raises:
            DatastoreError: It cannot be written; the old index stays.
        """
        manifest = msgspec.structs.replace(
            self.manifest, segments=list(segments), changed=_now(), library_version=_version(), xxh3=""
        )
        manifest.xxh3 = _own_checksum(manifest)
        try:
            replace_file(self.path / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        except OSError as error:
            raise DatastoreError(
                f"Cannot write {self.path / MANIFEST}: {error.strerror or error}.",
                "Free space or permit writing; the index is as it was.",
            ) from error
        self.manifest = manifest

    def sweep(self, keep: Sequence[str] = ()) -> None:
        """Removes segment folders that neither the manifest nor `keep` names. Needs the lock."""
        named = {entry.name for entry in self.manifest.segments} | set(keep)
        for path in (*self.path.glob(f"{_PREFIX}*"), *self.path.glob(f"{_RUN}*")):
            if path.name not in named:
                # One by one: a segment's folder holds files only, and anything else in it is not ours.
                with suppress(OSError):
                    for file in path.iterdir():
                        file.unlink()
                    path.rmdir()

    def verify(self) -> list[str]:
        """Compares every file with its checksum.

        Returns:
            A line for each faulty file; empty if there is none.
        """
        found = []
        for entry in self.manifest.segments:
            for name, expected in entry.files.items():
                path = self.path / entry.name / name
                try:
                    size, checksum = path.stat().st_size, file_checksum(path)
                except OSError as error:
                    found.append(f"{path} cannot be read: {error.strerror}")
                    continue
                if size != expected["bytes"]:
                    found.append(f"{path} is torn: found {size} bytes, expected {expected['bytes']}")
                elif checksum != expected["xxh3"]:
                    found.append(f"{path} was altered: found xxh3 {checksum}, expected {expected['xxh3']}")
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the index for changes by this process; readers need no lock.

        Raises:
            DatastoreError: Another process has the lock, or the folder cannot be written.
        """
        lock = FileLock(str(self.path / _LOCK))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise DatastoreError(
                f"{self.path} is being changed by another process.", "Wait until it is done."
            ) from error
        except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
            raise DatastoreError(
                f"Cannot lock {self.path}: {getattr(error, 'strerror', None) or error}.",
                "Permit writing there; reading needs no lock.",
            ) from error
        try:
            yield
        finally:
            lock.release()


def _read_manifest(path: Path) -> Manifest:
    try:
        content = read_bounded(path, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatastoreError(
            f"There is no index in {path.parent}: {path.name} is missing.",
            "Build one: retrieval-draft index build PATH... --tokenizer T --out DIR.",
        ) from error
    except (OSError, ValueError) as error:
        raise DatastoreError(
            f"{path} cannot be read: {error}.", "Permit reading, or name another."
        ) from error
    return parse_manifest(content, path)


def parse_manifest(content: bytes, path: object) -> Manifest:
    """Reads a manifest.

    Args:
        content: The file's.
        path: Its name, for messages.

    Raises:
        DatastoreError: It is torn, altered, or of an unknown format version.
    """
    try:
        header = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DatastoreError(f"{path} is torn: found {error}, expected JSON.", _AGAIN) from error
    if not isinstance(header, dict) or header.get("kind") != KIND:
        found = header.get("kind") if isinstance(header, dict) else type(header).__name__
        raise DatastoreError(
            f"{path} is not the manifest of an index: found kind {found!r}, expected {KIND!r}.",
            "Name the folder that index build wrote.",
        )
    if header.get("format_version") != FORMAT_VERSION:
        raise DatastoreError(
            f"{path} has format version {header.get('format_version')}; this version of retrieval_draft "
            f"reads {FORMAT_VERSION}.",
            "Update retrieval_draft, or build the index again.",
        )
    try:
        manifest = msgspec.convert(header, Manifest)
    except msgspec.ValidationError as error:
        raise DatastoreError(f"{path} was altered: {error}.", _AGAIN) from error
    expected = _own_checksum(manifest)
    if manifest.xxh3 != expected:
        raise DatastoreError(
            f"{path} was altered: found checksum {manifest.xxh3}, expected {expected}.", _AGAIN
        )
    _check_number(path, "vocabulary_size", manifest.vocabulary_size, 1, 2**31 - 1)
    for entry in manifest.segments:
        entry.check(path)
    return manifest


def _foreign(where: object, what: str, found: object, allowed: str) -> DatastoreError:
    return DatastoreError(f"{where}: {what} is {repr(found)[:80]}; it must be {allowed}.", _AGAIN)


def _check_name(where: object, name: str, prefix: str) -> None:
    if not re.fullmatch(prefix + _HEX, name):
        raise _foreign(where, "a folder's name", name, f"{prefix} and 16 hexadecimal digits")


def _check_number(where: object, what: str, number: object, least: int, most: int) -> None:
    if type(number) is not int or not least <= number <= most:
        raise _foreign(where, what, number, f"a number in {least}..{most}")


def _own_checksum(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(manifest, xxh3="")))


def _is_ours(name: str) -> bool:
    return name.startswith((_PREFIX, _RUN, MANIFEST, _LOCK, "journal."))


def _version() -> str:
    try:
        return metadata.version("retrieval_draft")
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        return ""


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
