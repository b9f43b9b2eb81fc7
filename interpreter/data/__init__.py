"""Videos, data sets and generated scenes: everything that turns files into frames and masks."""

from typing import TYPE_CHECKING, Any

from interpreter.data.datasets import VideoDataset, open_dataset
from interpreter.data.datasets.annotations import VOID
from interpreter.data.video import FrameFolder, Video, VideoError, open_video

if TYPE_CHECKING:
    from interpreter.data.scenes.generate import generate_scenes

__all__ = [
    "VOID",
    "FrameFolder",
    "Video",
    "VideoDataset",
    "VideoError",
    "generate_scenes",
    "open_dataset",
    "open_video",
]


def __getattr__(name: str) -> Any:
    if name == "generate_scenes":  # late: the module is also run as a command
        from interpreter.data.scenes.generate import generate_scenes

        return generate_scenes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
