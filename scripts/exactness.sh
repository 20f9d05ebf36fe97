#!/usr/bin/env bash
# Compares greedy output with model.generate, token for token, on Gemma 3 270M in float32: 40
# prompts spread over all tasks, 96 new tokens each, the budget chosen by cost, or NODES of them in
# every step. A quarter of an hour on two cores, half an hour with NODES=60. Exits with 3 when
# anything but a near tie of the two best logits differs.
#   ./scripts/exactness.sh PROMPTS.jsonl...        options of `bench live` may follow
#   NODES=60 ./scripts/exactness.sh PROMPTS.jsonl...
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: $0 PROMPTS.jsonl... [OPTION...] (JSON lines with a prompt, or turns)" >&2
    exit 2
fi
arguments=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
    arguments+=(--prompts "$(realpath "$1")")
    shift
done
if [ -n "${NODES:-}" ]; then
    arguments+=(--nodes "$NODES")
fi
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$python" -m retrieval_draft.cli bench live --model gemma3-270m "${arguments[@]}" \
    --limit 40 --max-new-tokens 96 --methods stock,calibrated "$@"
