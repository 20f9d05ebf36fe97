"""The file of a snapshot with its position in the log."""

from __future__ import annotations

import re
from dataclasses import dataclass

import msgspec
import xxhash

from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.store.entry import ID_BYTES
from retrieval_draft.index.store.keys import SHARDS
from retrieval_draft.index.store.sequence_set import MAX_GAPS

__all__ = [
    "FORMAT_VERSION",
    "KIND",
    "STATE",
    "LogState",
    "SnapshotInfo",
    "StateFile",
    "describe",
    "read_state",
    "sealed",
]

KIND = "retrieval_draft snapshot"
FORMAT_VERSION = 1
STATE = "log.json"

MAX_STATE_BYTES = 1 << 28
"""Largest size of the file; all remembered servers, with some gaps each, take a tenth."""

MAX_MILLISECONDS = 10**13 - 1
"""Largest time of a snapshot, which has 13 digits in its name: the year 2286."""

_POSITION = re.compile(r"\d{1,20}-\d{1,20}")
_SERVER = re.compile(rf"(?:[0-9a-f]{{2}}){{1,{ID_BYTES}}}")
_DIGEST = re.compile(r"[0-9a-f]{1,16}")


class LogState(msgspec.Struct, frozen=True):
    """Position of a set of segments in the log.

    Attributes:
        namespace: ``fingerprint:tenant``.
        positions: For each shard the id of the last entry in them.
        writers: For each server, in hex, the bounds of its `SequenceSet`.
        entries: Number of entries in them.
        digest: Of all of them, in hex.
        created: Milliseconds since the epoch.
    """

    namespace: str
    positions: dict[str, str]
    writers: dict[str, list[int]]
    entries: int
    digest: str
    created: int

    def check(self, where: str) -> None:
        """Checks that every name and number is one that a mirror can have written.

        Raises:
            DatastoreError: Names the found and the allowed value.
        """
        _hold(0 <= self.entries < 2**63, where, "entries", self.entries, "0 to 2^63 - 1")
        _hold(0 <= self.created <= MAX_MILLISECONDS, where, "created", self.created, "of 13 digits at most")
        _hold(_DIGEST.fullmatch(self.digest), where, "digest", self.digest, "1 to 16 hexadecimal digits")
        for shard, position in self.positions.items():
            known = shard in {str(each) for each in range(SHARDS)}
            _hold(known, where, "a shard", shard, f"0 to {SHARDS - 1}")
            sound = _POSITION.fullmatch(position) and all(int(part) < 2**64 for part in position.split("-"))
            _hold(sound, where, f"the position in {shard}", position, "two numbers below 2^64 with - between")
        for server, bounds in self.writers.items():
            _hold(_SERVER.fullmatch(server), where, "a server", server, f"{ID_BYTES} bytes in hex")
            ascending = all(low <= high for low, high in zip(bounds[::2], bounds[1::2], strict=False))
            ascending &= all(high + 1 < low for high, low in zip(bounds[1::2], bounds[2::2], strict=False))
            inside = not bounds or (bounds[0] >= 0 and bounds[-1] < 2**63)
            few = len(bounds) % 2 == 0 and len(bounds) <= 2 * (MAX_GAPS + 1)
            _hold(ascending and inside and few, where, f"what came of {server}", bounds, "ascending ranges")


class StateFile(msgspec.Struct, frozen=True):
    """Contents of the file.

    Attributes:
        kind: Always `KIND`.
        format_version: Of the snapshot's layout.
        state: Its position in the log.
        manifest: xxh3 of the manifest, so that a mixture of two snapshots is noticed.
        tokens: Of all segments.
        nbytes: Of all files.
        xxh3: Of the file itself, without this field.
    """

    kind: str
    format_version: int
    state: LogState
    manifest: str
    tokens: int
    nbytes: int
    xxh3: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One snapshot.

    Attributes:
        name: Its folder.
        created: Milliseconds since the epoch.
        entries: Number of log entries in it.
        tokens: Of all segments.
        nbytes: Of all files.
    """

    name: str
    created: int
    entries: int
    tokens: int
    nbytes: int


def read_state(content: bytes, name: str) -> StateFile:
    """Reads the file of the snapshot `name`.

    Raises:
        DatastoreError: It is missing, torn, altered or of another format version.
    """
    try:
        header = msgspec.json.decode(content)
        if not isinstance(header, dict) or header.get("kind") != KIND:
            raise DatastoreError(f"{name}/{STATE} is no state of a snapshot.")
        if header.get("format_version") != FORMAT_VERSION:
            raise DatastoreError(
                f"{name} has format version {header.get('format_version')}; this version of retrieval_draft "
                f"reads {FORMAT_VERSION}."
            )
        file = msgspec.convert(header, StateFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DatastoreError(f"{name}/{STATE} is torn: {error}.") from error
    if file.xxh3 != _checksum(file):
        raise DatastoreError(f"{name}/{STATE} was altered: its checksum is {file.xxh3[:40]!r}.")
    file.state.check(f"{name}/{STATE}")
    _hold(0 <= file.tokens < 2**63, name, "tokens", file.tokens, "0 to 2^63 - 1")
    _hold(0 <= file.nbytes < 2**63, name, "nbytes", file.nbytes, "0 to 2^63 - 1")
    return file


def _hold(sound: object, where: str, what: str, found: object, allowed: str) -> None:
    if not sound:
        raise DatastoreError(
            f"{where}: {what} is {repr(found)[:80]}; allowed is {allowed}.", "Remove the snapshot."
        )


def sealed(file: StateFile) -> StateFile:
    """Copy of the file's contents with its checksum."""
    return msgspec.structs.replace(file, xxh3=_checksum(file))


def _checksum(file: StateFile) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(file, xxh3="")))


def describe(name: str, file: StateFile) -> SnapshotInfo:
    """Summary of a snapshot for listings."""
    return SnapshotInfo(name, file.state.created, file.state.entries, file.tokens, file.nbytes)
