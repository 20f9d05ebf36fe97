#!/usr/bin/env bash
# Tests the draft model for llama-cpp-python on the real engine and a real GGUF file (Gemma 3 270M), in an
# environment of its own: pip compiles llama.cpp, a quarter of an hour on two cores, once.
#   ./scripts/test_llama_cpp.sh        options of pytest may follow
set -euo pipefail
export RETRIEVAL_DRAFT_VENV=${RETRIEVAL_DRAFT_VENV:-.venv-llama}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if ! "$python" -c 'import llama_cpp' 2>/dev/null; then
    echo "Compiling llama.cpp (once)" >&2
    # Only its libraries: no web page, no tools.
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} \
        CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF ${CMAKE_ARGS:-}" \
        "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llama]' >&2
fi
exec "$python" -m pytest -q tests/integrations/llama_cpp "$@"
