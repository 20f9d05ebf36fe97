#!/usr/bin/env bash
# Builds an index on a real local Ray and holds it to one that was built without. Installs the extra "ray" into
# the environment that test.sh uses; a minute or two.
#   ./scripts/test_ray.sh        options of pytest may follow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gemma,ray]' >&2
exec "$python" -m pytest -q tests/system/test_ray.py "$@"
