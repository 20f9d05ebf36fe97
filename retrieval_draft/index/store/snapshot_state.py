"""The file of a snapshot that says where in the log it stands."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import xxhash

from retrieval_draft.errors import DatastoreError

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


class LogState(msgspec.Struct, frozen=True):
    """Where in the log a set of segments stands.

    Attributes:
        namespace: ``fingerprint:tenant``.
        positions: For each shard the id of the last entry that is in.
        writers: For each server, in hex, the bounds of its `SequenceSet`.
        entries: That are in.
        digest: Of all of them, in hex.
        created: Milliseconds since the epoch.
    """

    namespace: str
    positions: dict[str, str]
    writers: dict[str, list[int]]
    entries: int
    digest: str
    created: int


class StateFile(msgspec.Struct, frozen=True):
    """What the file holds.

    Attributes:
        kind: Always `KIND`.
        format_version: Of the snapshot's layout.
        state: Where in the log it stands.
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
        entries: Of the log that are in.
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
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DatastoreError(f"{name}/{STATE} is torn: {error}.") from error
    if file.xxh3 != _checksum(file):
        raise DatastoreError(f"{name}/{STATE} was altered: its checksum is {file.xxh3}.")
    return file


def sealed(file: StateFile) -> StateFile:
    """The same with its checksum."""
    return msgspec.structs.replace(file, xxh3=_checksum(file))


def _checksum(file: StateFile) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(file, xxh3="")))


def describe(name: str, file: StateFile) -> SnapshotInfo:
    """What a listing says of a snapshot."""
    return SnapshotInfo(name, file.state.created, file.state.entries, file.tokens, file.nbytes)
