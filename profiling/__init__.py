"""Measurements and checks. Files here are commands, ``python -m profiling.NAME``; folders hold what they share.

- bench: every op and training step timed against its baselines; one file an op
- accounting: launches, bytes and waits of a training step, counted without a GPU, and formulas for its cost
- gpu: what gpu_check.sh runs on a GPU, and what compilers say of the kernels without one
- report: generated pages of docs/results and README's figures, made of results
- results: recorded figures, each file with the command that made it
- common: timing, the machine's description, and set-ups of training steps

A kernel that cannot be built is an error here: no other backend takes its place.
"""

import os

os.environ.setdefault("SLOTKERNELS_STRICT", "1")
