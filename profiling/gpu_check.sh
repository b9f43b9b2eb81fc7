#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under ten minutes, without a network: the build of csrc, all
# tests that need a GPU, memory checks, captured training steps, benchmarks, and what limits the kernels.
#
#   profiling/gpu_check.sh                      # report in profiling/results/gpu-check-cuda.{json,md}
#   OUT=/elsewhere profiling/gpu_check.sh
#   profiling/gpu_check.sh --device cpu         # dry run of the whole script at small sizes, on any machine
#
# Needs PyTorch and Triton, for csrc nvcc. What else is missing may lie as wheels (profiling/fetch_wheels.sh) in $WHEELS
# (default: wheels). Each part has its own time limit, and all together have $BUDGET seconds (default 580): a part that
# fails or hangs does not lose the others, nor does a kill of the whole, since the report is whole after each part.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=profiling/parts.sh
source profiling/parts.sh
OUT=${OUT:-profiling/results}
WHEELS=${WHEELS:-wheels}
BUDGET=${BUDGET:-580}
mkdir -p "$OUT"
case "${1:-} ${2:-}" in
    " ") DEVICE=$("$PYTHON" -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')") || exit 1 ;;
    "--device cpu" | "--device cuda") DEVICE=$2 ;;
    *)
        echo "usage: profiling/gpu_check.sh [--device cpu|cuda]" >&2
        exit 2
        ;;
esac
[ "$DEVICE" = cpu ] || has_gpu || exit 1
begin_report "$OUT/gpu-check-$DEVICE" "GPU check" "$DEVICE"
export SLOTKERNELS_STRICT=1  # a kernel that cannot be built is an error, not served by another backend

if compgen -G "$WHEELS/*.whl" >/dev/null; then
    SITE=$(mktemp -d)
    trap 'rm -rf "$SITE"' EXIT
    part "wheels" 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$SITE" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$SITE"
fi
PYTEST=("$PYTHON" -m pytest -q -p no:cacheprovider --durations=5)
"$PYTHON" -c "import xdist" 2>/dev/null && PYTEST+=(-n "$([ "$DEVICE" = cuda ] && echo 8 || echo 2)" --dist loadfile)

part "device" 30 "$PYTHON" -c "
from profiling.timing import machine
import json; print(json.dumps(machine('$DEVICE'), indent=1))"

steps() { # mode, more options of profiling.step
    local stage mode=$1
    shift
    for stage in image video; do
        part "$mode step of the $stage stage" 90 "$PYTHON" -m profiling.step --stage "$stage" --mode "$mode" \
            --device "$DEVICE" --breakdown --out "$OUT/step-$stage-$DEVICE.json" "$@"
    done
}

if [ "$DEVICE" = cuda ]; then
    NVCC=$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
    if [ -x "$NVCC" ]; then
        part "build of csrc" 150 env FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$("$PYTHON" -c \
            "import torch; print('%d.%d' % torch.cuda.get_device_capability())")" MAX_JOBS=8 \
            "$PYTHON" setup.py build_ext --inplace
    else
        skip "build of csrc" "there is no nvcc"
    fi
    steps captured --preset ytvis19
    part "kernels against their oracles, full size" 200 "${PYTEST[@]}" -m gpu tests/slotkernels
    part "training step, memory and loaders" 120 "${PYTEST[@]}" -m gpu tests --ignore=tests/slotkernels
    if command -v compute-sanitizer >/dev/null; then
        for one in "test_merging.py cuda" "test_inverted_attention.py float32-triton-cuda and 863"; do
            part "compute-sanitizer, ${one#* }" 90 compute-sanitizer --tool memcheck --error-exitcode 9 \
                "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu -k "${one#* }" "tests/slotkernels/${one%% *}"
        done
    else
        skip "compute-sanitizer" "it is not installed"
    fi
    part "benchmarks" 240 "$PYTHON" -m profiling.bench --device cuda --seconds 2 --out "$OUT/bench-cuda.json"
    for one in "image ^(forward|backward)_kernel" "video ^sinkhorn_kernel"; do
        if command -v ncu >/dev/null; then
            part "ncu, ${one#* }" 60 env OUT="$OUT/ncu-${one%% *}" LAUNCHES=2 profiling/ncu_kernel.sh "${one#* }" \
                --stage "${one%% *}" --preset ytvis19
        else
            skip "ncu, ${one#* }" "ncu is not installed"
        fi
    done
else
    part "kernels against their oracles, interpreted" 200 "${PYTEST[@]}" \
        -k "triton and not opcheck" tests/slotkernels/test_propagation_labels.py tests/slotkernels/test_slot_update.py
    steps eager --batch-size 2 --steps 2
    part "ncu, dry run" 60 env OUT="$OUT" profiling/ncu_kernel.sh forward_kernel --stage image
    part "nsys, dry run" 60 env OUT="$OUT" profiling/nsys_step.sh --stage image
    part "benchmarks" 180 "$PYTHON" -m profiling.bench --device cpu --seconds 0 --only slot_update cluster_slots \
        --out "$OUT/trial-bench.json"
fi
part "resources of the kernels, as pinned" 30 "${PYTEST[@]}" tests/profiling/test_resources.py -m "not slow"
end_report
