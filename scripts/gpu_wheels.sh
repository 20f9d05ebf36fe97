#!/usr/bin/env bash
# Fetches the wheels that a machine with a GPU lacks for scripts/gpu_check.sh, while there is a network:
#   ./scripts/gpu_wheels.sh           for a machine with torch, transformers, numba, typer, pytest and the like
#   ./scripts/gpu_wheels.sh --bare    for one with torch and numpy only
# They go to .gpu-wheels/, which git ignores and which travels along. PYTHON_TAG=311 names another Python than 3.12,
# GPU_WHEELS=FOLDER another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${GPU_WHEELS:-.gpu-wheels}
tag=${PYTHON_TAG:-312}
python=${PYTHON:-python3}

given=(--only-binary=:all: --implementation cp --python-version "$tag" --abi "cp$tag" --abi abi3 --abi none)
for old in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1; do
    given+=(--platform "${old}_x86_64")
done

rm -rf "$folder"
mkdir -p "$folder"
fetch() { "$python" -m pip download --quiet --disable-pip-version-check -d "$folder" -c constraints.txt "${given[@]}" "$@"; }
case ${1:-} in
    "") fetch --no-deps msgspec pyahocorasick redis hiredis ;;
    --bare)
        # What pyproject.toml asks for, without torch and numpy, and what the tests need.
        fetch filelock msgspec numba pyahocorasick "redis[hiredis]" rich safetensors tokenizers transformers typer \
            xxhash pytest pytest-timeout
        # numpy is there; hf-xet only downloads.
        rm -f "$folder"/numpy-* "$folder"/hf_xet-*
        ;;
    *)
        echo "usage: $0 [--bare]" >&2
        exit 2
        ;;
esac
ls -lS "$folder" | awk 'NR > 1 {printf "%8.2f MB  %s\n", $5 / 1e6, $9}'
du -cb "$folder"/*.whl | awk 'END {printf "%8.2f MB in all\n", $1 / 1e6}'
