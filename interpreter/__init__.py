"""Object-centric learning for videos: image slots, video slots, masks."""

import os
import sys
from typing import TYPE_CHECKING, Any

from interpreter.heap import keep_freed_memory
from interpreter.openmp import short_waits
from interpreter.versions import own_version, require_versions

if TYPE_CHECKING:
    from interpreter.segment import SegmentedStream, SegmentedVideo, read_frames, segment_stream, segment_video

__all__ = ["SegmentedStream", "SegmentedVideo", "read_frames", "segment_stream", "segment_video"]

# A command sets up its process before torch is loaded. During `python -m interpreter.…`, sys.argv[0] is "-m" at this
# point. The installed script has the name of this package.
_program = os.path.basename(sys.argv[0]) if sys.argv else ""
_is_command = _program in (__name__, f"{__name__}.exe") or (
    _program == "-m" and any(word.split(".")[0] == __name__ for word in sys.orig_argv)
)
if _is_command:
    os.environ.update(short_waits(os.environ))
    keep_freed_memory(os.environ)
require_versions(_is_command)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return own_version()
    if name in __all__:  # imported late, so that `import interpreter` does not import torch
        from interpreter import segment

        return getattr(segment, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
