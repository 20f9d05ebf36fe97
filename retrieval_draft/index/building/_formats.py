"""Readers of the formats that documents come in. All of them stream."""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from retrieval_draft.errors import InvalidInputError

__all__ = ["BadContentError", "open_bytes", "read_columns", "read_lines", "read_text"]

DOCUMENT_CHARACTERS = 1 << 20
"""A longer text becomes several documents, cut behind a line."""

LINE_BYTES = 1 << 26
SEARCHED = 1000
_BLOCK = 1 << 20
_ROWS = 1024


class BadContentError(Exception):
    """What is wrong with a file's content, in two or three words."""


@contextmanager
def open_bytes(path: str) -> Iterator[io.BufferedReader]:
    """A file's content, unpacked where its name says that it is packed; stdin for "-"."""
    if path == "-":
        yield io.BufferedReader(_Raw(sys.stdin.buffer), _BLOCK)
        return
    with open(path, "rb") as file:  # noqa: PTH123 (a str on purpose)
        if path.endswith(".gz"):
            with gzip.open(file) as packed:
                yield io.BufferedReader(_Raw(packed), _BLOCK)
        elif path.endswith(".zst"):
            unpack = _needed("zstandard", ".zst files").ZstdDecompressor()
            with unpack.stream_reader(file, read_across_frames=True) as packed:
                yield io.BufferedReader(_Raw(packed), _BLOCK)
        else:
            yield file


class _Raw(io.RawIOBase):
    """A packed stream as raw bytes; what is torn ends with BadContentError."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BadContentError("torn") from error
        except OSError:
            raise
        except Exception as error:  # zstandard's own, which cannot be named without it
            raise BadContentError("torn") from error
        buffer[: len(content)] = content
        return len(content)


def read_text(stream: io.BufferedReader) -> Iterator[str]:
    """Plain text, UTF-8 with or without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text = ""
    bad = False
    while not bad:
        block = stream.read(_BLOCK)
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # What came before the bad byte is text all the same.
            text += error.object[: error.start].decode("utf-8", "ignore")
            bad = True
        while len(text) > DOCUMENT_CHARACTERS:
            cut = text.rfind("\n", 0, DOCUMENT_CHARACTERS) + 1 or DOCUMENT_CHARACTERS
            yield text[:cut]
            text = text[cut:]
        if not block:
            break
    if text:
        yield text
    if bad:
        raise BadContentError("not UTF-8")


def read_lines(
    stream: io.BufferedReader, path: str, column: str, skip: Callable[[str, str], None]
) -> Iterator[str]:
    """JSON lines: objects of which one field is the text, or texts. A file that is one JSON value works."""
    first: dict[str, Any] | None = None
    seen = records = 0
    number = 0
    while line := stream.readline(LINE_BYTES + 1):
        number += 1
        where = f"{path}, line {number}"
        if len(line) > LINE_BYTES:
            skip(where, "line too long")
            while line and not line.endswith(b"\n"):
                line = stream.readline(LINE_BYTES)
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == 1:
                whole = _whole(line, stream)
                if whole is not None:
                    yield from _values(whole, path, column, skip)
                    return
            skip(where, "broken line")
            continue
        if number == 1 and isinstance(record, list):
            yield from _values(record, path, column, skip)
            continue
        seen += 1
        text = _text_of(record, column)
        if text is not None:
            records += 1
            yield text
            continue
        first = first or (record if isinstance(record, dict) else None)
        skip(where, "no text column")
        if seen == SEARCHED and not records:
            break
    if first is not None and not records:
        raise InvalidInputError(
            f"{path} has no field {column!r} with text; its records have {', '.join(map(repr, first))}.",
            "Name the field with --text-column.",
        )


def _whole(line: bytes, stream: io.BufferedReader) -> Any:
    """A file that is one JSON value over several lines, if it is and is not too long."""
    content = line + stream.read(LINE_BYTES)
    if stream.peek(1):
        return None
    try:
        return json.loads(content)
    except ValueError:
        return None


def _values(value: Any, path: str, column: str, skip: Callable[[str, str], None]) -> Iterator[str]:
    records = value if isinstance(value, list) else [value]
    found = [_text_of(record, column) for record in records]
    if records and all(text is None for text in found):
        yield json.dumps(value, ensure_ascii=False, indent=2)  # no records: the file itself is the text
        return
    for number, text in enumerate(found):
        if text is None:
            skip(f"{path}, record {number}", "no text column")
        else:
            yield text


def _text_of(record: Any, column: str) -> str | None:
    """A record's text: itself, or its field; lists of texts and of chat messages are joined by lines."""
    if isinstance(record, str):
        return record
    value = record
    for name in [column] if isinstance(record, dict) and column in record else column.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    if isinstance(value, list):
        parts = [part.get("content") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        return "\n".join(texts) if len(texts) == len(parts) else None
    return value if isinstance(value, str) else None


def read_columns(path: str, kind: str, column: str) -> Iterator[str]:
    """One column of a Parquet file or an Arrow stream, some rows at a time."""
    arrow = _needed("pyarrow", f"{kind} files")
    try:
        if kind == "parquet":
            file = _needed("pyarrow.parquet", "parquet files").ParquetFile(path)
            names = file.schema_arrow.names
            batches = file.iter_batches(
                _ROWS, columns=[column.split(".")[0] if column not in names else column]
            )
        else:
            mapped = arrow.memory_map(path)
            try:
                batches = arrow.ipc.open_stream(mapped)
            except arrow.ArrowInvalid:  # the file format instead of the stream format
                reader = arrow.ipc.open_file(mapped)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
                names = reader.schema.names
            else:
                names = batches.schema.names
        top = column if column in names else column.split(".")[0]
        if top not in names:
            raise InvalidInputError(
                f"{path} has no column {column!r}; it has {', '.join(map(repr, names))}.",
                "Name the column with --text-column.",
            )
        for batch in batches:
            for begin in range(0, batch.num_rows, _ROWS):
                for value in batch.column(top).slice(begin, _ROWS).to_pylist():
                    yield _text_of({top: value}, column) or ""
    except arrow.ArrowException as error:
        raise BadContentError("torn") from error
    except OSError as error:
        raise BadContentError("unreadable" if error.errno else "torn") from error


def _needed(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise InvalidInputError(
            f"Reading {what} needs the package {package}.",
            'Install it: pip install "retrieval_draft[corpus]".',
        ) from error
