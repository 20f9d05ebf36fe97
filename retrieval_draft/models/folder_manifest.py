"""A manifest of checksums that detects incomplete and altered files in a folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from retrieval_draft import __version__
from retrieval_draft._files import file_checksum, sync_file
from retrieval_draft.errors import ModelFileError

__all__ = ["FORMAT_VERSION", "MANIFEST", "verify_folder", "write_manifest"]

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def write_manifest(folder: Path, source: dict[str, str]) -> None:
    """Syncs every file of `folder` to disk and writes their checksums, the manifest itself last."""
    files = {}
    for path in sorted(folder.iterdir()):
        sync_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "xxh3": file_checksum(path)}
    manifest = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "source": source,
        "files": files,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    sync_file(folder / MANIFEST)


def verify_folder(folder: Path, repair: str) -> None:
    """Checks every file of `folder` against the manifest.

    Args:
        folder: A folder with a manifest of `write_manifest`.
        repair: Remedy for the user when it is damaged.

    Raises:
        ModelFileError: Names the file, the found and the expected value.
    """
    manifest = _read_manifest(folder, repair)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ModelFileError(f"{path} is missing; the manifest names it.", repair)
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ModelFileError(f"{path} is torn: found {size} bytes, expected {expected['bytes']}.", repair)
        found = file_checksum(path)
        if found != expected["xxh3"]:
            raise ModelFileError(
                f"{path} was altered: found checksum xxh3 {found}, expected {expected['xxh3']}.", repair
            )


def _read_manifest(folder: Path, repair: str) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} is missing, so the folder is incomplete or foreign.", repair) from error
    except ValueError as error:
        raise ModelFileError(f"{path} is torn: found {error}, expected JSON.", repair) from error
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION:
        raise ModelFileError(f"{path}: found format version {found}, expected {FORMAT_VERSION}.", repair)
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) and {"bytes", "xxh3"} <= entry.keys() for entry in entries.values()
    ):
        raise ModelFileError(f"{path}: found no list of checksums, expected one.", repair)
    return manifest
