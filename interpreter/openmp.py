"""How OpenMP threads wait for each other in the commands.

PyTorch shares an operator among threads, and threads that are done wait in a loop for the others before they sleep. On
a machine that also does other things, such a loop keeps the core from the very thread that it waits for: GNU's OpenMP
loops for milliseconds at each operator, and a training step takes 30 times as long at a load of five. The commands
therefore let threads sleep much earlier. `python -m profiling.spin` measures what that costs and saves.
"""

from collections.abc import Mapping

SETTINGS = {
    "GOMP_SPINCOUNT": "1000",  # turns of GNU's loop, 300,000 by default
    "KMP_BLOCKTIME": "0",  # milliseconds of LLVM's and Intel's loop, 200 by default
}
CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "KMP_LIBRARY", *SETTINGS)


def short_waits(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that let threads sleep early: none if the user has chosen one.

    They take effect where they are set before torch is imported, and child processes inherit them:

        os.environ.update(short_waits(os.environ))
    """
    return {} if any(name in environment for name in CHOSEN_BY_USER) else SETTINGS
