"""Object-centric learning for videos: image slots, video slots, masks."""

import os
import sys
from typing import TYPE_CHECKING, Any

from interpreter.openmp import short_waits
from interpreter.versions import require_versions

if TYPE_CHECKING:
    from interpreter.segment import SegmentedVideo, segment_video

__all__ = ["SegmentedVideo", "segment_video"]

# Python puts "-m" there while it looks for `python -m interpreter.…`: this is a command, and torch is not loaded yet.
_is_command = sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)
if _is_command:
    os.environ.update(short_waits(os.environ))
require_versions(_is_command)


def __getattr__(name: str) -> Any:
    if name in __all__:  # late, so that `import interpreter` does not import torch
        from interpreter import segment

        return getattr(segment, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
