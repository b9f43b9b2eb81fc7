"""Videos: files and folders of frames, opened by :func:`open_video`."""

from interpreter.data.video.base import Size, Video, VideoError
from interpreter.data.video.cropped import Box, CroppedVideo, find_borders
from interpreter.data.video.first_frames import FirstFrames
from interpreter.data.video.frame_folder import FrameFolder
from interpreter.data.video.open import VIDEO_SUFFIXES, open_video, video_files
from interpreter.data.video.squares import CentralSquare

__all__ = [
    "VIDEO_SUFFIXES",
    "Box",
    "CentralSquare",
    "CroppedVideo",
    "FirstFrames",
    "FrameFolder",
    "Size",
    "Video",
    "VideoError",
    "find_borders",
    "open_video",
    "video_files",
]
