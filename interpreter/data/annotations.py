"""Ground truth of one video, read frame by frame: a label map for each annotated frame."""

import abc
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from interpreter.data.images import opened, probe_size
from interpreter.data.video import Size, VideoError

VOID = 255
MAX_OBJECTS = VOID - 1


class Annotation(abc.ABC):
    """The masks of one video. Holds paths or run-length codes, no pixels.

    Attributes:
        frames: numbers of the annotated frames, ascending.
    """

    frames: Sequence[int]

    @abc.abstractmethod
    def read(self, frame: int, size: Size) -> np.ndarray:
        """Decode the mask of one annotated frame.

        Args:
            frame: one of ``frames``.
            size: native (height, width) of the video, which the mask must have.

        Returns:
            uint8 [H, W]: 0 background, 1 to 254 objects, 255 void.

        Raises:
            VideoError: if the mask is damaged, missing or of another size; names the file.
        """

    @abc.abstractmethod
    def check(self, size: Size) -> None:
        """Find what is wrong with any mask as far as that is possible without decoding it.

        Raises:
            VideoError: if a mask is damaged or of another size; names the file.
        """


class MaskFiles(Annotation):
    """One image of object ids for each annotated frame.

    Args:
        files: for each frame of the video its mask, or None.
        binary: whether every non-zero pixel is object 1.
    """

    def __init__(self, files: Sequence[Path | None], binary: bool = False) -> None:
        self.files = {frame: file for frame, file in enumerate(files) if file is not None}
        self.frames = list(self.files)
        self.binary = binary

    def read(self, frame: int, size: Size) -> np.ndarray:
        """See `Annotation.read`."""
        return read_mask(self.files[frame], size, self.binary)

    def check(self, size: Size) -> None:
        """See `Annotation.check`."""
        for file in self.files.values():
            check_mask(file, size)


def match_masks(frames: Sequence[Path], folder: Path, suffixes: Sequence[str] = (".png",)) -> list[Path | None]:
    """The mask file of each frame, which has the frame's name and one of the suffixes; None where there is none."""
    candidates = ([folder / f"{frame.stem}{suffix}" for suffix in suffixes] for frame in frames)
    return [next((mask for mask in masks if mask.is_file()), None) for masks in candidates]


def check_mask(path: Path, size: Size) -> None:
    """Make sure that a mask is complete and of the video's size, without decoding it.

    Raises:
        VideoError: if it is not.
    """
    try:
        found = probe_size(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged_mask(path, error) from error
    if found != size:
        raise VideoError(
            f"{path}: mask of {found[0]}x{found[1]} (height x width) for frames of {size[0]}x{size[1]}; "
            "take frames and masks of the same resolution"
        )


def read_mask(path: Path, size: Size, binary: bool = False) -> np.ndarray:
    """Decode a mask to uint8 [H, W]: palette index or gray value.

    Args:
        path: the PNG.
        size: (height, width) that it must have.
        binary: every non-zero pixel becomes 1. Only then may the mask be a colour image, as a few of DAVIS 2016 are.

    Raises:
        VideoError: if it is damaged, of another size, or not a map of ids.
    """
    check_mask(path, size)
    try:
        with opened(path) as image:
            if image.mode not in ("P", "L") and not binary:
                raise VideoError(f"{path}: colours ({image.mode}) instead of object ids; save it as a palette PNG")
            indexed = image.mode in ("P", "L")
            mask = np.array(image) if indexed else np.array(image.convert("RGB")).max(axis=-1)
    except VideoError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged_mask(path, error) from error
    return (mask > 0).astype(np.uint8) if binary else mask


def damaged_mask(path: Path, error: Exception) -> VideoError:
    """What to tell about a mask that Pillow does not read."""
    return VideoError(f"{path}: damaged mask ({' '.join(str(error).split())}); restore the file")
