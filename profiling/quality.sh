#!/usr/bin/env bash
# Trains and evaluates the models of the pages of results (docs/results/overview.md), for example
# `profiling/quality.sh solv-ablation`. --help lists all commands.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m profiling.quality "$@"
