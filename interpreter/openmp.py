"""How OpenMP threads wait for each other in the commands.

PyTorch shares an operator among threads, and a thread that has finished waits for the others in a loop before it
sleeps. On a machine that also does other things, this loop takes the core from the very thread that it waits for: with
GNU's OpenMP a training step takes many times as long. The commands therefore let threads sleep earlier. The values are
the least that cost at most 8 % of a step on an idle machine (`python -m profiling.spin`, docs/results/busy_cpu.md).
"""

from collections.abc import Mapping

SETTINGS = {
    "GOMP_SPINCOUNT": "700",  # turns of GNU's loop, 300,000 by default
    "KMP_BLOCKTIME": "1",  # milliseconds of LLVM's and Intel's loop, 200 by default; 0 costs half of an idle step
}
CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "KMP_LIBRARY", *SETTINGS)


def short_waits(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that let threads sleep early: none if the user has chosen one.

    They take effect where they are set before torch is imported, and child processes inherit them:

        os.environ.update(short_waits(os.environ))
    """
    return {} if any(name in environment for name in CHOSEN_BY_USER) else SETTINGS
