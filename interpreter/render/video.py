"""H.264 video, written frame by frame."""

from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from interpreter.files import written_whole

BT709 = 1
"""Number of ITU-R BT.709 in the H.264 tables of colour primaries, transfer functions and matrices."""


class VideoWriter:
    """Write RGB frames to an MP4 that browsers play: H.264, 4:2:0, index at the front.

    Use it as a context manager. Frames are encoded when they are written, so memory does not grow with the video. The
    file appears if the block succeeds; if it fails, there is no file. Equal frames give equal bytes::

        with VideoWriter("out.mp4", fps=Fraction(30000, 1001), size=(336, 504)) as video:
            for frame in frames:
                video.write(frame)

    H.264 in 4:2:0 requires even sizes. So an odd last row or column is repeated once, and no pixel is lost.

    Args:
        path: path of the file. Missing folders are created.
        fps: frames per second, > 0. A fraction is stored exactly.
        size: (H, W) of the frames in pixels.
        pixel_aspect: width of a pixel over its height; players stretch the picture accordingly.

    Raises:
        ValueError: if ``fps``, ``size`` or ``pixel_aspect`` is not positive, or the block ends without a frame.
        OSError: if the file cannot be written, for example because the disk is full.
    """

    def __init__(
        self, path: str | Path, fps: Fraction | float, size: tuple[int, int], pixel_aspect: Fraction = Fraction(1)
    ) -> None:
        # Convert a float to a simple fraction close to it: 29.97 to 2997/100.
        self.fps = Fraction(fps) if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)
        if self.fps <= 0 or min(size) < 1 or pixel_aspect <= 0:
            raise ValueError(f"fps, size and pixel_aspect must be positive, got {fps}, {size} and {pixel_aspect}")
        self.path, self.size, self.pixel_aspect, self.frames = Path(path), size, pixel_aspect, 0
        self._stack = ExitStack()

    def __enter__(self) -> "VideoWriter":
        with ExitStack() as stack:
            temporary = stack.enter_context(written_whole(self.path))
            self._container = stack.enter_context(
                av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
            )
            self._stream = self._container.add_stream("libx264", rate=self.fps)
            self._stream.height, self._stream.width = (side + side % 2 for side in self.size)
            self._stream.pix_fmt = "yuv420p"
            # x264's macroblock tree reads uninitialised memory: equal frames would give different bytes each time.
            self._stream.options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
            # Without these tags, each player guesses the colour space from the size of the picture.
            context = self._stream.codec_context
            context.sample_aspect_ratio = self.pixel_aspect
            context.color_range, context.colorspace = ColorRange.MPEG, BT709
            context.color_primaries = context.color_trc = BT709
            self._stack = stack.pop_all()
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append a frame, uint8 [H, W, 3] RGB. Raises ValueError for a different type or size."""
        if frame.dtype != np.uint8 or frame.shape != (*self.size, 3):
            raise ValueError(f"frame must be uint8 {(*self.size, 3)}, got {frame.dtype} {frame.shape}")
        if self.size[0] % 2 or self.size[1] % 2:
            frame = np.pad(frame, ((0, self.size[0] % 2), (0, self.size[1] % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        picture.pts, picture.time_base = self.frames, 1 / self.fps
        self._container.mux(self._stream.encode(picture))
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, traceback)
            return
        with self._stack:
            if not self.frames:
                raise ValueError(f"no frame was written to {self.path}")
            self._container.mux(self._stream.encode(None))
