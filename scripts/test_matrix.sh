#!/usr/bin/env bash
# Tests with other versions of transformers than the pinned one, each in a small environment that borrows all else:
#   ./scripts/test_matrix.sh                        5.0.0 to the newest that the package index has
#   ./scripts/test_matrix.sh 5.17.0 newest          those only
#   ./scripts/test_matrix.sh 5.0.0 -- tests/unit    what follows -- goes to pytest
# Environments are kept in .venv-transformers-VERSION and made anew when constraints.txt or pyproject.toml changed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

versions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    versions+=("$1")
    shift
done
[ $# -eq 0 ] || shift
[ ${#versions[@]} -gt 0 ] || versions=(5.0.0 5.10.4 5.17.0 5.19.0 5.23.0 newest)
# Exactness, generation, batches, caches, methods, the server and the plug-in.
tests=("$@")
[ ${#tests[@]} -gt 0 ] || tests=(
    tests/system/test_exactness.py tests/system/test_batches.py tests/system/test_seeded.py tests/system/test_conversations.py
    tests/system/test_methods.py tests/system/test_server_openai.py tests/system/test_transformers_plugin.py tests/unit/engine
    tests/unit/test_serving.py tests/unit/test_drafter.py tests/unit/test_saved_drafter.py tests/unit/test_refusals.py
)

newest() {
    "$python" -m pip index versions transformers --disable-pip-version-check 2>/dev/null | sed -n '1s/.*(\(.*\)).*/\1/p'
}

# Prints the interpreter of an environment that holds transformers VERSION and what it needs, and borrows the rest.
environment_with() {
    local version=$1 venv=.venv-transformers-$1 borrowed own made
    made="$(pwd) $(cat pyproject.toml constraints.txt | cksum)"
    if [ "$(cat "$venv/.made" 2>/dev/null)" != "$made" ]; then
        rm -rf "$venv"
        "$python" -m venv "$venv" >&2
        borrowed=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        echo "$borrowed" >"$own/borrowed.pth"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "transformers==$version" >&2
        echo "$made" >"$venv/.made"
    fi
    echo "$venv/bin/python"
}

status=0
for version in "${versions[@]}"; do
    [ "$version" != newest ] || version=$(newest)
    [ -n "$version" ] || { echo "error: the package index names no version of transformers" >&2; exit 1; }
    chosen=$(environment_with "$version")
    found=$(PYTHONPATH=. "$chosen" -c 'import transformers; print(transformers.__version__)')
    [ "$found" = "$version" ] || { echo "error: $chosen imports transformers $found, not $version" >&2; exit 1; }
    echo "== transformers $version"
    PYTHONPATH=. "$chosen" -m pytest -q -p no:cacheprovider -m "not heavy" "${tests[@]}" || status=$?
done
exit "$status"
