"""Opens a video: a file or a folder of frames."""

from collections.abc import Sequence
from pathlib import Path

from interpreter.data.images import IMAGE_SUFFIXES
from interpreter.data.tree import look, split_frames
from interpreter.data.video.base import Video, VideoError
from interpreter.data.video.frame_folder import FrameFolder

# MP4 and its relatives, Matroska and AVI; MPEG streams; Windows, Flash and others; bare H.264 and HEVC; images.
VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".avi"))
VIDEO_SUFFIXES |= {".ts", ".mts", ".m2ts", ".m2t", ".mpg", ".mpeg", ".mpe", ".m2v", ".vob", ".mxf", ".m1v", ".dv"}
VIDEO_SUFFIXES |= {".divx", ".xvid", ".wmv", ".asf", ".flv", ".ogv", ".ogm", ".rm", ".rmvb", ".nut", ".y4m", ".ivf"}
VIDEO_SUFFIXES |= {".h264", ".264", ".avc", ".h265", ".265", ".hevc", ".obu", ".mjpeg", ".mjpg", ".gif", ".apng"}
_PREVIEWS = frozenset({".gif", ".apng"})  # some programs save previews of these types next to the frames


def open_video(path: str | Path, name: str | None = None) -> Video:
    """Open a video file (any container and codec that FFmpeg decodes) or a folder of frames.

    Only the first frame is decoded; :meth:`Video.check` decodes all frames.

    >>> video = open_video(clips / "walk.mp4")
    >>> video.name, video.num_frames, video.height, video.width
    ('walk', 5, 64, 96)
    >>> video.read([4, 0], size=(32, 48)).shape
    (2, 32, 48, 3)
    >>> len([frame for frame in video.frames()])
    5

    Args:
        path: a file or a folder.
        name: name of the video; None takes the file name without suffix, or the folder name.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        VideoError: if it is not a video, is empty, or its first frame cannot be decoded. Also if it is a folder that
            contains video files, because its images may then be no frames.
    """
    from interpreter.data.video.file import VideoFile  # loads PyAV, which folders of frames do not need

    path = Path(path)
    if path.is_dir():
        if videos := video_files(look(path).files):
            raise VideoError(
                f"{path}: holds video files ({videos[0].name}{', …' if len(videos) > 1 else ''}), so it is no folder "
                "of frames; give one of them, or move them elsewhere"
            )
        return FrameFolder(path, name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such video file or folder of frames")
    return VideoFile(path, name)


def video_files(files: Sequence[Path]) -> list[Path]:
    """The files with the suffix of a video, except a single GIF or APNG next to two or more numbered images.

    >>> video_files([Path("0.png"), Path("1.png"), Path("preview.gif")])
    []
    """
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    if len(videos) == 1 and videos[0].suffix.lower() in _PREVIEWS:
        images = split_frames([file for file in files if file.suffix.lower() in IMAGE_SUFFIXES])
        if len(images.frames) > 1 and not images.problem:
            return []
    return videos
