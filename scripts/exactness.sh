#!/usr/bin/env bash
# Compares greedy output with model.generate, token for token, on Gemma 3 270M in float32:
# 40 prompts spread over all tasks, 96 new tokens each, with the budget chosen by cost and with
# fixed trees of 8 and 60 nodes. Exits with 3 when anything but a near tie of the two best
# logits differs.
#   ./scripts/exactness.sh PROMPTS.jsonl...
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: $0 PROMPTS.jsonl... (JSON lines with a prompt, or turns)" >&2
    exit 2
fi
prompts=()
for file in "$@"; do
    prompts+=(--prompts "$(realpath "$file")")
done
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
result=0
for nodes in auto 8 60; do
    budget=()
    if [ "$nodes" != auto ]; then
        budget=(--nodes "$nodes")
    fi
    echo "== draft nodes: $nodes" >&2
    "$python" -m retrieval_draft.cli bench live --model gemma3-270m "${prompts[@]}" "${budget[@]}" \
        --limit 40 --max-new-tokens 96 --methods stock,none,calibrated || result=$?
done
exit "$result"
