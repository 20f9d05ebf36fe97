"""Calibration saved in the history's folder from one process to the next, and passed between servers."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.store.store import SharedStore

__all__ = [
    "CALIBRATION",
    "FleetCalibration",
    "calibration_file",
    "keep_calibration",
    "load_calibration",
]

CALIBRATION = "calibration.safetensors"
"""Name of the calibration's file in the history's folder."""

NEW_REQUESTS = 16
"""Requests up to which a server is new, and starts over with the fleet's; later its own is better."""

TAUGHT_REQUESTS = 64
"""Requests from which on a server's calibration is worth sending."""

_log = logging.getLogger("retrieval_draft")


def calibration_file(config: DraftConfig) -> Path | None:
    """Path of the saved calibration; None without a history folder."""
    folder = config.history_folder
    return None if folder is None or "history" not in config.sources else Path(folder, CALIBRATION)


def load_calibration(path: Path | None) -> Calibration:
    """The saved calibration, or the shipped priors where there is none or the file is torn.

    Args:
        path: From `calibration_file`.
    """
    calibration = Calibration()
    if path is not None and path.exists():
        try:
            calibration.load(path)
        except DatastoreError as error:
            _log.warning("Calibration starts afresh. %s", error)
    return calibration


def keep_calibration(calibration: Calibration | None, path: Path | None) -> None:
    """Saves a calibration. On a full disk it is lost, and nothing else fails.

    Args:
        calibration: None where nothing was drafted yet.
        path: From `calibration_file`.
    """
    if path is not None and calibration is not None:
        try:
            calibration.save(path)
        except OSError as error:
            _log.warning("Calibration could not be saved to %s: %s", path, error)


class FleetCalibration:
    """Passes calibrations between servers: a new one starts with the newest that another has sent.

    Of all servers together about one in ten minutes sends its own (`SharedStore.wants_calibration`).

    Args:
        store: The shared store; None for no exchange.
        is_new: Whether this server's calibration comes from no folder.
    """

    def __init__(self, store: SharedStore | None, is_new: bool) -> None:
        self._store = store
        self._is_new = is_new
        self._requests = 0

    def exchange(self, calibration: Calibration) -> None:
        """Takes over or sends a calibration, if it is time; called as a request starts, by its thread."""
        if self._store is None:
            return
        self._requests += 1
        if self._is_new and self._requests <= NEW_REQUESTS:
            content = self._store.learned.calibration
            if content:
                self._is_new = False
                try:
                    calibration.decode(content, "What was received")
                except DatastoreError as error:
                    _log.warning("The calibration of another server cannot be used. %s", error)
        elif self._requests >= TAUGHT_REQUESTS and self._store.wants_calibration():
            threading.Thread(
                target=self._send,
                args=(self._store, calibration),
                name="retrieval_draft calibration",
                daemon=True,
            ).start()

    @staticmethod
    def _send(store: SharedStore, calibration: Calibration) -> None:
        store.share_calibration(calibration.encode())
