#!/usr/bin/env bash
# Runs the tests in a virtual environment that it sets up by itself. Arguments go to pytest:
#   ./scripts/test.sh                    all but the heavy tests
#   ./scripts/test.sh -m heavy           the heavy ones: Gemma 3 270M and SmolLM2 135M, minutes
#   ./scripts/test.sh tests/unit -k tree
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$python" -m pytest -m "not heavy" "$@"
