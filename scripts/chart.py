"""Draws the README's picture from what `bench live --out` wrote.

python scripts/chart.py COST.json FIXED.json docs/live.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

NAMES = {
    "stock": "model.generate",
    "stock-pld": "prompt lookup",
    "none": "our loop, no drafts",
    "calibrated": "retrieval_draft",
}
COLOURS = {"stock": "#9aa5b1", "stock-pld": "#5b8db8", "none": "#c4b08b", "calibrated": "#d1495b"}


def main(cost_file: str, fixed_file: str, out: str) -> None:
    cost: dict[str, Any] = json.loads(Path(cost_file).read_text(encoding="utf-8"))
    fixed: dict[str, Any] = json.loads(Path(fixed_file).read_text(encoding="utf-8"))
    mpl.rcParams.update({"svg.hashsalt": "retrieval_draft", "font.size": 10})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.1), width_ratios=[1, 1.7])

    names = [name for name in NAMES if name in cost["methods"]]
    ratios = [cost["methods"][name]["ratio_to_stock"] for name in names]
    middles = [ratio["median"] for ratio in ratios]
    spread = [
        [ratio["median"] - ratio["p10"] for ratio in ratios],
        [ratio["p90"] - ratio["median"] for ratio in ratios],
    ]
    left.barh(
        [NAMES[name] for name in names],
        middles,
        xerr=spread,
        color=[COLOURS[name] for name in names],
        error_kw={"ecolor": "#444", "elinewidth": 1},
    )
    left.invert_yaxis()
    left.axvline(1, color="#444", linewidth=0.8)
    left.set_title("tokens a second against model.generate\n(median of prompts, p10 to p90)", fontsize=10)

    tasks = sorted(fixed["by_task"])
    methods = [name for name in ("stock-pld", "calibrated") if name in fixed["methods"]]
    height = 0.8 / len(methods)
    for number, name in enumerate(methods):
        right.barh(
            [index + number * height for index in range(len(tasks))],
            [fixed["by_task"][task][name]["tokens_per_step"] for task in tasks],
            height,
            color=COLOURS[name],
            label=NAMES[name],
        )
    right.set_yticks([index + 0.2 for index in range(len(tasks))], tasks)
    right.invert_yaxis()
    right.axvline(1, color="#444", linewidth=0.8)
    right.legend(frameon=False, fontsize=9)
    right.set_title(f"tokens per forward pass, {fixed['nodes']} draft nodes", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("")
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
