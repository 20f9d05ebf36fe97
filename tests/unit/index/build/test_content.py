"""Tests of reading packed, torn and oddly encoded content."""

import bz2
import gzip
import io
import lzma
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from retrieval_draft.index.build import _content
from retrieval_draft.index.build._content import BadContentError, Content, open_content

TEXT = "".join(f"line {number} {value}\n" for number, value in enumerate(range(7, 90000, 7))).encode()
RANDOM = np.random.default_rng(0).bytes(1 << 16)  # packs into as many bytes


def zst(content: bytes, **options: int) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    out = io.BytesIO()
    parameters = zstandard.ZstdCompressionParameters(**{"window_log": 17, **options})
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    with compressor.stream_writer(out, closefd=False) as packed:
        packed.write(content)
    return out.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zst,
}
packings = pytest.mark.parametrize("name", PACK)


def read(path: Path) -> tuple[bytes, str]:
    with open_content(str(path)) as content:
        return content.read(), content.why


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@packings
@pytest.mark.parametrize("content", [b"", b"x", TEXT, RANDOM, b"\n" * (1 << 21)])
def test_packed_content_is_unpacked_whatever_the_name(tmp_path, name: str, content: bytes) -> None:
    assert read(written(tmp_path / "a", PACK[name](content))) == (content, "")


@packings
def test_members_follow_each_other_and_padding(tmp_path, name: str) -> None:
    members = PACK[name](TEXT) + PACK[name](b"more\n") + b"\0" * 512
    assert read(written(tmp_path / "a", members)) == (TEXT + b"more\n", "")
    small = b"".join(PACK[name](b"%d\n" % number) for number in range(300))
    assert read(written(tmp_path / "b", small))[0] == b"".join(b"%d\n" % number for number in range(300))


@packings
def test_what_stands_before_something_else_is_read(tmp_path, name: str) -> None:
    path = written(tmp_path / "a", PACK[name](TEXT) + PACK[name](RANDOM) + b"\0\0garbage")
    assert read(path) == (TEXT + RANDOM, "torn")


@packings
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_what_stands_before_a_tear_is_read(tmp_path, name: str, kept: float) -> None:
    packed = PACK[name](TEXT)
    content = TEXT + np.random.default_rng(1).bytes(4096)
    packed = PACK[name](content)
    found, why = read(written(tmp_path / "a", packed[: int(kept * len(packed))]))
    assert why == "torn"
    assert content.startswith(found)
    if name in ("gz", "xz"):  # the others pack in blocks that are read whole or not at all
        assert len(found) > 0.8 * kept * len(TEXT)


def test_every_byte_before_a_broken_one_is_read(tmp_path) -> None:
    # Stored blocks: what is packed stands there as it is, and so does the broken byte's position.
    packed = bytearray(gzip.compress(RANDOM, 0) + gzip.compress(b"behind"))
    packed[-14] ^= 0xFF
    found, why = read(written(tmp_path / "a", bytes(packed)))
    assert (found[: len(RANDOM)], why) == (RANDOM, "torn")


@pytest.mark.parametrize("window", [27, 28, 31])
def test_zst_with_a_long_window(tmp_path, window: int) -> None:
    assert read(written(tmp_path / "a", zst(TEXT, window_log=window))) == (TEXT, "")


def test_too_much_memory_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_content, "_MAX_MEMORY", 1 << 20)
    assert read(written(tmp_path / "a", zst(TEXT, window_log=27))) == (b"", "unpacking takes too much memory")
    path = written(tmp_path / "b", lzma.compress(TEXT, preset=9))
    assert read(path) == (b"", "unpacking takes too much memory")


@packings
def test_a_bomb_is_unpacked_in_bounded_memory(tmp_path, name: str) -> None:
    import tracemalloc

    path = written(tmp_path / "a", PACK[name](bytes(32 << 20)))
    tracemalloc.start()
    try:
        with open_content(str(path)) as content:
            size = sum(len(block) for block in iter(lambda: content.read(1 << 16), b""))
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert size == 32 << 20


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_unicode_with_a_mark(tmp_path, encoding: str) -> None:
    text = "naïve 漢字 🎈\n" * 1000
    path = written(tmp_path / "a", ("\ufeff" + text).encode(encoding))
    assert read(path) == (("\ufeff" + text).encode(), "")
    path = written(tmp_path / "b", ("\ufeff" + text).encode(encoding)[:-1])
    assert read(path) == (("\ufeff" + text[:-1]).encode(), "torn")


def test_a_disk_that_fails_ends_the_content() -> None:
    def blocks() -> Iterator[bytes]:
        yield b"some text"
        raise OSError(5, "Input/output error")

    content = Content(blocks())
    assert content.read() == b"some text"
    assert content.why == "unreadable"


def test_content_is_handed_out_as_it_is_asked_for() -> None:
    blocks = [RANDOM[begin : begin + 999] for begin in range(0, len(RANDOM), 999)]
    content = Content(iter(blocks))
    assert content.head == RANDOM[: 1 << 16]
    assert content.read(5) + content.readline() + content.read() == RANDOM
    assert content.why == ""


def test_what_is_no_file_is_not_waited_for(tmp_path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadContentError, match="no regular file"), open_content(str(tmp_path / "pipe")):
        pass
    with socket.socket(socket.AF_UNIX) as one:
        monkeypatch.chdir(tmp_path)
        one.bind("socket")
        with pytest.raises(BadContentError, match="no regular file"), open_content("socket"):
            pass
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(BadContentError, match="closed"), open_content("-"):
        pass
