#!/usr/bin/env bash
# Measures and tests everything that needs a GPU, in two commands of about 400 s each, without a network. The most
# important parts run first.
#
#   profiling/gpu_check.sh figures              # device, csrc, a smoke test of each op, training steps, benchmarks
#   profiling/gpu_check.sh proof                # GPU tests, exact resume, sanitizer, benchmarks of baselines, ncu, commands
#   profiling/gpu_check.sh figures --list       # names of the parts
#   profiling/gpu_check.sh figures --only 'step|bench'  # only the parts whose names begin with this
#   profiling/gpu_check.sh proof --device cpu   # dry run: the same parts at small sizes on any machine
#
# Results go to $OUT (default profiling/results; for a dry run .gpu-check/dry-run): at most 8 files per command, complete
# after each part. The machine needs PyTorch and Triton. You can prepare other missing packages on another machine:
# `make gpu-carry` fills .carry/figures and .carry/proof, which you copy along. They are unpacked into .gpu-check, and used
# only if the machine does not have the package. $CARRY and $SCRATCH set other folders; relative paths begin at the
# repository. Each part has a time limit, and all parts together have $BUDGET seconds (default 400). A part that fails or
# hangs does not affect the others.
# See docs/develop/check_on_a_gpu.md.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=profiling/common/parts.sh
source profiling/common/parts.sh

usage() {
    echo "usage: profiling/gpu_check.sh figures|proof [--device cpu|cuda] [--only PART] [--list]" >&2
    exit 2
}
[[ ${1:-} == figures || ${1:-} == proof ]] || usage
HALF=$1 DEVICE='' ONLY='' LIST=''
shift
while [ $# -gt 0 ]; do
    case "$1" in
        --device) [[ ${2:-} == cpu || ${2:-} == cuda ]] || usage; DEVICE=$2 && shift ;;
        --only) [ -n "${2:-}" ] || usage; ONLY=$2 && shift ;;
        --list) LIST=1 ;;
        *) usage ;;
    esac
    shift
done
DEVICE=${DEVICE:-cuda}
if [[ $DEVICE == cuda && -z $LIST ]] && ! has_gpu; then
    echo "--device cpu is a dry run at small sizes" >&2
    exit 1
fi

CARRY=${CARRY:-.carry/$HALF}
SCRATCH=${SCRATCH:-.gpu-check}
[[ $SCRATCH == /* ]] || SCRATCH=$PWD/$SCRATCH
[ "$DEVICE" = cuda ] || OUT=${OUT:-$SCRATCH/dry-run} # not among the results that are committed
OUT=${OUT:-profiling/results}
BUDGET=${BUDGET:-400}
# What is compiled stays in $SCRATCH, where the second command finds it.
INSTALLED=$PYTHONPATH
export TRITON_CACHE_DIR=$SCRATCH/triton TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor PYTHONPATH=$PYTHONPATH:$SCRATCH/site
export SLOTKERNELS_STRICT=1 # a kernel that does not compile is an error here, not a reason to take the next backend
for folder in "$CARRY" .carry/figures .carry/proof; do
    [[ -n ${INTERPRETER_REVISION:-} || ! -f $folder/revision ]] || INTERPRETER_REVISION=$(cat "$folder/revision")
done
export INTERPRETER_REVISION=${INTERPRETER_REVISION:-}

# The same parts on both kinds of device; a CPU gets small sizes, and modes that it has.
if [ "$DEVICE" = cuda ]; then
    STEP=(--device cuda --preset ytvis19 --steps 10 --breakdown)
    BENCH=(--device cuda --seconds 0.5)
    SMOKE=(--device cuda --workers 6)
    SUITE=(-m gpu tests/slotkernels tests/interpreter/engine tests/interpreter/models tests/interpreter/data)
    RESUME=(-m gpu tests/interpreter/test_resume.py)
    BASELINES=(inverted propagate_l guided_l slot_u cluster merge propagate_a invariant mix broadcast recurrent slot_a
        sinkhorn_d sinkhorn_s train)
    COMMANDS=(STEPS=200 VIDEOS=32)
    WORKERS=12
else
    STEP=(--device cpu --preset demo --batch-size 2 --steps 2 --breakdown)
    BENCH=(--device cpu --seconds 0)
    SMOKE=(--device cpu --workers 1 --only slot_update propagate_labels cluster_slots)
    # Triton 3.6's interpreter does not run with NumPy 2.5: tests that need it are left out.
    SUITE=(-k "not triton" tests/slotkernels/test_dispatch.py tests/slotkernels/test_slot_attention.py tests/interpreter/engine)
    RESUME=(-k "killed_run_goes_on and image" tests/interpreter/test_resume.py)
    BASELINES=(slot_u cluster merge propagate_a)
    COMMANDS=(STEPS=4 VIDEOS=6 COMPILE=)
    WORKERS=2
fi
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider)

begin() {
    [ -z "$LIST" ] || return 0
    mkdir -p "$OUT" "$SCRATCH"
    # Results of an earlier run must not be mixed with those of this one.
    local name stale=(steps bench smoke predictions)
    [ "$HALF" = figures ] || stale=(tests bench-baselines)
    for name in "${stale[@]}"; do [ -n "$ONLY" ] || rm -f "$OUT/$name-$DEVICE".json*; done
    begin_report "$OUT/gpu-$HALF-$DEVICE" "profiling/gpu_check.sh $HALF --device $DEVICE" "$DEVICE"
}

prepare() { # what was carried, and the ops of csrc: those that were carried, or built here
    local archive=$CARRY/triton-cache.tar.xz exports=$SCRATCH/exports
    ONLY='' part "unpack" 40 env PYTHONPATH="$INSTALLED" "$PYTHON" -m profiling.gpu.unpack "$CARRY" "$SCRATCH/site"
    if [ -f "$archive" ]; then # writes the variables under which Triton finds its kernels
        ONLY='' part "unpack the kernels" 60 bash -c '"$1" -m profiling.gpu.warm_cache --unpack "$2" --out "$3" >"$4"' \
            unpack "$PYTHON" "$archive" "$TRITON_CACHE_DIR" "$exports"
    fi
    # shellcheck disable=SC1090
    [[ -n $LIST || ! -f $exports ]] || source "$exports"
    # Built for this GPU alone: for all that setup.py knows it takes three times as long.
    ONLY='' part "csrc" 120 bash -c '"$1" -m profiling.gpu.native --device "$2" || {
        [ "$2" = cpu ] || export TORCH_CUDA_ARCH_LIST=$("$1" -c "
import torch; print(*torch.cuda.get_device_capability(), sep=chr(46))")
        FORCE_CUDA=$3 MAX_JOBS=8 "$1" setup.py -q build_ext --inplace && "$1" -m profiling.gpu.native --device "$2"; }' \
        csrc "$PYTHON" "$DEVICE" "$([ "$DEVICE" = cuda ] && echo 1 || echo 0)"
}

step() { # mode, more options of profiling.step: steps of both stages, each in its own process
    for stage in image video; do
        local name="step, $stage, $*"
        if [[ $DEVICE == cpu && $1 == *captured ]]; then
            skip "$name" "a CPU has no CUDA graphs"
        else
            TAIL=3 part "$name" 80 "$PYTHON" -m profiling.step --stage "$stage" --mode "$@" "${STEP[@]}" \
                --out "$OUT/steps-$DEVICE.json"
        fi
    done
}

bench() { # part, seconds, name of the file, more options of profiling.bench
    TAIL=40 part "$1" "$2" "$PYTHON" -m profiling.bench "${BENCH[@]}" --out "$OUT/$3-$DEVICE.json" "${@:4}"
}

figures() {
    begin
    TAIL=25 part "device" 40 "$PYTHON" -m profiling.gpu.device --device "$DEVICE"
    prepare
    # torch.compile works for a minute on each stage; later processes find its results in its cache.
    background "compile the steps" 160 bash -c 'code=0
        for stage in image video; do "$@" --stage $stage --steps 1 || code=$?; done; exit $code' compile \
        "$PYTHON" -m profiling.step --mode compiled "${STEP[@]}"
    TAIL=60 part "smoke test" 110 "$PYTHON" -m profiling.gpu.smoke "${SMOKE[@]}" --out "$OUT/smoke-$DEVICE.json"
    await || rm -rf "$TORCHINDUCTOR_CACHE_DIR" # it may hold half of a file
    step captured
    step compiled-captured
    bench "benchmarks of our variants" 130 bench --variants ours --only inverted sinkhorn_d propagate_l slot_u cluster merge \
        propagate_a guided_l slot_a invariant mix broadcast recurrent sinkhorn_s
    step eager
    step captured --no-deterministic
    step compiled
    TAIL=60 part "predictions" 20 "$PYTHON" -m profiling.gpu.predictions --folder "$OUT" --device "$DEVICE"
    end_report
}

proof() {
    begin
    prepare
    local record=("${PYTEST[@]}" --durations=5) modules=" "
    [ -n "$LIST" ] || modules=$("$PYTHON" -c "
import importlib.util as u
print(*(n for n in ('xdist', 'pytest_reportlog', 'pytest_timeout') if u.find_spec(n)))")
    local resume=("${PYTEST[@]}")
    [[ $modules != *xdist* ]] || record+=(-n "$WORKERS" --dist worksteal) resume+=(-n 2)
    [[ $modules != *reportlog* ]] || record+=(--report-log "$OUT/tests-$DEVICE.jsonl") # written after each test
    [[ $modules != *timeout* ]] || record+=(--timeout 100)
    # Nothing before the benchmarks is timed, so it can run in parallel. Checking the baselines' values also compiles
    # them; the benchmarks then find them in the caches.
    background "exact resume" 300 "${resume[@]}" "${RESUME[@]}"
    TAIL=40 part "tests" 240 "${record[@]}" "${SUITE[@]}"
    sanitize memcheck
    sanitize racecheck --only inverted sinkhorn merging
    TAIL=60 part "values of the baselines" 150 "$PYTHON" -m profiling.gpu.smoke "${SMOKE[@]}" --variants all --seconds 140
    await
    bench "benchmarks with baselines" 200 bench-baselines --only "${BASELINES[@]}"
    count image '^(forward|backward)_kernel'
    count video '^sinkhorn_kernel'
    decode
    TAIL=40 part "commands" 300 env "${COMMANDS[@]}" PYTHON="$PYTHON" profiling/gpu/commands.sh
    end_report
}

sanitize() { # tool of compute-sanitizer, options of profiling.gpu.exercise
    if [ "$DEVICE" = cpu ]; then
        part "sanitizer, $1" 60 "$PYTHON" -m profiling.gpu.exercise --device cpu "${@:2}"
    elif command -v compute-sanitizer >/dev/null; then
        # PyTorch's allocator cuts tensors out of large blocks: the sanitizer would miss reads past a tensor's end.
        part "sanitizer, $1" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
            "$PYTHON" -m profiling.gpu.exercise "${@:2}"
    else
        skip "sanitizer, $1" "compute-sanitizer is not installed"
    fi
}

count() { # stage, kernels: hardware counters of the kernels of a step
    if [ "$DEVICE" = cpu ] || command -v ncu >/dev/null; then
        part "ncu, $1" 80 env OUT="$SCRATCH/ncu-$1" SUMMARY="$OUT/ncu-$1.csv" LAUNCHES=2 \
            profiling/gpu/ncu_kernel.sh "$2" --stage "$1" "${STEP[@]:2:2}"
    else
        skip "ncu, $1" "ncu is not installed"
    fi
}

decode() { # DALI's decoders of a GPU, NVDEC and nvJPEG
    if [ -z "$LIST" ] && "$PYTHON" -c "import nvidia.dali" 2>/dev/null; then
        part "decoding with DALI" 90 "${PYTEST[@]}" tests/interpreter/data/test_loaders.py -k dali
    else
        skip "decoding with DALI" "nvidia-dali is not installed, and too large to carry"
    fi
}

"$HALF"
