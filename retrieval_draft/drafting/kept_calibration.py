"""Calibration saved in the history's folder from one process to the next."""

from __future__ import annotations

import logging
from pathlib import Path

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.errors import DatastoreError

__all__ = ["CALIBRATION", "calibration_file", "keep_calibration", "load_calibration"]

CALIBRATION = "calibration.safetensors"
"""Name of the calibration's file in the history's folder."""

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
