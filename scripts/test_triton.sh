#!/usr/bin/env bash
# The Triton kernels without a card: interpreted against numpy and in captured passes, and compiled for sm_80 and sm_90.
# Triton lies in .triton, a gigabyte: beside torch for CPUs in one environment it would change torch too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

wanted=triton==3.9.0
if [ "$(cat .triton/.wanted 2>/dev/null)" != "$wanted" ]; then
    rm -rf .triton
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target .triton "$wanted"
    echo "$wanted" >.triton/.wanted
fi
export PYTHONPATH=$PWD:$PWD/.triton${PYTHONPATH:+:$PYTHONPATH} TRITON_CACHE_DIR=$PWD/.triton/.cache
pytest=("$python" -m pytest -q -p no:cacheprovider)
TRITON_INTERPRET=1 "${pytest[@]}" tests/unit/engine/graph/test_tree_attention.py
"${pytest[@]}" tests/unit/engine/graph/test_tree_attention_compiled.py
