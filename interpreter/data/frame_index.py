"""Numbers the frames of many videos as if the videos were concatenated."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from interpreter.data.video import Video


class FrameIndex:
    """Global frame numbers: the frames of all videos concatenated, counted from 0.

    >>> index = FrameIndex([3, 2])
    >>> len(index), index.starts.tolist()
    (5, [0, 3, 5])
    >>> videos, frames = index.locate([0, 2, 3, 4])
    >>> videos.tolist(), frames.tolist()
    ([0, 0, 1, 1], [0, 2, 0, 1])

    Attributes:
        lengths: frames of each video, int64 [V].
        starts: global number of the first frame of each video, followed by the total number of frames; int64 [V + 1].
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths = np.array(list(lengths), np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    @classmethod
    def of(cls, videos: Iterable[Video]) -> "FrameIndex":
        """The numbering of the frames of ``videos``.

        Raises:
            VideoError: if the frames of a video cannot be counted because it is damaged.
        """
        return cls(video.num_frames for video in videos)

    def __len__(self) -> int:
        """Total number of frames."""
        return int(self.starts[-1])

    def locate(self, frames: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Find the video of each frame, and the frame's number in that video.

        Args:
            frames: global frame numbers, integers [...]: an array, a tensor on the CPU or a list.

        Returns:
            Numbers of the videos and frame numbers in them, both int64 [...].

        Raises:
            IndexError: if a frame number is negative or not below ``len(self)``.
        """
        numbers = np.asarray(frames, np.int64)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(
                f"frames {numbers.min()} to {numbers.max()} were requested, but there are {len(self)} frames, "
                "numbered from 0"
            )
        videos = np.searchsorted(self.starts, numbers, side="right") - 1
        return videos, numbers - self.starts[videos]
