"""Snapshots of the shared log, for tests."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from retrieval_draft.index.segment import Segment
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
