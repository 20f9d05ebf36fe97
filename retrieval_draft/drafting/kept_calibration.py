"""Calibration that stays beside the history's folder from one process to the next."""

from __future__ import annotations

import logging
from pathlib import Path

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.errors import DatastoreError

__all__ = ["CALIBRATION", "calibration_file", "keep_calibration", "load_calibration"]

CALIBRATION = "calibration.safetensors"
"""Its file in the history's folder."""

_log = logging.getLogger("retrieval_draft")


def calibration_file(config: DraftConfig) -> Path | None:
    """Where it is kept; None where there is no history folder."""
    folder = config.history_folder
    return None if folder is None or "history" not in config.sources else Path(folder, CALIBRATION)


def load_calibration(path: Path | None) -> Calibration:
    """What was learned before, or the shipped priors; a torn file costs only that.

    Args:
        path: As `calibration_file` says.
    """
    calibration = Calibration()
    if path is not None and path.exists():
        try:
            calibration.load(path)
        except DatastoreError as error:
            _log.warning("Calibration starts afresh. %s", error)
    return calibration


def keep_calibration(calibration: Calibration | None, path: Path | None) -> None:
    """Writes what was learned. A full disk costs that, nothing else.

    Args:
        calibration: None where nothing was drafted yet.
        path: As `calibration_file` says.
    """
    if path is not None and calibration is not None:
        try:
            calibration.save(path)
        except OSError as error:
            _log.warning("Calibration could not be saved to %s: %s", path, error)
