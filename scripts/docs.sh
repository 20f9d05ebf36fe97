#!/usr/bin/env bash
# Builds the site of docs/ into build/site; any warning, a dead link or anchor above all, ends it. Arguments go to mkdocs:
#   ./scripts/docs.sh                  builds
#   ./scripts/docs.sh serve            shows it at http://127.0.0.1:8000 and builds again with each change
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if ! "$python" -c 'import material, mkdocstrings_handlers.python' 2>/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]' >&2
fi
export NO_MKDOCS_2_WARNING=1
if [ $# = 0 ]; then
    set -- build --strict --quiet
fi
exec "$python" -m mkdocs "$@"
