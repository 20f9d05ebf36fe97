"""The content of files as bytes: unpacked, in UTF-8, and up to the first error."""

from __future__ import annotations

import bz2
import codecs
import importlib
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from retrieval_draft.errors import InvalidInputError

__all__ = ["BLOCK", "BadContentError", "Content", "check_regular", "needed", "open_content"]

BLOCK = 1 << 20
"""Bytes read at a time."""

_HEAD = 1 << 16
_MAX_MEMORY = 1 << 31
"""Bytes that unpacking one file may take: as many as the largest window of zstd."""

_GZ_STEP = 1 << 11
_SIZED_STEP = 1 << 10
_ZST_STEP = 1 << 7


class BadContentError(Exception):
    """Bad content of a file; the message names the fault in two or three words."""


class Content(io.BufferedReader):
    """Blocks of bytes as a stream that ends at the first error.

    Content before the error is read like any other; `why` tells the error from a plain end.

    Args:
        blocks: May raise BadContentError or OSError.

    Attributes:
        head: The first 64 KB or fewer; reading begins with them.
    """

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = _Blocks(blocks)
        self.head = self._blocks.look_ahead(_HEAD)
        super().__init__(self._blocks, BLOCK)

    @property
    def why(self) -> str:
        """Error that ended the stream early; empty if none did so far."""
        return self._blocks.why


class _Blocks(io.RawIOBase):
    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._waiting = memoryview(b"")
        self.why = ""

    def look_ahead(self, size: int) -> bytes:
        blocks = []
        length = 0
        while length < size and (block := self._next()):
            blocks.append(block)
            length += len(block)
        head = b"".join(blocks)
        self._waiting = memoryview(head)
        return head[:size]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        waiting = self._waiting or memoryview(self._next())
        size = min(len(buffer), len(waiting))
        buffer[:size] = waiting[:size]
        self._waiting = waiting[size:]
        return size

    def _next(self) -> bytes:
        """The next block that is not empty; empty at the end of the content or after an error."""
        try:
            for block in self._blocks:
                if block:
                    return block
        except BadContentError as error:
            self.why = str(error)
        except OSError:
            self.why = "unreadable"
        self._blocks = iter(())
        return b""


@contextmanager
def open_content(path: str, is_stream: bool = False) -> Iterator[Content]:
    """A file's content, unpacked if its first bytes mark a packed format, UTF-16 and UTF-32 as UTF-8.

    Args:
        path: "-" for stdin.
        is_stream: Whether a pipe, a device or a socket is meant. Else only a regular file is read: reading
            anything else may never end, or never begin.

    Raises:
        BadContentError: It is no regular file, or stdin is closed.
        OSError: It cannot be opened.
    """
    if path == "-":
        if sys.stdin is None:
            raise BadContentError("closed")
        yield _content(sys.stdin.buffer)
        return
    if not is_stream:
        check_regular(path)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if is_stream else os.O_NONBLOCK))
    with open(handle, "rb") as file:  # noqa: PTH123 (a handle)
        yield _content(file)


def check_regular(path: str) -> None:
    """Refuses files whose reading may never end, or never begin.

    Raises:
        BadContentError: It is a pipe, a device, a socket or a folder.
        OSError: The file does not exist or may not be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 (a str on purpose)
        raise BadContentError("no regular file")


def _content(file: Any) -> Content:
    return Content(_as_utf8(_unpacked(iter(partial(file.read1, BLOCK), b""))))


def needed(name: str, what: str) -> Any:
    """A package that is installed only with an extra.

    Raises:
        InvalidInputError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise InvalidInputError(
            f"Reading {what} needs the package {package}.",
            'Install it: pip install "retrieval_draft[corpus]".',
        ) from error


def _peeked(blocks: Iterator[bytes], size: int) -> tuple[bytes, Iterator[bytes]]:
    """The first `size` bytes, and all blocks again."""
    head = b""
    while len(head) < size and (block := next(blocks, b"")):
        head += block
    return head[:size], chain((head,), blocks)


_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def _as_utf8(blocks: Iterator[bytes]) -> Iterator[bytes]:
    head, blocks = _peeked(blocks, 4)
    name = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if name is None:
        yield from blocks
        return
    # Half a surrogate pair passes here, and is found when lines and records are read.
    decoder = codecs.getincrementaldecoder(name)("surrogatepass")
    try:
        for block in chain(blocks, (b"",)):
            yield decoder.decode(block, final=not block).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        yield error.object[: error.start].decode(name, "ignore").encode("utf-8", "ignore")
        raise BadContentError("torn") from error


Feed = Callable[[Any, memoryview], Generator[bytes, None, memoryview]]


def _unpacked(blocks: Iterator[bytes]) -> Iterator[bytes]:
    head, blocks = _peeked(blocks, 16)
    if head.startswith(b"\x1f\x8b\x08"):
        return _members(blocks, partial(zlib.decompressobj, 31), _feed_gz)
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return _members(blocks, bz2.BZ2Decompressor, _feed_sized)
    if head.startswith(b"\xfd7zXZ\0"):
        return _members(
            blocks, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=_MAX_MEMORY), _feed_sized
        )
    # A frame, or a skippable one, as parallel packers write before the first.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        packed = needed("zstandard", ".zst files").ZstdDecompressor(max_window_size=_MAX_MEMORY)
        return _members(blocks, packed.decompressobj, _feed_zst)
    return blocks


def _members(blocks: Iterator[bytes], start: Callable[[], Any], feed: Feed) -> Iterator[bytes]:
    """Unpacks consecutive members, with or without zeros between them.

    Args:
        blocks: Packed bytes.
        start: Makes a decompressor for one member.
        feed: Yields a decompressor's output for a block, and returns the bytes after the member's end.

    Raises:
        BadContentError: After the yielded bytes there is other content, or an end too early.
    """
    member = start()
    for block in blocks:
        rest = memoryview(block)
        while rest:
            if member is None:
                if not rest[0]:
                    rest = rest[1:]
                    continue
                member = start()
            try:
                rest = yield from feed(member, rest)
            except OSError as error:  # of bz2; of zlib, lzma and zstandard below
                raise BadContentError("torn") from error
            except MemoryError as error:
                raise BadContentError("unpacking takes too much memory") from error
            except Exception as error:  # zstandard's exception type needs its import
                why = "unpacking takes too much memory" if "memory" in str(error).lower() else "torn"
                raise BadContentError(why) from error
            if member.eof:
                member = None
    if member is not None:
        raise BadContentError("torn")


def _feed_gz(member: Any, block: memoryview) -> Generator[bytes, None, memoryview]:
    for begin in range(0, len(block), _GZ_STEP):
        piece = block[begin : begin + _GZ_STEP]
        before = member.copy()
        try:
            unpacked = member.decompress(piece)
        except zlib.error:
            # A call that raises loses its unpacked bytes: byte by byte none are lost.
            for index in range(len(piece)):
                yield before.decompress(piece[index : index + 1])
            raise
        yield unpacked
        if member.eof:
            return block[begin + len(piece) - len(member.unused_data) :]
    return block[:0]


def _feed_sized(member: Any, block: memoryview) -> Generator[bytes, None, memoryview]:
    """Feeds bz2 and xz, which take all input at once and return small pieces: an error loses one piece."""
    waiting = block
    while True:
        yield member.decompress(waiting, _SIZED_STEP)
        waiting = block[:0]
        if member.eof:
            return block[len(block) - len(member.unused_data) :]
        if member.needs_input:
            return waiting


def _feed_zst(member: Any, block: memoryview) -> Generator[bytes, None, memoryview]:
    """Feeds zstd in small pieces: a few bytes may unpack to megabytes, and an error loses its piece."""
    for begin in range(0, len(block), _ZST_STEP):
        piece = block[begin : begin + _ZST_STEP]
        yield member.decompress(piece)
        if member.eof:
            return block[begin + len(piece) - len(member.unused_data) :]
    return block[:0]
