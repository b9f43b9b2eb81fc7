"""Converts decoded pictures to RGB frames, for files and streams: exact colours, turned upright, all of one size."""

from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from interpreter.data.video.base import VideoError
from interpreter.data.video.orientation import Orientation, orientation_of

# Exact conversion of YUV to RGB. FFmpeg's default depends on the CPU, and darkens by one level.
_EXACT = (
    int(Interpolation.BICUBIC)
    | int(Interpolation.ACCURATE_RND)
    | int(Interpolation.BITEXACT)
    | int(Interpolation.FULL_CHR_H_INT)
)


def frame_rate(stream: VideoStream) -> Fraction:
    """Average frames per second; 24 if the stream does not state it."""
    return stream.average_rate or stream.guessed_rate or Fraction(24)


def pixel_aspect(stored: Fraction | None, orientation: Orientation) -> Fraction:
    """Width of a pixel over its height in upright frames, from the aspect that the stream stores."""
    aspect = stored or Fraction(1)
    return 1 / aspect if orientation.transposed else aspect


def to_rgb(frame: av.VideoFrame, orientation: Orientation, reformatter: VideoReformatter) -> np.ndarray:
    """Convert to uint8 [H, W, 3], turned as the container states."""
    return orientation.turn(reformatter.reformat(frame, format="rgb24", interpolation=_EXACT).to_ndarray())


class Consistency:
    """Raises an error for orientations that are not supported, and for changes of size or orientation.

    Args:
        name: name of the video in messages.
        source: argument of ``ffmpeg -i``, quoted for a shell.
    """

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def orientation_of(self, frame: av.VideoFrame) -> Orientation | None:
        """The orientation that a frame states; None if it states none.

        Raises:
            VideoError: if it turns by another angle than a multiple of 90 degrees.
        """
        try:
            return orientation_of(frame)
        except ValueError as error:
            raise VideoError(
                f"{self.name}: {error} neither turns by a multiple of 90 degrees nor mirrors; re-encode it upright "
                f"with ffmpeg -i {self.source} OUT.mp4"
            ) from error

    def require(self, first: av.VideoFrame, frame: av.VideoFrame, number: int, orientation: Orientation) -> None:
        """Refuse a frame whose size or orientation differs from the first frame's; neither is damage.

        Raises:
            VideoError: names frame ``number`` and the remedy.
        """
        if (frame.width, frame.height) != (first.width, first.height):
            upright = (first.height, first.width) if orientation.transposed else (first.width, first.height)
            raise VideoError(
                f"{self.name}: the size changes from {first.width}x{first.height} to {frame.width}x{frame.height} "
                f"(width x height) at frame {number}; re-encode it to one size with ffmpeg -i {self.source} -vf "
                f"scale={upright[0]}:{upright[1]},setsar=1 OUT.mp4"
            )
        if frame is not first and self.orientation_of(frame) not in (None, orientation):
            raise VideoError(
                f"{self.name}: the orientation changes at frame {number}; re-encode it with ffmpeg -noautorotate -i "
                f"{self.source} OUT.mp4, which leaves all frames as they are stored, or cut it there"
            )
