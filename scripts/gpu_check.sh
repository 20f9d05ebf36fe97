#!/usr/bin/env bash
# Checks the project on a GPU, on a machine with torch and without a network: docs/gpu.md. Run
# scripts/gpu_wheels.sh first where there is one. Arguments go to `python -m benchmarks gpu_check`:
#   ./scripts/gpu_check.sh
#   ./scripts/gpu_check.sh --device cpu --tiny --seconds 60
# $OUT (gpu-check-out without) gets results.json, table.txt and log, whenever this ends.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-gpu-check-out}
wheels=${GPU_WHEELS:-.gpu-wheels}
python=${PYTHON:-python3}
mkdir -p "$out"
scratch=$(mktemp -d)
check=
# Whoever stops this stops the check, which then prints what it has.
trap '[ -z "$check" ] || kill -TERM "$check" 2>/dev/null' TERM INT
trap 'rm -rf "$scratch"' EXIT

if compgen -G "$wheels/*.whl" >/dev/null; then
    # Beside the machine's own packages; nothing of these is replaced.
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$scratch/site" "$wheels"/*.whl 2>"$scratch/pip.log" || {
        cat "$scratch/pip.log" >&2
        echo "pip could not install $wheels; unpacking it instead" >&2
        for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$scratch/site"; done
    }
fi
export PYTHONPATH="$scratch/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_HOME="$scratch/home"

mkfifo "$scratch/said"
# A signal to all of them is not to take away who prints the end.
(trap '' TERM INT && exec tee "$out/log" <"$scratch/said") &
tee=$!
"$python" -m benchmarks gpu_check --out "$out" --parts-folder "$scratch/parts" "$@" >"$scratch/said" 2>&1 &
check=$!
wait "$check"
status=$?
# A signal ends the wait, not the check.
while kill -0 "$check" 2>/dev/null; do
    wait "$check"
    status=$?
done
# The last lines are to be out, but no process left over is waited for.
for _ in {1..20}; do
    kill -0 "$tee" 2>/dev/null || break
    sleep 0.1
done
kill -KILL "$tee" 2>/dev/null
exit "$status"
