#!/usr/bin/env bash
# Measures kernels of a training step with Nsight Compute, to find what limits them (docs/develop/trace_a_step.md).
#
#   profiling/gpu/ncu_kernel.sh '^forward_kernel' --stage image --preset ytvis19  # then options of profiling.step
#   LAUNCHES=3 SKIP=2 profiling/gpu/ncu_kernel.sh '^sinkhorn_kernel' --stage video --preset ytvis19
#
# Skips the first SKIP launches of the kernel (default 0), then measures LAUNCHES of them (default 1); ncu replays each
# one many times with flushed caches. Clocks are not changed, because other programs may share the card. If ncu reports
# ERR_NVGPUCTRPERM, an administrator must allow performance counters. It writes $SUMMARY (default $OUT/ncu-details.csv), a
# summary by section with ncu's advice; $OUT/ncu-raw.csv, every metric; and $OUT/kernel.ncu-rep for Nsight's window, which
# is not for git. Without ncu or a GPU, it prints what is missing and takes one step on the CPU, to show that the rest
# works.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=profiling/common/parts.sh
source profiling/common/parts.sh
OUT=${OUT:-profiling/results}
SUMMARY=${SUMMARY:-$OUT/ncu-details.csv}
kernel=${1:?the name of a kernel, a regular expression; then options of profiling.step}
shift
mkdir -p "$OUT" "$(dirname "$SUMMARY")"

if ! present ncu "comes with the CUDA toolkit, or from developer.nvidia.com/nsight-compute" || ! has_gpu; then
    echo "dry run: one step on the CPU, without measuring $kernel"
    exec "$PYTHON" -m profiling.step "$@" --steps 1 --batch-size 2 --device cpu --mode eager
fi
ncu --set full --clock-control none --kernel-name "regex:$kernel" --launch-skip "${SKIP:-0}" \
    --launch-count "${LAUNCHES:-1}" --profile-from-start off --force-overwrite --export "$OUT/kernel" \
    "$PYTHON" -m profiling.step --device cuda --steps 1 --cuda-profiler "$@"
ncu --import "$OUT/kernel.ncu-rep" --csv --page details >"$SUMMARY"
ncu --import "$OUT/kernel.ncu-rep" --csv --page raw >"$OUT/ncu-raw.csv"
ls -l "$SUMMARY" "$OUT/ncu-raw.csv"
