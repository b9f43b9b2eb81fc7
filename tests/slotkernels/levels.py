"""Results of the C++ kernels at each level of x86-64: AVX-512, AVX2 and the baseline."""

import os
import subprocess
import sys

import torch


def results_of_levels(program, folder):
    """The results that a program saves to the file sys.argv[1], by level; "best" is chosen without the variable.

    Each level runs in its own process, because the kernels are chosen at their first use.
    """
    results = {}
    for level in ("best", "avx2", "default"):
        environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
        if level != "best":
            environment["ATEN_CPU_CAPABILITY"] = level
        path = folder / f"{level}.pt"
        subprocess.run([sys.executable, "-c", program, path], env=environment, check=True)
        results[level] = torch.load(path)
    return results
