"""Servers of two versions at one store: texts drafted from, and entries dropped, by each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.store_worker import FINGERPRINT, probe_text
from benchmarks.valkey_process import ValkeyProcess
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.errors import DatastoreError, InvalidInputError
from retrieval_draft.index.adjacency import AdjacencyMatrix
from retrieval_draft.index.shared import SharedSource
from retrieval_draft.index.source import CONTEXT, NodeLogits
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.store import SharedStore

__all__ = ["measure_versions"]

_VOCABULARY = 32000
_SECONDS = 300.0
"""Limit of a wait: another version may have to compile its kernels first."""

_OLDER = Path(__file__).with_name("store_older.py")


def measure_versions(folder: Path, older: Path, *, texts: int = 100) -> dict[str, Any]:
    """Shares texts, rows and a calibration with a server of an older version, and reads its texts.

    Args:
        folder: For the store's data, and the unpacked wheel.
        older: The wheel of an older version, or a folder with its package.
        texts: Number that each of the two shares.

    Returns:
        The other's texts that each drafts from, entries that each dropped by reason, the older's version.
    """
    if older.suffix == ".whl":
        package = folder / "older"
        try:
            with zipfile.ZipFile(older) as wheel:
                wheel.extractall(package)
        except (OSError, zipfile.BadZipFile) as error:
            raise InvalidInputError(f"Cannot read the wheel {older}: {error}.") from error
        older = package
    if not (older / "retrieval_draft").is_dir():
        raise InvalidInputError(f"{older} holds no package retrieval_draft.", "Name a wheel, or a checkout.")
    with ValkeyProcess(folder / "versions", append_only=False) as server:
        store = SharedStore(StoreConfig(server.url, share="all"), FINGERPRINT, _VOCABULARY)
        with store, _started(older.resolve(), folder, server.url, texts) as process:
            matrix = AdjacencyMatrix(1 << 18)
            store.learned.attach(matrix)
            store.share_calibration(Calibration().encode())
            for number in range(texts):
                text = probe_text(number, _VOCABULARY)
                contexts = np.array([text[:CONTEXT], text[1 : CONTEXT + 1]] * 2, np.int32)
                rows = NodeLogits(contexts, contexts[:, :2].copy(), np.full((4, 2), 0.4, np.float32))
                store._outbox.put(text[:0], text, [rows])
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise DatastoreError(f"The older server ended with {process.wait()}.")
            found = json.loads(line)
            own = [probe_text(number, _VOCABULARY) for number in range(texts, 2 * texts)]
            source = SharedSource(store)
            _wait(lambda: all(_is_drafted(source, text) for text in own))
            _wait(lambda: all(text[CONTEXT] in matrix.row(text[:CONTEXT])[0] for text in own))
            status = store.status()
            return {
                "older": found,
                "newer": {
                    "drafted": sum(_is_drafted(source, text) for text in own),
                    "learned": sum(bool(text[CONTEXT] in matrix.row(text[:CONTEXT])[0]) for text in own),
                    "dropped": status["dropped"],
                    "state": status["state"],
                },
                "texts": texts,
            }


def _started(package: Path, folder: Path, url: str, texts: int) -> subprocess.Popen[bytes]:
    config = {
        "url": url,
        "fingerprint": FINGERPRINT,
        "vocabulary": _VOCABULARY,
        "texts": texts,
        "seconds": _SECONDS,
    }
    return subprocess.Popen(
        [sys.executable, "-c", _OLDER.read_text(encoding="utf-8"), json.dumps(config)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package)},
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )


def _is_drafted(source: SharedSource, text: Any) -> bool:
    return bool(source.open(text[:40]).propose(8).tokens[:4].tolist() == text[40:44].tolist())


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end and not done():
        time.sleep(0.05)
