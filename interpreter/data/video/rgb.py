"""Converts single frames of other packages to uint8 [H, W, 3] RGB.

Types are recognised by their attributes, so that none of these packages is imported.
"""

from typing import Any

import numpy as np
from PIL import Image

from interpreter.data.images import to_rgb, upright
from interpreter.data.video.base import VideoError

TO_BYTES = (
    "convert them to uint8 with values 0 to 255, such as (frame * 255).round().astype(numpy.uint8) if the largest "
    "value is 1"
)


class Rgb:
    """Converts the frames of a video, which must all have the same size.

    >>> Rgb("mine")(np.zeros((3, 4, 6), np.uint8)).shape  # channels first, as TorchCodec has them
    (4, 6, 3)

    Attributes:
        size: (H, W) of the first frame; None before the first frame.
        orientation: how frames of PyAV are turned, see `interpreter.data.video.orientation`; None before the first
            frame.

    Args:
        name: name of the video, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.size: tuple[int, int] | None = None
        self.orientation: Any = None
        self._reformatter: Any = None
        self._count = 0

    def __call__(self, frame: Any, number: int | None = None) -> np.ndarray:
        """Convert a frame to a new array.

        Args:
            frame: array or tensor, uint8 [H, W, 3] or [3, H, W] RGB on any device, decord's NDArray, TorchCodec's
                Frame, PyAV's VideoFrame, or an image of Pillow. If both the first and the last axis have length 3, the
                last one is the channels.
            number: number of the frame, for messages. By default frames are counted.

        Raises:
            VideoError: if it is not a frame; says what it is, and what to pass instead.
        """
        number = self._count if number is None else number
        self._count = number + 1
        where = f"{self.name}: frame {number}"
        pixels = self._pixels(frame, where)
        size = (pixels.shape[0], pixels.shape[1])
        first = self.size or size
        if size != first:
            raise VideoError(
                f"{where} is {size[0]}x{size[1]} (height x width), but the first is {first[0]}x{first[1]}; resize all "
                "frames to one size"
            )
        self.size = size
        return pixels

    def _pixels(self, frame: Any, where: str) -> np.ndarray:
        if isinstance(frame, Image.Image):
            return np.array(to_rgb(upright(frame)))
        if hasattr(frame, "reformat") and hasattr(frame, "to_ndarray"):
            return self._decoded(frame, where)
        if hasattr(frame, "pts_seconds") and hasattr(frame, "data"):  # TorchCodec's Frame
            frame = frame.data
        if hasattr(frame, "asnumpy"):  # decord's NDArray
            frame = frame.asnumpy()
        if not hasattr(frame, "shape") or not hasattr(frame, "dtype"):
            raise VideoError(f"{where} is {_kind(frame)}; a frame is an array, a tensor or an image, uint8 [H, W, 3]")
        _require_frame(frame, where)
        if hasattr(frame, "detach"):  # a tensor
            frame = frame.detach().cpu().numpy()
        frame = np.asarray(frame)
        return np.array(frame if frame.shape[2] == 3 else frame.transpose(1, 2, 0), order="C")

    def _decoded(self, frame: Any, where: str) -> np.ndarray:
        """A frame of PyAV, converted like those of a file: exact colours, turned upright."""
        from av.video.reformatter import VideoReformatter  # imported here, because PyAV is loaded only if it is used

        from interpreter.data.video import pictures
        from interpreter.data.video.orientation import UPRIGHT

        if frame.is_corrupt:
            raise VideoError(f"{where} is damaged or cut")
        if self.orientation is None:
            self.orientation = pictures.Consistency(self.name, "IN").orientation_of(frame) or UPRIGHT
            self._reformatter = VideoReformatter()
        return pictures.to_rgb(frame, self.orientation, self._reformatter)


def _require_frame(frame: Any, where: str) -> None:
    """Raise VideoError for arrays and tensors that are not a frame; it says what to do."""
    shape, dtype = list(frame.shape), str(frame.dtype).removeprefix("torch.")
    what = f"{where} is {dtype} {shape}"
    if len(shape) == 4:
        raise VideoError(f"{what}, a batch; pass its frames one by one, or all frames as one array [T, H, W, 3]")
    if len(shape) == 2 or (len(shape) == 3 and shape[2] == 1):
        raise VideoError(f"{what}, grayscale; repeat it three times: numpy.stack([frame] * 3, axis=-1)")
    if len(shape) == 3 and 4 in (shape[0], shape[2]) and 3 not in (shape[0], shape[2]):
        raise VideoError(f"{what}, with four channels; drop the alpha channel: frame[..., :3]")
    if len(shape) != 3 or 3 not in (shape[0], shape[2]) or 0 in shape:
        raise VideoError(f"{what}; a frame is uint8 [H, W, 3] RGB")
    if dtype != "uint8":
        raise VideoError(f"{what}, and nothing says which values are black and white; {TO_BYTES}")


def _kind(value: Any) -> str:
    return "None" if value is None else f"of the type {type(value).__name__}"
