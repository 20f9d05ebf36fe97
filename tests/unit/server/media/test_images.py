"""Reading images: from where it is allowed, and only images of a bearable size."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.images import ImageReader
from retrieval_draft.server.media.settings import MediaSettings
from tests.support.image_processors import data_url, image_bytes


def reader(**settings: Any) -> ImageReader:
    return ImageReader(MediaSettings(**settings))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_is_the_one_that_transformers_loads(form: str, tmp_path: Path) -> None:
    content = image_bytes(3, form=form)
    (tmp_path / "a").write_bytes(content)
    assert reader().read(data_url(content)) == load_image(str(tmp_path / "a"))


def test_images_are_turned_upright_and_made_rgb() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = reader().read(data_url(image_bytes(3, 20, 24, "JPEG", exif=exif)))
    assert turned.size == (24, 20)
    out = io.BytesIO()
    Image.fromarray(np.full((4, 5), 7, np.uint8)).save(out, "PNG")
    assert reader().read(data_url(out.getvalue())).mode == "RGB"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes and many pixels."""
    packed = zlib.compress(b"\0" * 1000, 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60000, 60000), (5000, 5000), (1 << 30, 1), (0, 0)])
def test_decompression_bombs_are_refused_before_they_are_unpacked(size: tuple[int, int]) -> None:
    with pytest.raises(ApiError, match=r"pixels|torn"):
        reader().read(data_url(bomb(*size)))


def test_texts_that_unpack_to_much_are_refused() -> None:
    inside = b"a\0\0" + zlib.compress(b"\0" * (20 << 20), 9)
    good = image_bytes(1)
    with pytest.raises(ApiError, match="torn"):
        reader().read(data_url(good[:33] + chunk(b"zTXt", inside) + good[33:]))


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", image_bytes(1)[:100], b"II*\0" + b"\0" * 99],
)
def test_other_content_is_refused(content: bytes) -> None:
    with pytest.raises(ApiError, match="torn, or none of"):
        reader().read(data_url(content))


@pytest.mark.parametrize(
    "url",
    ["data:", "data:,", "data:image/png;base64", "data:image/png,aa", "data:;base64,a", "data:;base64,a\nb="],
)
def test_data_urls_that_are_none(url: str) -> None:
    with pytest.raises(ApiError):
        reader().read(url)


def test_sizes_are_limited_before_and_after_decoding(tmp_path: Path) -> None:
    content = image_bytes(1)
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ApiError, match="more than 99 bytes"):
        reader(max_bytes=99).read(data_url(content))
    with pytest.raises(ApiError, match="more than 99 bytes"):
        reader(max_bytes=99, folder=tmp_path).read(f"file://{tmp_path}/a.png")


@pytest.mark.parametrize("url", ["ftp://a/b", "/etc/passwd", "../a.png", "javascript:1", "", "a" * 9999])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ApiError, match="data: is what is read"):
        reader(fetches=True).read(url)


def test_nothing_is_fetched_or_opened_unless_that_is_allowed() -> None:
    for url, why in (("http://8.8.8.8/", "fetches no images"), ("file:///etc/passwd", "reads no files")):
        with pytest.raises(ApiError, match=why):
            reader().read(url)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image, and ways out of it."""
    inside, outside = tmp_path / "in", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    for path in (inside / "a b.png", outside / "secret.png", tmp_path / "in2.png"):
        path.write_bytes(image_bytes(1))
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "way").symlink_to(outside)
    (inside / "own.png").symlink_to(inside / "a b.png")
    os.mkfifo(inside / "pipe")
    return inside


def test_files_below_the_folder(folder: Path) -> None:
    found = reader(folder=folder)
    for path in ("a%20b.png", "own.png", "../in/a%20b.png"):
        assert found.read(f"file://{folder}/{path}").size == (20, 24)
    assert found.read(f"file://localhost{folder}/a%20b.png").size == (20, 24)


@pytest.mark.parametrize(
    "path",
    [
        "../outside/secret.png", "%2e%2e/outside/secret.png", "..%2foutside%2fsecret.png", "link.png",
        "way/secret.png", "../in2.png", "pipe", "", "absent.png", "a%20b.png%00", "a%20b.png?x", "%ff",
        "../../../../../../etc/passwd",
    ],
)  # fmt: skip
def test_no_way_leads_out_of_the_folder(folder: Path, path: str) -> None:
    with pytest.raises(ApiError, match="not below the folder"):
        reader(folder=folder).read(f"file://{folder}/{path}")


def test_hosts_of_file_urls_are_refused(folder: Path) -> None:
    for url in (f"file://host{folder}/a%20b.png", "file:a%20b.png", "file://[", "file:///proc/self/environ"):
        with pytest.raises(ApiError, match="not below the folder"):
            reader(folder=folder).read(url)


def test_settings_are_checked(tmp_path: Path) -> None:
    for bad in ({"folder": tmp_path / "no"}, {"max_images": -1}, {"max_bytes": 0}, {"seconds": 0.0}):
        with pytest.raises(InvalidInputError):
            MediaSettings(**bad)
