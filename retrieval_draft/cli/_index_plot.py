"""The picture of ``index inspect --plot``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from retrieval_draft._figure import new_figure, save_figure

if TYPE_CHECKING:
    from retrieval_draft.index.segments.describe import Description

__all__ = ["plot_description"]


def plot_description(found: Description, tokens: int, path: Path) -> None:
    """Plots the lengths of repeated text, and the numbers of continuations of contexts.

    Raises:
        InvalidInputError: matplotlib is missing, or the file's suffix is no picture's.
    """
    figure = new_figure(9.6, 3.4)
    left, right = figure.subplots(1, 2)
    left.bar(range(len(found.match_lengths)), found.match_lengths / max(found.sampled, 1), width=1.0)
    left.set_xlabel("tokens that a position has in common with another (64: or more)")
    left.set_ylabel("share of positions")
    left.set_title(f"{tokens:,} tokens, {found.sampled} sampled", fontsize=10)
    lengths = [length for length, counts in found.branching.items() if len(counts)]
    if lengths:
        right.boxplot([found.branching[length] for length in lengths], whis=(5, 95), showfliers=False)
        right.set_xticklabels([str(length) for length in lengths])
    right.set_yscale("symlog", linthresh=1)
    right.set_xlabel("tokens of context")
    right.set_ylabel("different next tokens (5% to 95%)")
    save_figure(figure, path)
