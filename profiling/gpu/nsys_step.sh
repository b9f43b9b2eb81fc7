#!/usr/bin/env bash
# Traces training steps of a stage with Nsight Systems: time between and inside kernels (docs/develop/trace_a_step.md).
#
#   profiling/gpu/nsys_step.sh --stage video --preset ytvis19                  # eager: all NVTX ranges
#   profiling/gpu/nsys_step.sh --stage image --preset ytvis19 --mode captured  # options are those of profiling.step
#   OUT=/elsewhere profiling/gpu/nsys_step.sh …                                # default profiling/results
#
# Summaries (CSV) go to $OUT/nsys_*.csv; the trace itself, step.nsys-rep for Nsight's window, is not for git.
# Without nsys or a GPU, it prints what is missing and takes one step on the CPU, to show that the rest works.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=profiling/common/parts.sh
source profiling/common/parts.sh
OUT=${OUT:-profiling/results}
mkdir -p "$OUT"

if ! present nsys "comes with the CUDA toolkit, or from developer.nvidia.com/nsight-systems" || ! has_gpu; then
    echo "dry run: one step on the CPU, without a trace"
    exec "$PYTHON" -m profiling.step "$@" --steps 1 --batch-size 2 --device cpu --mode eager
fi
"$PYTHON" -c "import nvtx" 2>/dev/null || echo "missing: the Python package nvtx; the trace will have no ranges" >&2
nsys profile --trace=cuda,nvtx,cudnn,cublas --cuda-graph-trace=node --capture-range=cudaProfilerApi \
    --capture-range-end=stop --force-overwrite=true --output="$OUT/step" \
    "$PYTHON" -m profiling.step --device cuda --cuda-profiler "$@"
nsys stats --force-export=true --format=csv --output="$OUT/nsys" \
    --report=cuda_gpu_kern_sum,cuda_gpu_mem_time_sum,cuda_api_sum,nvtx_sum,nvtx_gpu_proj_sum,nvtx_kern_sum \
    "$OUT/step.nsys-rep"
ls -l "$OUT"/nsys_*.csv
