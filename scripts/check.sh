#!/usr/bin/env bash
# Lint, format, types and import rules: the first step of .ci/run, and what to run before a commit.
# With --tests, the fast tests of the drafting rules too, under a minute in all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$(dirname "$python")/lint-imports"
if [ "${1:-}" = --tests ]; then
    exec "$python" -m pytest -q tests/unit/index/test_suffix_automaton.py tests/unit/drafting/test_fusion.py \
        tests/unit/test_refusals.py tests/unit/test_drafter.py tests/unit/test_layout.py
fi
