"""What the commands do with memory that PyTorch frees on a CPU: they keep it for the next step.

By default the C library returns free memory at the end of its heap to the system once there is more of it than a
threshold: 128 KiB at first, then twice the largest separately mapped block that was freed, at most 64 MiB. A training
step frees all that it made, and the next one needs the same again: the system then clears and maps each page anew.
Keeping the memory shortens a step by a tenth to a third (`python -m profiling.heap`). The peak stays the same; the
process keeps it until it ends.
"""

import ctypes
import sys
from collections.abc import Mapping

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
NEVER = -1
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
