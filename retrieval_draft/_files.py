"""Files that must be whole on disk: checksums, and writes that are there when they return."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

__all__ = ["file_checksum", "read_bounded", "replace_file", "sync_file", "sync_folder"]

_BLOCK = 1 << 22


def file_checksum(path: Path) -> str:
    """xxh3, 128 bits, in hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_bounded(path: Path, most: int) -> bytes:
    """Reads a file that is small if it is what its name says.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no file, or has more than `most` bytes.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content


def sync_file(path: Path) -> None:
    """Makes sure that a file's content is on disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes sure that the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file by another at one point in time, and makes sure that it is on disk."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content)
    sync_file(unfinished)
    unfinished.replace(path)
    sync_folder(path.parent)
