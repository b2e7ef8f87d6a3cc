#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network: installs the package, runs the
# tests marked gpu, and runs every GPU benchmark, what matters most first.
#
#   bench/gpu.sh              # rows and logs go to $OUT, or bench/results
#   bench/gpu.sh --dry-run    # what can be tried without a GPU: no installation, no rows
#
# PYTHON names the interpreter; it has torch, triton, pytest and hypothesis. LIMIT is how many seconds
# there are for all of it: parts have shares of their own, and those that time leaves no room for are
# named at the end. Rows are written as they are measured.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
dry_run=${1:-}
export OUT=${OUT:-$PWD/bench/results}
mkdir -p "$OUT"
# Kernels are compiled here; --dry-run of a benchmark asks for the interpreter itself.
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1
deadline=$((SECONDS + ${LIMIT:-570}))
failed=()

# part SECONDS COMMAND...: at most so long, and what it prints is in $OUT/gpu.log too.
part() {
    local share=$1 left=$((deadline - SECONDS)) started=$SECONDS
    shift
    if ((left < 5)); then
        failed+=("no time left for: $*")
        return
    fi
    echo "== $*" | tee -a "$OUT/gpu.log"
    timeout --kill-after=5 $((share < left ? share : left)) "$@" 2>&1 | tee -a "$OUT/gpu.log"
    local status=${PIPESTATUS[0]}
    echo "== $((SECONDS - started)) s, status $status" | tee -a "$OUT/gpu.log"
    ((status == 0)) || failed+=("status $status: $*")
    return "$status"
}

install() {
    # pip uses the torch, triton and setuptools that are there.
    MIRROR_OPT_BUILD_EXT=$1 part 120 "$python" -m pip install --no-deps --no-build-isolation \
        --no-index .
}

: > "$OUT/gpu.log"
if [[ $dry_run != --dry-run ]]; then
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv
    install cuda || install 0 || exit 1
fi
"$python" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)'

cd tests # from the root, Python would find the sources before what was installed
part 30 "$python" -m mirror_opt.cli info
# The files that have such tests: the others take long to import. Warnings of a release that is new
# here are no failures, and what is compiled is compiled side by side.
mapfile -t files < <(grep -lE 'mark\.gpu|triton_cases|ops_cases' test_*.py)
workers=()
"$python" -c 'import xdist' 2> /dev/null && workers=(-n 8)
part 200 "$python" -m pytest -m gpu --rootdir .. -c ../pyproject.toml -o addopts= -W default \
    -p no:cacheprovider -rfE --tb=short --junitxml="$OUT/gpu-tests.xml" "${workers[@]}" "${files[@]}"
cd ..

part 100 "$python" bench/step_gpu.py --contenders uncompiled --units 8 $dry_run
part 80 "$python" bench/kronecker_gpu.py --repeats 50 $dry_run
part 60 "$python" bench/train_step_gpu.py --ways eager,graph $dry_run
part 100 "$python" bench/step_gpu.py --contenders uncompiled --units 4,16 $dry_run
part 200 "$python" bench/train_step_gpu.py --ways compiled $dry_run
part 300 "$python" bench/step_gpu.py --contenders compiled --units 8 --models= $dry_run

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
