"""Waiting times of OpenMP threads in the commands.

PyTorch divides an operator among threads. A thread that has finished waits for the others in a loop before it sleeps.
On a busy machine, this loop takes the core from the thread that it waits for, and with GNU's OpenMP a training step
takes many times as long. The commands therefore let threads sleep earlier. The values are the smallest that make a step
at most 8 % slower on an idle machine (`python -m profiling.spin`, docs/results/busy_cpu.md).
"""

from collections.abc import Mapping

SETTINGS = {
    "GOMP_SPINCOUNT": "700",  # iterations of GNU's loop, by default 300,000
    "KMP_BLOCKTIME": "1",  # milliseconds of LLVM's and Intel's loop, by default 200; 0 makes a step 1.5 times as long
}
CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "KMP_LIBRARY", *SETTINGS)


def short_waits(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that let threads sleep early. Empty if the user has set one of them.

    Set them before torch is imported. Child processes inherit them:

        os.environ.update(short_waits(os.environ))
    """
    return {} if any(name in environment for name in CHOSEN_BY_USER) else SETTINGS
