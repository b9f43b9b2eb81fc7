"""Measurements and checks. Each file is a command, ``python -m profiling.NAME``; folders have larger commands.

- bench: times every op and training step and their baselines; one file per op
- accounting: counts launches, bytes and waits of a training step without a GPU, and has formulas for its cost
- gpu: the parts of gpu_check.sh, and checks of the GPU kernels without a GPU
- quality: trains and evaluates the models of the pages of results
- comparable: compares our numbers with those of published code
- report: writes the generated pages of docs/results and README's figures
- follow: runs the commands of a page; wheels.sh: builds and checks releases; tutorial_pictures: pictures of pages
- results: recorded figures; each file names the command that made it
- common: what the commands share: timing, a description of the machine, set-ups of training steps

If a kernel cannot be built, these commands fail; they never use another backend instead.
"""

import os

os.environ.setdefault("SLOTKERNELS_STRICT", "1")
