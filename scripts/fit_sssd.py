"""Chooses the weights of the method `sssd`: one at a time, by replays of the even requests of traces.

    PYTHONPATH=. python scripts/fit_sssd.py TRACE...

Prints the tokens per step of each trace and their geometric mean. Report on what the choice has not seen.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from retrieval_draft.bench.replay import replay
from retrieval_draft.methods import sssd

GRID = {
    "OWN": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "BACKOFF": (0.1, 0.3, 1.0, 2.0),
    "SHORTER": (0.05, 0.1, 0.2, 0.4, 0.6),
}
NODES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    traces = parser.parse_args().traces
    found: dict[tuple[float, ...], float] = {}
    best = tuple(values[len(values) // 2] for values in GRID.values())
    for _ in range(2):
        for index, values in enumerate(GRID.values()):
            tried = [(*best[:index], value, *best[index + 1 :]) for value in values]
            for weights in tried:
                if weights not in found:
                    found[weights] = _tokens_per_step(weights, traces)
            best = max(tried, key=found.__getitem__)
    print(f"best: {dict(zip(GRID, best, strict=True))}")


def _tokens_per_step(weights: tuple[float, ...], traces: list[Path]) -> float:
    for name, value in zip(GRID, weights, strict=True):
        setattr(sssd, name, value)
    each = [replay([path], nodes=NODES, method="sssd", part="even")["tokens_per_step"] for path in traces]
    mean = math.exp(sum(map(math.log, each)) / len(each))
    print(f"{weights}: {', '.join(f'{value:.3f}' for value in each)}, mean {mean:.4f}", flush=True)
    return mean


if __name__ == "__main__":
    main()
