"""The command ``python -m benchmarks NAME``: evidence for docs/benchmarks.md, from a checkout."""

from __future__ import annotations

import sys

GPU_CHECK = "gpu_check"
"""Benchmark that needs torch and numpy only, as on a bare GPU machine: it runs before other imports."""


def main(arguments: list[str]) -> int:
    """Runs the benchmark named first with the other arguments; returns its exit code, or exits with it."""
    if arguments[:1] == [GPU_CHECK]:
        from benchmarks.gpu_check.main import main as check

        return check(arguments[1:])
    from benchmarks.commands import app
    from retrieval_draft.cli import main as run

    run(arguments, app)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
