"""Documents in the paths that a user names on the command line."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from retrieval_draft._files import expanded
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.build._content import BadContentError, check_regular, open_content
from retrieval_draft.index.build._formats import (
    NO_TEXT,
    NoTextColumnError,
    Texts,
    is_binary,
    parse_json,
    read_columns,
    read_lines,
    read_text,
)
from retrieval_draft.index.segments.index_folder import KIND

__all__ = ["NO_TEXT", "DocumentFile", "NoTextColumnError", "ReadReport", "find_files", "read_documents"]

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_LEFT_OUT = {"__pycache__", "node_modules"}
_NAMED = 20
_MAX_JSON = 1 << 26


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A file to read.

    Attributes:
        path: Absolute; "-" for stdin.
        kind: text, json, jsonl, parquet or arrow.
        nbytes: Its size; 0 for a stream.
        is_stream: Whether it is stdin, a pipe or a device, which can be read once.
    """

    path: str
    kind: str
    nbytes: int
    is_stream: bool = False


class ReadReport(msgspec.Struct):
    """Counts of documents read and skipped, with reasons.

    Attributes:
        documents: Texts read.
        characters: Of those texts.
        skipped: Files and records left out.
        reasons: Number of skipped items by reason.
        named: The first 20, as "path, line 3: reason".
        no_column: Message about the first file that lacks the column; empty without one.
    """

    documents: int = 0
    characters: int = 0
    skipped: int = 0
    reasons: dict[str, int] = {}
    named: list[str] = []
    no_column: str = ""

    def skip(self, where: str, reason: str) -> None:
        """Counts and lists a skipped item."""
        self.skipped += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.named) < _NAMED:
            # Names of files may be bytes that are no text; messages must be text.
            self.named.append(f"{where}: {reason}".encode("utf-8", "backslashreplace").decode())

    def merge(self, other: ReadReport) -> None:
        """Adds the counts of another reader."""
        self.documents += other.documents
        self.characters += other.characters
        self.skipped += other.skipped
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.named = (self.named + other.named)[:_NAMED]
        self.no_column = self.no_column or other.no_column

    def left_out(self) -> ReadReport:
        """A copy with the skipped items only."""
        return ReadReport(0, 0, self.skipped, dict(self.reasons), list(self.named), self.no_column)


def find_files(
    paths: Sequence[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    report: ReadReport | None = None,
) -> list[DocumentFile]:
    """Files below some paths, in an order that is the same on every machine.

    Args:
        paths: Files, pipes, folders, globs, or "-" for stdin. Folders are walked; hidden files, caches and
            indexes of ours in them are left out, and links to folders are not followed.
        include: Globs for the path below a walked folder, or the file's name; one must match.
        exclude: The same; none may match.
        report: Unreadable files are counted in it.

    Raises:
        InvalidInputError: A path does not exist, or there is no file at all.
    """
    report = ReadReport() if report is None else report
    found: dict[str, DocumentFile] = {}
    for path in paths:
        if path == "-":
            found["-"] = DocumentFile("-", "text", 0, is_stream=True)
            continue
        root = expanded(path)
        named = _status(root)
        roots = [root]
        if named is None:
            roots = [Path(each) for each in sorted(glob.glob(str(root), recursive=True))]  # noqa: PTH207
            if not roots:
                raise InvalidInputError(
                    f"There is no {path}.", "Name a file, a folder, a glob, or - for stdin."
                )
        for each in roots:
            at = _status(each)
            is_folder = at is not None and stat.S_ISDIR(at.st_mode)
            for file in _walk(each, include, exclude, report) if is_folder else [each]:
                status = _status(file)
                if status is None:
                    report.skip(str(file), "unreadable")
                elif stat.S_ISREG(status.st_mode):
                    whole = str(file.resolve())
                    found.setdefault(whole, DocumentFile(whole, _kind(file), status.st_size))
                elif named is not None and file == root:
                    # Not resolved: the target of a pipe's name in /dev/fd has no path.
                    whole = str(file.absolute())
                    found[whole] = DocumentFile(whole, _kind(file), 0, is_stream=True)
                else:
                    report.skip(str(file), "no regular file")
    if not found:
        left_out = f" Left out: {'; '.join(report.named[:3])}." if report.named else ""
        raise InvalidInputError(
            f"There is no file to read in {', '.join(paths) or 'nothing'}.{left_out}",
            "Look at --include and --exclude.",
        )
    return list(found.values())


def _status(path: Path) -> os.stat_result | None:
    """Status of a file; None where it does not exist or may not be read."""
    try:
        return path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None


def read_documents(
    file: DocumentFile, report: ReadReport, *, text_column: str = "text", start: int = 0
) -> Iterator[tuple[int, str]]:
    """Reads a file's documents in bounded memory.

    Unreadable parts are counted, listed and skipped; the parts before and after them are read.

    Args:
        file: From `find_files`.
        report: Counts are added to it.
        text_column: Field or column with the text; a dot reaches into an object.
        start: Documents to skip. Numbers count the yielded documents, so reading with ``start=n`` continues
            after the n-th document.

    Yields:
        A document's number, from 0, and its text, which is valid Unicode.

    Raises:
        NoTextColumnError: The column is missing in a table, or in all of the first 1,000 records.
        InvalidInputError: A package that reads the format is missing.
    """
    number = 0
    skipped = report.skipped
    for where, text in _texts(file, report, text_column):
        why = _why_not(text)
        if why:
            report.skip(f"{file.path}, {where}" if where else file.path, why)
            continue
        if number >= start:
            report.documents += 1
            report.characters += len(text)
            yield number, text
        number += 1
    if not number and report.skipped == skipped:
        report.skip(file.path, "empty")


def _why_not(text: str) -> str:
    """Reason that a text cannot be indexed; empty if it can."""
    if not text.strip():
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half a surrogate pair"
    return ""


def _texts(file: DocumentFile, report: ReadReport, text_column: str) -> Texts:
    def skip(where: str, why: str) -> None:
        report.skip(f"{file.path}, {where}" if where else file.path, why)

    try:
        if file.kind in ("parquet", "arrow"):
            check_regular(file.path)
            yield from read_columns(file.path, file.kind, text_column, skip)
            return
        with open_content(file.path, file.is_stream) as content:
            if file.kind in ("json", "jsonl") or (file.is_stream and _is_record(content.head)):
                yield from read_lines(content, file.path, file.kind == "json", text_column, skip)
            elif is_binary(content.head[: 1 << 13]):
                skip("", "binary")
                return
            else:
                yield from read_text(content, skip)
            if content.why:
                skip("", content.why)
    except BadContentError as error:
        skip("", str(error))
    except OSError:
        skip("", "unreadable")


def _is_record(head: bytes) -> bool:
    """True if the first line is a JSON object, or, where it is longer than `head`, begins like one."""
    line, end, _ = head.lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(parse_json(line), dict)
    except BadContentError:
        return not end and len(head) >= 1 << 16 and line.startswith(b'{"')


def _walk(folder: Path, include: Sequence[str], exclude: Sequence[str], report: ReadReport) -> Iterator[Path]:
    """Files in and below a folder, sorted; links to folders are not followed, so there are no cycles."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        if _is_index(here):
            continue
        tables = _saved_dataset(here, report)
        if tables is not None:
            yield from tables
            continue
        try:
            with os.scandir(here) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError:
            report.skip(str(here), "unreadable")
            continue
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            file = here / entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in _LEFT_OUT:
                    folders.append(file)
            elif not _is_folder(entry):
                below = file.relative_to(folder).as_posix()
                if (not include or _matches(below, include)) and not _matches(below, exclude):
                    yield file
        waiting += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _matches(below: str, globs: Sequence[str]) -> bool:
    name = below.rsplit("/", 1)[-1]
    for each in globs:
        plain = each.removeprefix("**/")
        if fnmatch.fnmatch(below, each) or fnmatch.fnmatch(below, plain) or fnmatch.fnmatch(name, each):
            return True
        if fnmatch.fnmatch(f"{below}/", f"{each.rstrip('/')}/*"):
            return True
    return False


def _is_index(folder: Path) -> bool:
    manifest = _small_json(folder / "manifest.json")
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def _small_json(path: Path) -> Any:
    """The value in a JSON file that describes a folder; None where there is none or it is none."""
    try:
        with open_content(str(path)) as content:
            return parse_json(content.read(_MAX_JSON))
    except (OSError, BadContentError):
        return None


def _saved_dataset(folder: Path, report: ReadReport) -> list[Path] | None:
    """The tables of a folder that ``datasets.save_to_disk`` wrote, in order; None for another folder."""
    splits = _small_json(folder / "dataset_dict.json")
    names = splits.get("splits") if isinstance(splits, dict) else None
    if not isinstance(names, list):
        return _saved_split(folder, report)
    parts = [_saved_split(folder / name, report) for name in _plain(names, folder, report)]
    return [file for part in parts if part for file in part]


def _saved_split(folder: Path, report: ReadReport) -> list[Path] | None:
    state = _small_json(folder / "state.json")
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list) or _status(folder / "dataset_info.json") is None:
        return None
    names = [each.get("filename") if isinstance(each, dict) else None for each in files]
    return [folder / name for name in _plain(names, folder, report)]


def _plain(names: Sequence[object], folder: Path, report: ReadReport) -> Iterator[str]:
    """The names, as found in a file, that are plain names of files in its folder."""
    for name in names:
        if isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name:
            yield name
        else:
            report.skip(f"{folder}, {str(name)[:100]!r}", "not in its folder")


def _kind(file: Path) -> str:
    name = file.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    kind = _KINDS.get(Path(name).suffix, "text")
    is_table = kind in ("parquet", "arrow")
    return "text" if is_table and file.suffix.lower() in _PACKED else kind
