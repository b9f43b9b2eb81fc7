"""What the commands do with memory that PyTorch frees on a CPU: they keep it for the next step.

By default the C library gives free memory at the end of its heap back to the system, as soon as there is twice as much
of it as the largest block that was ever freed. A training step frees all that it made, and the next one needs the same
again: the system then clears and maps each page anew. Keeping the memory shortens a step by a tenth to a third
(`python -m profiling.heap`). Its peak does not grow; it only stays.
"""

import ctypes
import sys
from collections.abc import Mapping

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
NEVER = 2**31 - 1
LARGEST = 2**25  # bytes, the greatest that the library chooses itself; what is larger is given back as before
CHOSEN_BY_USER = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let this process keep memory that it frees; False if the user has chosen, or the C library is not GNU's.

    Example::

        keep_freed_memory(os.environ)
    """
    if sys.platform != "linux" or any(name in environment for name in CHOSEN_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(TRIM_THRESHOLD, NEVER), mallopt(MMAP_THRESHOLD, LARGEST)])
