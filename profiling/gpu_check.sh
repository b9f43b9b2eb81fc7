#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under ten minutes: GPU tests, memory checks, benchmarks.
#
#   profiling/gpu_check.sh                 # results in profiling/results
#   OUT=/elsewhere profiling/gpu_check.sh
#
# Needs PyTorch with CUDA, Triton, pytest and rich; for csrc setuptools and nvcc; no network. On a machine without them and without a network, put the
# wheels of profiling/fetch_wheels.sh beside it and install those first. Each part has its own time limit, and one that
# fails does not stop the others. Without a GPU it runs its parts on the CPU at small sizes, to try the script itself.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-profiling/results}
mkdir -p "$OUT"
DEVICE=$($PYTHON -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')") || exit 1
REPORT="$OUT/gpu-check.md"
echo "# GPU check, $(date -u +%F), $(git rev-parse --short HEAD 2>/dev/null || echo 'no git'), $DEVICE" >"$REPORT"
FAILED=0

part() { # name, seconds, command: its output goes to the screen, its last lines and its fate to the report
    local name=$1 seconds=$2 log
    shift 2
    log=$(mktemp)
    echo "== $name (at most ${seconds} s)"
    local begin=$SECONDS code=0
    timeout "$seconds" "$@" 2>&1 | tee "$log" || code=$?
    [ "$code" = 0 ] || FAILED=$((FAILED + 1))
    {
        printf '\n## %s: %s, %s s\n\n```\n' "$name" "$([ "$code" = 0 ] && echo passed || echo "failed ($code)")" $((SECONDS - begin))
        tail -n 60 "$log"
        printf '```\n'
    } >>"$REPORT"
    rm -f "$log"
}

part device 30 "$PYTHON" -c "
from profiling.timing import machine
import json; print(json.dumps(machine('$DEVICE'), indent=1))"

if [ "$DEVICE" = cuda ]; then
    NVCC=$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
    if [ -x "$NVCC" ]; then
        part "build of csrc" 200 env FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$("$PYTHON" -c \
            "import torch; print('%d.%d' % torch.cuda.get_device_capability())")" MAX_JOBS=8 \
            "$PYTHON" setup.py build_ext --inplace
    fi
    part "kernel tests" 240 "$PYTHON" -m pytest -q -p no:cacheprovider tests/slotkernels -m gpu
    part "benchmark of slot attention" 240 "$PYTHON" -m profiling.slot_attention --device cuda --seconds 4 \
        --out "$OUT/slot-attention-cuda.json"
    part "benchmark of the Sinkhorn divergence" 180 "$PYTHON" -m profiling.sinkhorn --device cuda --seconds 4 --large 0 \
        --out "$OUT/sinkhorn-cuda.json"
    part "benchmark of label maps" 60 "$PYTHON" -m profiling.propagation --device cuda --seconds 3 \
        --out "$OUT/propagation-cuda.json"
    part "benchmark of clustering" 60 "$PYTHON" -m profiling.merging --device cuda --seconds 3 \
        --out "$OUT/merging-cuda.json"
    part "training step and loaders" 150 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/interpreter/engine \
        tests/interpreter/data/test_loaders.py
    part "benchmark of training steps" 150 "$PYTHON" -m profiling.training --preset ytvis19 --device cuda --seconds 5 \
        --out "$OUT/training-cuda.json"
    if command -v compute-sanitizer >/dev/null; then
        part "compute-sanitizer" 90 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q \
            -p no:cacheprovider tests/slotkernels/test_inverted_attention.py -m gpu -k "float32-triton-cuda and 863"
    fi
else
    part "kernel tests, interpreted" 240 "$PYTHON" -m pytest -q -p no:cacheprovider tests/slotkernels -k "triton and not opcheck"
    part "benchmark of slot attention" 200 "$PYTHON" -m profiling.slot_attention --shapes 2,96,8,64 --seconds 1 --dtypes float32 \
        --out "$OUT/slot-attention-trial.json"
    part "benchmark of the Sinkhorn divergence" 120 "$PYTHON" -m profiling.sinkhorn --shapes 4,8,8,16 --seconds 1 --large 0 \
        --out "$OUT/sinkhorn-trial.json"
    part "benchmark of training steps" 120 "$PYTHON" -m profiling.training --batch-size 4 2 --seconds 0 \
        --out "$OUT/training-trial.json"
    part "benchmark of label maps" 60 "$PYTHON" -m profiling.propagation --seconds 0 --out "$OUT/propagation-trial.json"
    part "benchmark of clustering" 60 "$PYTHON" -m profiling.merging --seconds 0 --out "$OUT/merging-trial.json"
fi

echo
echo "$REPORT: $FAILED parts failed"
[ "$FAILED" = 0 ]
