#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network: installs the package, runs the
# tests marked gpu, compiles the kernels ahead of time, and runs every GPU benchmark.
#
#   bench/gpu.sh              # rows and reports go to $OUT, or bench/results
#   bench/gpu.sh --dry-run    # what can be tried without a GPU: no installation, no rows
#
# PYTHON names the interpreter; it has torch, triton, pytest and hypothesis.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
dry_run=${1:-}
export OUT=${OUT:-$PWD/bench/results}
mkdir -p "$OUT"
# Kernels are compiled here; --dry-run of a benchmark asks for the interpreter itself.
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1
failed=()

run() {
    echo "== $*" >&2
    "$@" || failed+=("$*")
}

if [[ $dry_run != --dry-run ]]; then
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv
    # pip uses the torch, triton and setuptools that are there; the CUDA library needs nvcc.
    "$python" -m pip install --quiet --no-deps --no-build-isolation --no-index . || exit 1
fi
"$python" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)'
(cd tests && "$python" -m mirror_opt.cli info)

# Named by its folder: from the root, Python would find the sources before what was installed.
(cd tests && run "$python" -m pytest -m gpu --rootdir .. -c ../pyproject.toml -p no:cacheprovider .
    exit ${#failed[@]}) || failed+=("tests marked gpu")
if [[ $dry_run == --dry-run ]]; then
    run "$python" bench/aot.py --only collect
else
    run "$python" bench/aot.py > "$OUT/aot.json"
    if command -v nvcc > /dev/null; then
        run "$python" bench/aot_cuda.py > "$OUT/aot_cuda.json"
    else
        echo "nvcc is not here: the CUDA library is not measured" >&2
    fi
fi
for script in bench/*_gpu.py; do
    run "$python" "$script" $dry_run
done

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
