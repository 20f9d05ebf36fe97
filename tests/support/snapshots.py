"""Snapshots of the shared log, for tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from retrieval_draft.index.segments.index_folder import Manifest, _own_checksum
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.store.snapshot_state import StateFile, sealed
from retrieval_draft.index.store.snapshots import LogState, SnapshotPlace

FINGERPRINT = "f" * 32
NAMESPACE = f"{FINGERPRINT}:default"
NOW = 1_763_000_000_000
WARNED = "retrieval_draft"


def segment(*runs: list[int]) -> Segment:
    return Segment.build([np.array(run, np.int32) for run in runs], 100)


def count(found, *context: int) -> int:
    return sum(each.count(np.array(context, np.int32)) for each in found.segments)


def state(created: int = NOW, entries: int = 3, namespace: str = NAMESPACE) -> LogState:
    return LogState(namespace, {"0": "1763-5"}, {"ab": [0, 2**63 - 1]}, entries, "0" * 16, created)


def opened(where, tmp_path, namespace: str = NAMESPACE) -> SnapshotPlace:
    return SnapshotPlace(where, namespace, namespace.partition(":")[0], 100, tmp_path / "cache")


def tear_segment(folder: Path) -> None:
    path = next(folder.glob("segment-*/suffixes.npy"))
    os.truncate(path, path.stat().st_size - 4)


def reseal(
    folder: Path,
    manifest: Callable[[Any], object] = lambda _: None,
    log: Callable[[Any], object] = lambda _: None,
) -> None:
    """Changes a snapshot's manifest and state, with checksums that are right, as whoever may write it can."""
    found = msgspec.json.decode((folder / "manifest.json").read_bytes())
    manifest(found)
    made = msgspec.convert(found, Manifest)
    made.xxh3 = _own_checksum(made)
    content = msgspec.json.encode(made)
    (folder / "manifest.json").write_bytes(content)
    state_file = msgspec.json.decode((folder / "log.json").read_bytes())
    state_file["manifest"] = xxhash.xxh3_128_hexdigest(content)
    log(state_file)
    (folder / "log.json").write_bytes(msgspec.json.encode(sealed(msgspec.convert(state_file, StateFile))))
