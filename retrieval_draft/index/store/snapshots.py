"""Snapshots of the shared log: segments as files, and their position in the log."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from retrieval_draft._files import cache_home, expanded, read_bounded, replace_file, sync_folder
from retrieval_draft.errors import DatastoreError, InvalidInputError, RetrievalDraftError
from retrieval_draft.index.adjacency import MATRIX
from retrieval_draft.index.segments.index_folder import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    IndexFolder,
    parse_manifest,
)
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.store.snapshot_state import (
    FORMAT_VERSION,
    KIND,
    MAX_STATE_BYTES,
    STATE,
    LogState,
    SnapshotInfo,
    StateFile,
    describe,
    read_state,
    sealed,
)

__all__ = ["LogState", "Snapshot", "SnapshotInfo", "SnapshotPlace"]

_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAME = re.compile(r"snapshot-(\d{13})-[0-9a-f]{8}")
_UNFINISHED = ".unfinished-"
_STALE_SECONDS = 3600
_STALE_UPLOAD_SECONDS = 86400
"""Age in seconds at which an unfinished snapshot is removed: uploads are visible in parts, and may take
long."""

MOST_LEARNED = 1 << 26
"""Largest size of the file of the rows; all that are kept take a sixth of it."""

_AHEAD_SECONDS = 3600
"""Seconds by which servers' clocks may differ; a snapshot from further ahead counts as older than all
others."""

_log = logging.getLogger("retrieval_draft")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot that can be looked up.

    Attributes:
        info: Its summary.
        state: Its position in the log.
        segments: Mapped, oldest first.
        learned: The file of the rows, unchecked; empty where there is none.
    """

    info: SnapshotInfo
    state: LogState
    segments: tuple[Segment, ...]
    learned: bytes = b""


class _UnreachableError(DatastoreError):
    """Failure of the storage itself, not of one snapshot in it."""


class SnapshotPlace:
    """Storage for snapshots of one namespace.

    Each is a folder, an index like those of ``index build``, with a file that holds its position in the log.
    The file of the position is written last: without it a snapshot does not count.

    Args:
        location: A folder, or any URL of fsspec.
        namespace: ``fingerprint:tenant``.
        fingerprint: Of the tokenizer.
        vocabulary: Number of token ids.
        cache: Local folder for snapshots of a URL; the user's cache folder by default.

    Raises:
        InvalidInputError: The tenant is no name.
        DatastoreError: The URL cannot be used, or fsspec is not installed.
    """

    def __init__(
        self,
        location: str | Path,
        namespace: str,
        fingerprint: str,
        vocabulary: int,
        cache: Path | None = None,
    ) -> None:
        self._namespace = namespace
        self._fingerprint = fingerprint
        self._vocabulary = vocabulary
        tenant = namespace.partition(":")[2]
        if not _TENANT.fullmatch(tenant) or tenant in (".", ".."):
            raise InvalidInputError(
                f"The tenant {tenant!r} is no name.", "Use 1 to 64 letters, digits, dots, - and _."
            )
        text = str(location).removeprefix("file://")
        self._remote: Any = None
        if "://" in text:
            self._remote, root = _file_system(text)
            self._root = f"{root.rstrip('/')}/{fingerprint}/{tenant}"
            mark = xxhash.xxh3_64_hexdigest(text.encode())
            home = cache_home() / "snapshots" if cache is None else cache
            self._local = home / mark / fingerprint / tenant
        else:
            self._local = expanded(text) / fingerprint / tenant

    def write(self, segments: Sequence[Segment], state: LogState, learned: bytes = b"") -> SnapshotInfo:
        """Writes a snapshot; readers see all of it or nothing.

        Args:
            segments: Oldest first; there may be none.
            state: Their position in the log.
            learned: The file of the rows; empty for none.

        Raises:
            DatastoreError: The disk is full, or the storage cannot be written; no files are left.
        """
        name = f"snapshot-{state.created:013d}-{uuid.uuid4().hex[:8]}"
        unfinished = Path()
        try:
            if self._remote is not None:
                unfinished = Path(tempfile.mkdtemp(prefix="retrieval_draft-"))
            else:
                self._local.mkdir(parents=True, exist_ok=True)
                unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._local))
            info = self._fill(unfinished / name, segments, state, learned)
            if self._remote is not None:
                self._upload(unfinished / name)
            else:
                (unfinished / name).rename(self._local / name)
                sync_folder(self._local)
        except DatastoreError:
            raise
        except Exception as error:  # any type: it depends on the file system of the URL
            raise DatastoreError(
                f"Cannot write the snapshot {name}: {error}.", "Free space, or permit it."
            ) from error
        finally:
            if unfinished != Path():
                shutil.rmtree(unfinished, ignore_errors=True)
        return info

    def newest(self) -> Snapshot | None:
        """Maps the newest complete snapshot; None where there is none.

        Raises:
            DatastoreError: The storage cannot be read.
        """
        for name in self._names():
            try:
                if self._remote is not None:
                    state = self._state_of(name)
                    if not state:
                        continue  # it is being uploaded or removed
                    self._download(name, state)
                found = self._open(self._local / name)
            except _UnreachableError:
                raise
            except (OSError, RetrievalDraftError) as error:
                _log.warning("The snapshot %s is not used: %s", name, error)
                continue
            if self._remote is not None:
                self._keep_only(name)
            return found
        return None

    def listing(self) -> list[SnapshotInfo]:
        """Complete snapshots by their state files, newest first.

        Raises:
            DatastoreError: The storage cannot be read.
        """
        found = []
        for name in self._names():
            try:
                file = read_state(self._state_of(name), name)
            except _UnreachableError:
                raise
            except (OSError, RetrievalDraftError):
                continue
            if file.state.namespace == self._namespace:
                found.append(describe(name, file))
        return found

    def prune(self, keep: int = 2) -> int:
        """Removes all but the newest snapshots, and leftovers of crashed writers.

        Returns:
            Snapshots removed. One that cannot be removed stays.
        """
        removed = 0
        whole = [each.name for each in self.listing()]
        for name in whole[keep:]:
            with suppress(Exception):
                self._remove(name)
                removed += 1
        for name in set(self._names()) - set(whole):
            age = time.time() - int(name.split("-")[1]) / 1000
            if age > _STALE_UPLOAD_SECONDS and self._is_unfinished(name):
                with suppress(Exception):
                    self._remove(name)
        for path in self._local.glob(f"{_UNFINISHED}*"):
            with suppress(OSError):
                changed = max(each.stat().st_mtime for each in (path, *path.rglob("*")))
                if changed < time.time() - _STALE_SECONDS:
                    shutil.rmtree(path)
        return removed

    def _is_unfinished(self, name: str) -> bool:
        """True if no version of this library can use it, as it has no state file."""
        try:
            return not self._state_of(name)
        except OSError:
            return False

    def _remove(self, name: str) -> None:
        if self._remote is not None:
            with suppress(FileNotFoundError):
                # The state file is removed first, so that no reader starts on an incomplete snapshot.
                self._remote.rm_file(f"{self._root}/{name}/{STATE}")
            self._remote.rm(f"{self._root}/{name}", recursive=True)
        else:
            # Removal is atomic, even if this process is killed.
            gone = self._local / f"{_UNFINISHED}{uuid.uuid4().hex}"
            (self._local / name).rename(gone)
            shutil.rmtree(gone)

    def _state_of(self, name: str) -> bytes:
        """The state file, empty where it is missing."""
        if self._remote is None:
            path = self._local / name / STATE
            return _read(path, MAX_STATE_BYTES) if path.exists() else b""
        try:
            return self._fetched(name, STATE, MAX_STATE_BYTES)
        except FileNotFoundError:
            return b""

    def _fetched(self, name: str, part: str, most: int) -> bytes:
        """A small file of a snapshot at a URL; of a larger one than `most` only so many bytes are read.

        Raises:
            FileNotFoundError: It is missing.
            DatastoreError: It is too large, or the location cannot be read.
        """
        try:
            content = bytes(self._remote.cat_file(f"{self._root}/{name}/{part}", start=0, end=most + 1))
        except FileNotFoundError:
            raise
        except Exception as error:  # any type: it depends on the file system of the URL
            raise _UnreachableError(f"Snapshots cannot be read: {error}.", "Check the location.") from error
        if len(content) > most:
            raise DatastoreError(f"{name}/{part} has more than {most} bytes.", "Remove the snapshot.")
        return content

    def _names(self) -> list[str]:
        try:
            if self._remote is not None:
                self._remote.invalidate_cache()
                paths = self._remote.ls(self._root, detail=False) if self._remote.exists(self._root) else []
                names = [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
            else:
                names = [path.name for path in self._local.iterdir()] if self._local.exists() else []
        except Exception as error:  # any type: it depends on the file system of the URL
            raise DatastoreError(
                f"Snapshots cannot be listed: {error}.", "Check the location and its rights."
            ) from error
        # A time in the future comes from a wrong clock and does not show the newest one.
        latest = f"snapshot-{int((time.time() + _AHEAD_SECONDS) * 1000):013d}-~"
        names = [name for name in names if _NAME.fullmatch(name)]
        return sorted(names, key=lambda name: (name < latest, name), reverse=True)

    def _fill(
        self, folder: Path, segments: Sequence[Segment], state: LogState, learned: bytes
    ) -> SnapshotInfo:
        index = IndexFolder.create(folder, self._fingerprint, self._vocabulary)
        index.publish([index.write(segment) for segment in segments])
        if learned:
            replace_file(folder / MATRIX, learned)
        file = StateFile(
            KIND,
            FORMAT_VERSION,
            state,
            xxhash.xxh3_128_hexdigest((folder / MANIFEST).read_bytes()),
            index.manifest.tokens,
            index.manifest.nbytes,
        )
        file = sealed(file)
        replace_file(folder / STATE, msgspec.json.format(msgspec.json.encode(file), indent=1))
        return describe(folder.name, file)

    def _open(self, folder: Path) -> Snapshot:
        for path in (folder, *folder.rglob("*")):
            if path.is_symlink():
                raise DatastoreError(
                    f"{path} is a link; a snapshot holds files and folders.", "Remove the snapshot."
                )
        file = read_state(_read(folder / STATE, MAX_STATE_BYTES), folder.name)
        if file.state.namespace != self._namespace:
            raise DatastoreError(f"It belongs to {file.state.namespace[:200]!r}, not to {self._namespace}.")
        content = _read(folder / MANIFEST, MAX_MANIFEST_BYTES)
        _check_manifest(content, folder / MANIFEST, file)
        index = IndexFolder.open(folder)
        index.check(self._fingerprint, self._vocabulary)
        path = folder / MATRIX
        learned = b""
        if path.exists():
            with suppress(OSError, DatastoreError):  # without rows it is a snapshot like those of before
                learned = _read(path, MOST_LEARNED)
        return Snapshot(describe(folder.name, file), file.state, index.segments(), learned)

    def _upload(self, folder: Path) -> None:
        target = f"{self._root}/{folder.name}"
        try:
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != STATE]
            for path in (*paths, folder / STATE):
                remote = f"{target}/{path.relative_to(folder).as_posix()}"
                self._remote.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
                self._remote.put_file(str(path), remote)
        except Exception:
            with suppress(Exception):
                self._remote.rm(target, recursive=True)
            raise

    def _download(self, name: str, state: bytes) -> None:
        """Downloads a snapshot, once, and compares its checksums.

        Only files in the manifest are requested, and only if they have the size in the manifest: other files
        in the storage are not read.
        """
        if (self._local / name).exists():
            with suppress(OSError, RetrievalDraftError):
                self._open(self._local / name)
                return
            shutil.rmtree(self._local / name, ignore_errors=True)
        self._local.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._local))
        try:
            folder = unfinished / name
            folder.mkdir()
            content = self._fetched(name, MANIFEST, MAX_MANIFEST_BYTES)
            _check_manifest(content, f"{name}/{MANIFEST}", read_state(state, name))
            manifest = parse_manifest(content, f"{name}/{MANIFEST}")
            free = shutil.disk_usage(self._local).free
            if manifest.nbytes > free:
                raise DatastoreError(
                    f"{name} takes {manifest.nbytes} bytes, and {free} are free in {self._local}.",
                    "Free space.",
                )
            (folder / STATE).write_bytes(state)
            (folder / MANIFEST).write_bytes(content)
            with suppress(FileNotFoundError, DatastoreError):  # as in `_open`
                (folder / MATRIX).write_bytes(self._fetched(name, MATRIX, MOST_LEARNED))
            for entry in manifest.segments:
                (folder / entry.name).mkdir()
                for part, expected in entry.files.items():
                    remote = f"{self._root}/{name}/{entry.name}/{part}"
                    found = self._remote.size(remote)
                    if found != expected["bytes"]:
                        raise DatastoreError(
                            f"{name}/{entry.name}/{part} is torn: found {found} bytes, expected "
                            f"{expected['bytes']}.",
                            "Remove the snapshot.",
                        )
                    self._remote.get_file(remote, str(folder / entry.name / part))
            wrong = IndexFolder.open(folder).verify()
            if wrong:
                raise DatastoreError(f"{wrong[0]}.")
            self._open(folder)
            try:
                folder.rename(self._local / name)
            except OSError:
                if not (self._local / name).exists():  # else another process has just downloaded it
                    raise
        except (FileNotFoundError, RetrievalDraftError):  # it was pruned, or is damaged
            raise
        except Exception as error:  # any type: it depends on the file system of the URL
            raise _UnreachableError(f"{name} cannot be copied: {error}.", "Check the location.") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _keep_only(self, name: str) -> None:
        """Removes local copies of removed snapshots; a process that has mapped one keeps it until it ends."""
        there = self._names()
        for path in self._local.glob("snapshot-*"):
            if path.name != name and path.name not in there:
                shutil.rmtree(path, ignore_errors=True)


def _read(path: Path, most: int) -> bytes:
    try:
        return read_bounded(path, most)
    except ValueError as error:
        raise DatastoreError(f"{path} cannot be read: {error}.", "Remove the snapshot.") from error


def _check_manifest(content: bytes, path: object, file: StateFile) -> None:
    found = xxhash.xxh3_128_hexdigest(content)
    if found != file.manifest:
        raise DatastoreError(f"{path} was altered: found xxh3 {found}, expected {file.manifest[:40]!r}.")


def _file_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise DatastoreError(
            f"Snapshots at {url.partition('://')[0]}://... need the package fsspec.",
            "pip install 'retrieval_draft[store]'",
        ) from error
    try:
        file_system, root = url_to_fs(url)
    except ImportError as error:  # names the package that the scheme needs
        raise DatastoreError(f"Snapshots cannot be kept there: {error}.", "Install it.") from error
    except ValueError:  # all from None, as a URL may hold a secret
        raise DatastoreError(
            f"Snapshots cannot be kept at {url.partition('://')[0]}://...: fsspec does not know that.",
            "Name a folder, or a URL of fsspec.",
        ) from None
    except Exception as error:  # any type: some file systems connect at once
        raise DatastoreError(
            f"Snapshots cannot be kept at {url.partition('://')[0]}://...: {type(error).__name__}.",
            "Check the location, and what its file system needs.",
        ) from None
    return file_system, root
