"""Videos, data sets and generated scenes: everything that turns files into frames and masks."""

from interpreter.data.datasets import VideoDataset, open_dataset
from interpreter.data.video import FrameFolder, Video, VideoError, open_video

__all__ = ["FrameFolder", "Video", "VideoDataset", "VideoError", "open_dataset", "open_video"]
