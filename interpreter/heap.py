"""Keep memory that PyTorch frees on a CPU for the next step, instead of returning it to the system.

By default, the C library returns free memory at the end of its heap to the system when its size exceeds a threshold:
128 KiB at first, then twice the largest separately mapped block that was freed, at most 64 MiB. A training step frees
its memory, and the next step needs the same amount again, so the system clears and maps each page again. Keeping the
memory shortens a step by a tenth to a third (`python -m profiling.heap`). The peak stays the same, and the process
keeps the memory until it ends.
"""

import ctypes
import sys
from collections.abc import Mapping

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)
NEVER = -1
LARGEST = 2**25  # bytes: the largest value that the library itself chooses; larger blocks are returned as before
CHOSEN_BY_USER = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let this process keep freed memory. Returns False if the user has set it, or the C library is not GNU's.

    Example::

        keep_freed_memory(os.environ)
    """
    if sys.platform != "linux" or any(name in environment for name in CHOSEN_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(TRIM_THRESHOLD, NEVER), mallopt(MMAP_THRESHOLD, LARGEST)])
