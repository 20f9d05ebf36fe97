"""Pictures, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrieval_draft.errors import InvalidInputError

__all__ = ["new_figure", "save_figure"]


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches.

    Raises:
        InvalidInputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidInputError(
            "A picture needs matplotlib.", 'Install it: pip install "retrieval_draft[bench]".'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure.

    Raises:
        InvalidInputError: The file cannot be written, or its suffix is no picture's.
    """
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path}: {error}.", "Name a .png or .svg file.") from error
