"""The command ``python -m benchmarks NAME``."""

from __future__ import annotations

import importlib
import sys

NAMES = {"gpu_check": "benchmarks.gpu_check.main"}
"""Benchmarks by name, and the module whose ``main(arguments)`` runs each and returns an exit code."""


def main(arguments: list[str]) -> int:
    """Runs the benchmark named first with the other arguments."""
    if not arguments or arguments[0] not in NAMES:
        asked = f"Unknown benchmark {arguments[0]!r}. " if arguments else ""
        print(
            f"{asked}Usage: python -m benchmarks NAME [OPTIONS]; names: {', '.join(NAMES)}.", file=sys.stderr
        )
        return 2
    return int(importlib.import_module(NAMES[arguments[0]]).main(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
