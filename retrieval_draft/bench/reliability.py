"""Calibration error: predicted against observed acceptance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._figure import new_figure, save_figure
from retrieval_draft.drafting.tree import DraftTree

__all__ = ["Reliability", "plot_reliability"]

BINS = 20


class Reliability:
    """Predicted against observed acceptance, in bins of equal width.

    The error is the expected calibration error (Naeini et al. 2015): the distance of the two in each bin,
    weighted by observations. Two things are predicted: that a node is accepted if its parent is (observed
    for children of accepted nodes), and that the whole path to a node is (observed for every node).
    """

    def __init__(self) -> None:
        self._nodes = np.zeros((3, BINS))
        self._paths = np.zeros((3, BINS))
        self._log_loss = 0.0

    def observe(self, tree: DraftTree, outcomes: NDArray[np.int8]) -> None:
        """Adds a step.

        Args:
            tree: The verified tree.
            outcomes: int8, shape (n + 1,). As `Calibration.observe` returns them.
        """
        known = np.flatnonzero(outcomes >= 0)
        _add(self._nodes, tree.probs[known], outcomes[known])
        kept = np.clip(tree.probs[known].astype(np.float64), 1e-9, 1 - 1e-9)
        self._log_loss -= float(np.log(np.where(outcomes[known] > 0, kept, 1 - kept)).sum())
        _add(self._paths, tree.path_probs[1:], outcomes[1:] > 0)

    def summary(self) -> dict[str, Any]:
        """Errors, the log loss of a node, and for each bin: mean prediction, share accepted, observations."""
        seen, predicted, taken = self._nodes
        filled = seen > 0
        return {
            "error": _error(self._nodes),
            "path_error": _error(self._paths),
            "log_loss": self._log_loss / max(seen.sum(), 1),
            "bins": [
                [float(p), float(t), int(s)]
                for p, t, s in zip(
                    predicted[filled] / seen[filled], taken[filled] / seen[filled], seen[filled], strict=True
                )
            ],
        }


def _add(sums: NDArray[np.float64], probs: NDArray[np.float32], taken: NDArray[Any]) -> None:
    bins = np.minimum((probs * BINS).astype(np.int64), BINS - 1)
    np.add.at(sums[0], bins, 1)
    np.add.at(sums[1], bins, probs)
    np.add.at(sums[2], bins, taken)


def _error(sums: NDArray[np.float64]) -> float:
    return float(np.abs(sums[1] - sums[2]).sum() / max(sums[0].sum(), 1))


def plot_reliability(summary: dict[str, Any], path: Path) -> None:
    """Plots predicted against observed acceptance, and the number of nodes of each bin.

    Args:
        summary: Of `Reliability.summary`.
        path: A .png or .svg file.

    Raises:
        InvalidInputError: matplotlib is missing, or the file's suffix is no picture's.
    """
    predicted, taken, seen = np.array(summary["bins"]).T
    figure = new_figure(4.8, 5.6)
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    upper.plot((0, 1), (0, 1), color="0.7", linewidth=1)
    upper.plot(predicted, taken, marker="o", markersize=4)
    upper.set_ylabel("share accepted")
    upper.set_title(f"expected calibration error {summary['error']:.4f}", fontsize=10)
    lower.bar(predicted, seen, width=0.7 / BINS)
    lower.set_yscale("log")
    lower.set_ylabel("nodes")
    lower.set_xlabel("calibrated probability that a node is accepted")
    save_figure(figure, path)
