"""Readers of document formats. All of them stream, and skip broken records."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.build._content import BLOCK, BadContentError, Content, needed

__all__ = [
    "NO_TEXT",
    "NoTextColumnError",
    "is_binary",
    "parse_json",
    "read_columns",
    "read_lines",
    "read_text",
]

DOCUMENT_CHARACTERS = 1 << 20
"""A longer text becomes several documents, cut after a line."""

LINE_BYTES = 1 << 26
SEARCHED = 1000
NO_TEXT = "no text column"
_ROWS = 1024
_SHOWN = 20

Texts = Iterator[tuple[str, str]]
"""Location of a text in its file, such as "line 3", and the text."""

Skip = Callable[[str, str], None]
"""Records a skipped item: its location in the file, and the reason."""


class NoTextColumnError(InvalidInputError):
    """A table, or a file of records, without the expected text field."""

    def __init__(self, path: str, column: str, names: Sequence[str]) -> None:
        shown = ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
        super().__init__(
            f"{path} has no field {column!r} with text; it has {shown or 'none'}.",
            "Name the field with --text-column.",
        )


def parse_json(content: bytes) -> Any:
    """One JSON value.

    Raises:
        BadContentError: It is none, or is nested deeper than Python follows.
    """
    try:
        try:
            return json.loads(content)
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise
        except ValueError:  # an integer of more digits than Python reads
            return json.loads(content, parse_int=float)
    except RecursionError as error:
        raise BadContentError("nested too deeply") from error
    except ValueError as error:
        raise BadContentError("broken line") from error


def read_text(content: Content, skip: Skip) -> Texts:
    """Plain text, UTF-8 with or without a byte order mark.

    A line that is not UTF-8, or holds NUL, is left out. Where most lines are, reading ends: the file is no
    text.

    Raises:
        BadContentError: Most lines are no text; earlier lines have been yielded.
    """
    text, rest, other = "", b"", ""
    lines = 0
    while not other:
        block = content.read(BLOCK)
        block += content.readline(BLOCK)
        if not block and content.why:
            break  # a character cut in two
        if not lines and not rest:
            block = block.removeprefix(codecs.BOM_UTF8)
        joined = rest + block
        try:
            piece, used = codecs.utf_8_decode(joined, "strict", not block)
        except UnicodeDecodeError:
            piece, used = "", len(joined)
        rest = joined[used:]
        if used and (not piece or "\0" in piece):
            piece, other = _good_lines(joined[:used], lines, skip)
        lines += joined.count(b"\n")
        text += piece
        while len(text) > DOCUMENT_CHARACTERS:
            cut = text.rfind("\n", 0, DOCUMENT_CHARACTERS) + 1 or DOCUMENT_CHARACTERS
            yield "", text[:cut]
            text = text[cut:]
        if not block:
            break
    if text:
        yield "", text
    if other:
        raise BadContentError(other)


def is_binary(head: bytes) -> bool:
    """True if most lines at the beginning of a file are no text, and some hold NUL."""
    lines = _split(head)
    return b"\0" in head and 2 * sum(bool(_why_bad(line)) for line in lines) > len(lines)


def _good_lines(block: bytes, before: int, skip: Skip) -> tuple[str, str]:
    """The lines that are text; or, where most are not, the part before the first bad byte, and the reason."""
    lines = _split(block)
    bad = {number: why for number, line in enumerate(lines) if (why := _why_bad(line))}
    if 2 * len(bad) > len(lines):
        first = min(bad)
        begun = lines[first].split(b"\0", 1)[0]
        try:
            begun.decode()
        except UnicodeDecodeError as error:
            begun = begun[: error.start]
        return b"".join([*lines[:first], begun]).decode(), bad[first]
    for number, why in bad.items():
        skip(f"line {before + number + 1}", why)
    return "".join(line.decode() for number, line in enumerate(lines) if number not in bad), ""


def _why_bad(line: bytes) -> str:
    try:
        line.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    return "binary" if b"\0" in line else ""


def _split(block: bytes) -> list[bytes]:
    lines = [line + b"\n" for line in block.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def read_lines(content: Content, path: str, is_json: bool, column: str, skip: Skip) -> Texts:
    """JSON lines: objects of which one field is the text, or texts. A file that is one JSON value works.

    Args:
        content: The file's.
        path: For messages.
        is_json: Whether one object on the only line is no record without a text, but a text itself.
        column: The field.
        skip: Records those that are left out.

    Raises:
        NoTextColumnError: None of the first 1,000 records has the field.
    """
    lines = _lines(content, 0, skip)
    number, line = next(lines, (0, b""))
    if not line:
        return
    try:
        value = parse_json(line)
    except BadContentError as error:
        # The first line of a value of many lines, or a broken one of many records.
        rest = content.read(LINE_BYTES)
        if not content.peek(1) and _is_json(line + rest):
            yield from _values(parse_json(line + rest), path, column, skip)
            return
        more = iter(partial(content.read, BLOCK), b"")
        if is_json and not _is_json(rest.split(b"\n", 1)[0]):
            # No value, and no lines of values: JSON with comments, or a torn value. It is read as text.
            yield from read_text(Content(chain((line, rest), more)), skip)
            return
        skip(f"line {number}", str(error))
        lines = _lines(Content(chain((rest,), more)), number, skip)
    else:
        second = next(lines, None)
        lines = lines if second is None else chain((second,), lines)
        if isinstance(value, list) or (is_json and second is None):
            yield from _values(value, path, column, skip)
        else:
            lines = chain(((number, line),), lines)
    yield from _picked(_records(lines, content, skip), path, column, skip)


def _lines(content: Content, before: int, skip: Skip) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, without blank ones and too long ones."""
    number = before
    while line := content.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            skip(f"line {number}", "line too long")
            while line and not line.endswith(b"\n"):
                line = content.readline(LINE_BYTES)
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def _records(lines: Iterator[tuple[int, bytes]], content: Content, skip: Skip) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        try:
            yield f"line {number}", parse_json(line)
        except BadContentError as error:
            if line.endswith(b"\n") or not content.why:  # else the error is reported for the file
                skip(f"line {number}", str(error))


def _is_json(content: bytes) -> bool:
    try:
        parse_json(content)
    except BadContentError:
        return False
    return True


def _values(value: Any, path: str, column: str, skip: Skip) -> Texts:
    """The records of one JSON value, or where there are none the value as text."""
    records = value if isinstance(value, list) else [value]
    if records and all(_text_of(record, column) is None for record in records):
        try:
            yield "", json.dumps(value, ensure_ascii=False, indent=2)
        except RecursionError:
            skip("", "nested too deeply")
        return
    numbered = ((f"record {number}", record) for number, record in enumerate(records))
    yield from _picked(numbered, path, column, skip, many=True)


def _picked(
    records: Iterator[tuple[str, Any]],
    path: str,
    column: str,
    skip: Skip,
    names: Sequence[str] = (),
    many: bool = False,
) -> Texts:
    """The texts of records.

    Args:
        records: Each with its location.
        path: For messages.
        column: The field.
        skip: Records those without a text.
        names: Fields to list in the error; those of the first record by default.
        many: Whether a record with the field was found before.

    Raises:
        NoTextColumnError: None of the first 1,000 records has the field.
    """
    waiting: list[str] = []
    for where, record in records:
        try:
            text = _text_of(record, column)
        except UnicodeDecodeError:
            skip(where, "not UTF-8")
            many = True
            continue
        if text is None and not many:
            names = names or (list(record) if isinstance(record, dict) else ())
            waiting.append(where)
            if len(waiting) == SEARCHED:
                break
            continue
        for each in waiting:
            skip(each, NO_TEXT)
        waiting, many = [], True
        if text is None:
            skip(where, NO_TEXT)
        else:
            yield where, text
    if waiting and names:
        raise NoTextColumnError(path, column, names)
    if waiting:
        raise BadContentError(NO_TEXT)


def _text_of(record: Any, column: str) -> str | None:
    """A record's text: itself, or its field; lists of texts and of chat messages are joined by lines.

    Returns:
        None where there is no such field, or no text in it; empty for null.

    Raises:
        UnicodeDecodeError: It is bytes that are not UTF-8.
    """
    if isinstance(record, str):
        return record
    value = record
    for name in [column] if isinstance(record, dict) and column in record else column.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    if isinstance(value, list):
        parts = [part.get("content", part) if isinstance(part, dict) else part for part in value]
        # A message that calls a tool has null for content.
        texts = [_as_text(part) for part in parts if part is not None]
        return None if None in texts else "\n".join(text for text in texts if text is not None)
    return "" if value is None else _as_text(value)


def _as_text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, str) else None


def read_columns(path: str, kind: str, column: str, skip: Skip) -> Texts:
    """One column of a Parquet file or an Arrow stream, some rows at a time.

    Raises:
        NoTextColumnError: There is no such column, or no text in its first 1,000 rows.
        BadContentError: The file is torn; earlier rows have been yielded.
    """
    arrow = needed("pyarrow", f"{kind} files")
    try:
        names, batches = _batches(arrow, path, kind, column)
        top = column if column in names else column.split(".")[0]
        if top not in names:
            raise NoTextColumnError(path, column, names)
        yield from _picked(_rows(batches, top, skip), path, column, skip, names)
    except arrow.ArrowException as error:
        raise BadContentError("torn") from error
    except OSError as error:
        raise BadContentError("unreadable" if error.errno else "torn") from error
    except UnicodeDecodeError as error:  # a name in the schema
        raise BadContentError("torn") from error


def _batches(arrow: Any, path: str, kind: str, column: str) -> tuple[list[str], Iterator[Any]]:
    """Names of all columns, and batches of rows with the requested one."""
    if kind == "parquet":
        file = needed("pyarrow.parquet", "parquet files").ParquetFile(path)
        names = list(file.schema_arrow.names)
        top = column if column in names else column.split(".")[0]
        return names, file.iter_batches(_ROWS, columns=[top])
    # Not mapped: truncating a mapped file kills the process.
    file = arrow.OSFile(path)
    try:
        stream = arrow.ipc.open_stream(file)
    except arrow.ArrowInvalid:  # the file format instead of the stream format
        file.seek(0)
        reader = arrow.ipc.open_file(file)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        return list(reader.schema.names), batches
    return list(stream.schema.names), iter(stream)


def _rows(batches: Iterator[Any], name: str, skip: Skip) -> Iterator[tuple[str, Any]]:
    """Rows of one column as records of one field; the first of several columns of that name."""
    number = 0
    for batch in batches:
        column = batch.column(batch.schema.names.index(name))
        for begin in range(0, batch.num_rows, _ROWS):
            piece = column.slice(begin, _ROWS)
            try:
                values = piece.to_pylist()
            except (ValueError, OverflowError):  # text that is not UTF-8, a date that Python does not know
                values = [_value_or_error(cell) for cell in piece]
            for value in values:
                if isinstance(value, UnicodeDecodeError):
                    skip(f"row {number}", "not UTF-8")
                elif isinstance(value, Exception):
                    skip(f"row {number}", NO_TEXT)
                else:
                    yield f"row {number}", {name: value}
                number += 1


def _value_or_error(cell: Any) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:
        return error
