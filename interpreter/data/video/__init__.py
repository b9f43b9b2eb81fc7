"""Videos: files and folders of frames, opened by :func:`open_video`."""

from interpreter.data.video.base import (
    VIDEO_SUFFIXES,
    FrameFolder,
    Size,
    Video,
    VideoError,
    open_video,
    video_files,
)

__all__ = ["VIDEO_SUFFIXES", "FrameFolder", "Size", "Video", "VideoError", "open_video", "video_files"]
