"""Files and folders: the per-user cache folder, checksums, and writes that are on disk when they return."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

import xxhash

__all__ = [
    "cache_home",
    "expanded",
    "file_checksum",
    "read_bounded",
    "replace_file",
    "sync_file",
    "sync_folder",
]

_BLOCK = 1 << 22


def file_checksum(path: Path) -> str:
    """Checksum of a file: xxh3, 128 bits, in hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_bounded(path: Path, most: int) -> bytes:
    """Reads a file of bounded size.

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
    """Syncs a file's content to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Syncs the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file atomically, and syncs it to disk."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_bytes(content)
    sync_file(unfinished)
    unfinished.replace(path)
    sync_folder(path.parent)


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ~ replaced by the home folder; unchanged where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_home() -> Path:
    """``RETRIEVAL_DRAFT_HOME``, else ``retrieval_draft`` in the user's cache folder.

    A user without a home, as containers with any user id have, gets a temporary folder for the process.
    """
    named = os.environ.get("RETRIEVAL_DRAFT_HOME")
    home = expanded(named or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if home.parts[:1] and home.parts[0].startswith("~"):
        return _temporary()
    return home if named else home / "retrieval_draft"


@cache
def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="retrieval_draft-"))
