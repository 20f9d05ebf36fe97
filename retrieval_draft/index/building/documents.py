"""What a user names on the command line, as documents."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.building._formats import (
    BadContentError,
    open_bytes,
    read_columns,
    read_lines,
    read_text,
)
from retrieval_draft.index.index_folder import KIND

__all__ = ["DocumentFile", "ReadReport", "find_files", "read_documents"]

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_PACKED = (".gz", ".zst")
_LEFT_OUT = {"__pycache__", "node_modules"}
_NAMED = 20


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A file to read.

    Attributes:
        path: Absolute; "-" for stdin.
        kind: text, jsonl, parquet or arrow.
        nbytes: Its size; 0 for stdin.
    """

    path: str
    kind: str
    nbytes: int


@dataclass(slots=True)
class ReadReport:
    """What was read, and what was left out and why.

    Attributes:
        documents: Texts read.
        characters: Of those texts.
        skipped: Files and records left out.
        reasons: How many for which reason.
        named: The first 20, as "path: reason".
    """

    documents: int = 0
    characters: int = 0
    skipped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def skip(self, where: str, reason: str) -> None:
        """Counts and names something that is left out."""
        self.skipped += 1
        self.reasons[reason] += 1
        if len(self.named) < _NAMED:
            self.named.append(f"{where}: {reason}")

    def merge(self, other: ReadReport) -> None:
        """Adds what another reader saw."""
        self.documents += other.documents
        self.characters += other.characters
        self.skipped += other.skipped
        self.reasons.update(other.reasons)
        self.named = (self.named + other.named)[:_NAMED]


def find_files(
    paths: Sequence[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[DocumentFile]:
    """Files below some paths, in an order that is the same on every machine.

    Args:
        paths: Files, folders, globs, or "-" for stdin. Folders are walked; hidden files, caches and indexes
            of ours in them are left out.
        include: Globs for the path below a walked folder, or the file's name; one must match.
        exclude: The same; none may match.

    Raises:
        InvalidInputError: A path does not exist, or there is no file at all.
    """
    found: dict[str, DocumentFile] = {}
    for path in paths:
        if path == "-":
            found["-"] = DocumentFile("-", "text", 0)
            continue
        place = Path(path).expanduser()
        if place.exists():
            places = [place]
        else:
            places = [Path(each) for each in sorted(glob.glob(str(place), recursive=True))]  # noqa: PTH207
            if not places:
                raise InvalidInputError(
                    f"There is no {path}.", "Name a file, a folder, a glob, or - for stdin."
                )
        for each in places:
            for file in _walk(each, include, exclude) if each.is_dir() else [each]:
                whole = str(file.resolve())
                if whole not in found:
                    found[whole] = DocumentFile(whole, _kind(file), file.stat().st_size)
    if not found:
        raise InvalidInputError(
            f"There is no file to read in {', '.join(paths) or 'nothing'}.",
            "Look at --include and --exclude.",
        )
    return list(found.values())


def read_documents(
    file: DocumentFile, report: ReadReport, *, text_column: str = "text", start: int = 0
) -> Iterator[tuple[int, str]]:
    """Reads a file's documents, whatever its size in bounded memory.

    What cannot be read is counted, named and left out; what came before it stays.

    Args:
        file: From `find_files`.
        report: Counts are added to it.
        text_column: Field or column with the text; a dot reaches into an object.
        start: Documents to pass over. Numbers count what is yielded, so reading with ``start=n`` goes on
            behind the n-th document.

    Yields:
        A document's number, from 0, and its text.

    Raises:
        InvalidInputError: The column is missing in a table, or in all of the first 1,000 records; or a
            package that reads the format is missing.
    """
    number = 0
    for text in _texts(file, report, text_column):
        if not text.strip():
            report.skip(file.path, "empty")
            continue
        if number >= start:
            report.documents += 1
            report.characters += len(text)
            yield number, text
        number += 1


def _texts(file: DocumentFile, report: ReadReport, text_column: str) -> Iterator[str]:
    try:
        if file.kind in ("parquet", "arrow"):
            yield from read_columns(file.path, file.kind, text_column)
            return
        with open_bytes(file.path) as stream:
            head = stream.peek(1 << 13)
            if b"\0" in head[: 1 << 13]:
                report.skip(file.path, "binary")
                return
            if file.kind == "jsonl" or (file.path == "-" and _is_record(head)):
                yield from read_lines(stream, file.path, text_column, report.skip)
            else:
                yield from read_text(stream)
    except BadContentError as error:
        report.skip(file.path, str(error))
    except (PermissionError, FileNotFoundError, IsADirectoryError):
        report.skip(file.path, "unreadable")
    except OSError as error:
        report.skip(file.path, "unreadable" if error.errno else "torn")
    except EOFError:
        report.skip(file.path, "torn")


def _is_record(head: bytes) -> bool:
    """Whether the first line is a JSON object."""
    line = head.lstrip().split(b"\n", 1)[0]
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _walk(folder: Path, include: Sequence[str], exclude: Sequence[str]) -> Iterator[Path]:
    """Files below a folder, sorted; links to folders are not followed, so there are no cycles."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        tables = _saved_dataset(here)
        if tables is not None:
            folders.clear()
            yield from tables
            continue
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name not in _LEFT_OUT and not _is_index(here / name)
        )
        if _is_index(here):
            folders.clear()
            continue
        for name in sorted(names):
            file = here / name
            below = file.relative_to(folder).as_posix()
            if name.startswith(".") or not file.is_file():
                continue
            if include and not _matches(below, include):
                continue
            if not _matches(below, exclude):
                yield file


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
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def _saved_dataset(folder: Path) -> list[Path] | None:
    """The tables of a folder that ``datasets.save_to_disk`` wrote, in order; None for another folder."""
    splits = folder / "dataset_dict.json"
    state = folder / "state.json"
    try:
        if splits.is_file():
            names = json.loads(splits.read_bytes())["splits"]
            parts = [_saved_dataset(folder / str(name)) for name in names]
            return [file for part in parts if part for file in part]
        if state.is_file() and (folder / "dataset_info.json").is_file():
            files = json.loads(state.read_bytes())["_data_files"]
            return [folder / str(each["filename"]) for each in files]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _kind(file: Path) -> str:
    name = file.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    if name.endswith(_JSON_LINES):
        return "jsonl"
    return {".parquet": "parquet", ".arrow": "arrow"}.get(file.suffix.lower(), "text")
