#!/usr/bin/env bash
# Random calls of generate (tests/random_generate) against model.generate, until the time is up. Exits with 3
# and prints the shrunk case where one differs.
#   ./scripts/fuzz_generate.sh                      a minute, with a new seed
#   ./scripts/fuzz_generate.sh --seconds 3600 --seed 7
#   ./scripts/fuzz_generate.sh --case JSON          a printed case again
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$python" -m tests.random_generate "$@"
