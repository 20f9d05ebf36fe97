"""Fits the calibration that ships with the package: replays the even requests of traces, three times over.

    PYTHONPATH=. python scripts/fit_priors.py TRACE... [--onto] [--part all] [--out FILE]

Rates fall from pass to pass. What cells counted is left out: it is soon counted again, and on traces of
another model it did harm. Measure on what was not fitted: ``bench replay TRACE --part odd [--no-priors]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from retrieval_draft.bench.replay import replay
from retrieval_draft.drafting.calibration import PRIORS, Calibration

RATES = (0.01, 0.005, 0.002)
NODES = (60, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--part", default="even", help="all, for traces that nothing is measured on")
    parser.add_argument("--onto", action="store_true", help="start from the shipped priors, in two passes")
    parser.add_argument("--out", type=Path, default=PRIORS)
    arguments = parser.parse_args()
    calibration = Calibration(priors=arguments.onto)
    for rate in RATES[arguments.onto :]:
        for nodes in NODES:
            calibration.rate = rate
            found = replay(arguments.traces, nodes=nodes, part=arguments.part, calibration=calibration)
            log_loss = found["calibration"]["log_loss"]
            print(
                f"rate {rate}, {nodes} nodes: {found['tokens_per_step']:.4f} tokens per step, {log_loss=:.5f}"
            )
    calibration.expected[:] = calibration.accepted[:] = 0.0
    calibration.save(arguments.out)
    print(f"{arguments.out} written")


if __name__ == "__main__":
    main()
