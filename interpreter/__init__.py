"""Object-centric learning for videos: image slots, video slots, masks."""

from typing import TYPE_CHECKING, Any

from interpreter.versions import require_versions

if TYPE_CHECKING:
    from interpreter.segment import SegmentedVideo, segment_video

__all__ = ["SegmentedVideo", "segment_video"]

require_versions()


def __getattr__(name: str) -> Any:
    if name in __all__:  # late, so that `import interpreter` does not import torch
        from interpreter import segment

        return getattr(segment, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
