#!/usr/bin/env bash
# LangChain, litellm and `transformers chat` against a real server. The first two come into .venv-clients, a small
# environment that borrows the rest; a minute.
#   ./scripts/test_clients.sh        options of pytest may follow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

venv=.venv-clients
made="$(pwd) $(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat "$venv/.made" 2>/dev/null)" != "$made" ]; then
    rm -rf "$venv"
    "$python" -m venv "$venv" >&2
    borrowed=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    own=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$borrowed" >"$own/borrowed.pth"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt langchain-openai litellm >&2
    echo "$made" >"$venv/.made"
fi
# litellm would fetch a list of prices at import.
LITELLM_LOCAL_MODEL_COST_MAP=True PYTHONPATH=. exec "$venv/bin/python" -m pytest -q -m heavy tests/integrations/clients "$@"
