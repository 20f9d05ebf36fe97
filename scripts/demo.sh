#!/usr/bin/env bash
# Generates with Gemma 3 270M and chats with SmolLM2 135M, accepted draft tokens in colour, and compares the
# speed of plain greedy decoding, prompt lookup and retrieval_draft. Sets everything up by itself.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$python" -m retrieval_draft.cli demo "$@"
