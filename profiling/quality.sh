#!/usr/bin/env bash
# Trains and evaluates the models of the pages of results (docs/results/overview.md): `profiling/quality.sh solv-ablation`, for example. --help lists all.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m profiling.quality "$@"
