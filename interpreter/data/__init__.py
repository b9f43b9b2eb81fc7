"""Videos and data sets: everything that turns files into frames and masks.

Open a video with :func:`open_video` and a data set with :func:`open_dataset`.
``interpreter.data.scenes.generate_scenes`` generates a data set.
"""

from interpreter.data.datasets import VOID, VideoDataset, open_dataset
from interpreter.data.video import FrameFolder, Video, VideoError, open_video

__all__ = ["VOID", "FrameFolder", "Video", "VideoDataset", "VideoError", "open_dataset", "open_video"]
