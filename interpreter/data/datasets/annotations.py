"""Ground truth of one video, read frame by frame: a label map for each annotated frame."""

import abc
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from interpreter.data.images import (
    TooDeepError,
    UnsuitableError,
    list_images,
    normal,
    probe_size,
    read_numbers,
    read_rgb,
)
from interpreter.data.tree import listing, numbers, split_frames
from interpreter.data.video import CroppedVideo, Size, VideoError

VOID = 255
MAX_OBJECTS = VOID - 1


class Annotation(abc.ABC):
    """The masks of one video: paths or run-length codes, which are decoded when a frame is read.

    Attributes:
        frames: numbers of the annotated frames, ascending.
        optional: whether a video is used without its masks if they are damaged.
    """

    frames: Sequence[int]
    optional = False

    @property
    def expected(self) -> str:
        """Where masks were expected and which files exist, for the error about a video without masks."""
        return ""

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
        """Check every mask as far as that is possible without decoding it.

        Raises:
            VideoError: if a mask is damaged or of another size; names the file.
        """


class UnusableMasks(Annotation):
    """Masks that cannot be used: the video can be decoded, but reading a mask raises the reason.

    Args:
        reason: what is wrong, and in which file or folder.
    """

    optional = True

    def __init__(self, reason: str) -> None:
        self.reason, self.frames = reason, [0]

    def read(self, frame: int, size: Size) -> np.ndarray:
        """Raise the reason as a `VideoError`."""
        raise VideoError(self.reason)

    def check(self, size: Size) -> None:
        """Raise the reason as a `VideoError`."""
        raise VideoError(self.reason)


class CroppedMasks(Annotation):
    """The masks of a `CroppedVideo`, from those of the whole video."""

    def __init__(self, inner: Annotation, video: CroppedVideo) -> None:
        self.inner, self.frames, self.box = inner, inner.frames, video.box
        self.native = (video.inner.height, video.inner.width)

    @property
    def expected(self) -> str:
        """See `Annotation.expected`."""
        return self.inner.expected

    def read(self, frame: int, size: Size) -> np.ndarray:
        """See `Annotation.read`."""
        return self.box.crop(self.inner.read(frame, self.native))

    def check(self, size: Size) -> None:
        """See `Annotation.check`."""
        self.inner.check(self.native)


class MaskFiles(Annotation):
    """One image of object ids for each annotated frame.

    Args:
        files: the mask of each frame of the video, or None.
        frames: the file of each frame, or its number as a file name; for messages.
        folder: folder of the masks, which may be missing.
        binary: whether every non-zero pixel is object 1.
    """

    def __init__(
        self, files: Sequence[Path | None], frames: Sequence[Path], folder: Path, binary: bool = False
    ) -> None:
        self.files = {frame: file for frame, file in enumerate(files) if file is not None}
        self.frames = list(self.files)
        self.owners, self.folder, self.binary = frames, folder, binary

    @property
    def expected(self) -> str:
        """See `Annotation.expected`."""
        return f"expected {self.folder / self.owners[0].stem}.png …, but that folder holds {listing(self.folder)}"

    def read(self, frame: int, size: Size) -> np.ndarray:
        """See `Annotation.read`."""
        return read_mask(self.files[frame], size, self.binary, self.owners[frame])

    def check(self, size: Size) -> None:
        """See `Annotation.check`."""
        for frame, file in self.files.items():
            check_mask(file, size, self.owners[frame])


class FolderMasks(MaskFiles):
    """The masks of your own video: PNG files with the names or the numbers of its frames.

    If all masks of the video hold only 0 and 255, 255 is object 1, because many programs save a single object like
    this. Else 255 is void.

    Args:
        folder: folder of the masks, which may be missing.
        frames: the file of each frame, or its number as a file name.
        named: whether ``frames`` are files.

    Raises:
        VideoError: if some images in the folder belong to no frame, or none is a PNG; names them and the expected
            files.
    """

    optional = True

    def __init__(self, folder: Path, frames: Sequence[Path], named: bool) -> None:
        super().__init__(match_numbered(frames, folder, named), frames, folder)

    def read(self, frame: int, size: Size) -> np.ndarray:
        """See `Annotation.read`."""
        mask = super().read(frame, size)
        return (mask > 0).astype(np.uint8) if self._white_is_object else mask

    @cached_property
    def _white_is_object(self) -> bool:
        """Whether all masks contain only 0 and 255. Usually the first mask already shows that they do not."""
        seen: set[int] = set()
        for file in self.files.values():
            try:
                seen |= set(np.unique(read_numbers(file)).tolist())
            except (OSError, SyntaxError, ValueError) as error:
                raise damaged_mask(file, error) from error
            if seen - {0, VOID}:
                return False
        return seen == {0, VOID}


def match_masks(frames: Sequence[Path], folder: Path, suffixes: Sequence[str] = (".png",)) -> list[Path | None]:
    """The mask file of each frame: the frame's name with one of the suffixes. None for a frame without a mask."""
    by_name = {(normal(path.stem), path.suffix.lower()): path for path in reversed(_masks_in(folder, suffixes))}
    names = (normal(frame.stem) for frame in frames)
    return [next((by_name[name, s] for s in suffixes if (name, s) in by_name), None) for name in names]


def match_numbered(frames: Sequence[Path], folder: Path, named: bool) -> list[Path | None]:
    """The mask of each frame: a PNG with the frame's name or, if none has the name of a frame, with its number.

    Args:
        frames: as for `FolderMasks`.
        folder: the folder of masks, which may be missing.
        named: as for `FolderMasks`.

    Raises:
        VideoError: as for `FolderMasks`.
    """
    masks = _masks_in(folder, (".png",))
    matched = match_masks(frames, folder)
    if not any(matched) and masks:
        numbered, _, problem = split_frames(masks)
        of_masks, of_frames = _frame_numbers(numbered), _frame_numbers(frames)
        if not problem and len(set(of_masks)) == len(of_masks) and len(set(of_frames)) == len(of_frames):
            by_number = dict(zip(of_masks, numbered, strict=True))
            matched = [by_number.get(number) for number in of_frames]
    belong = {path for path in matched if path}
    strangers = [path.name for path in masks if path not in belong]
    if strangers and (None in matched or not named):
        raise VideoError(
            f"{folder}: {len(strangers)} of {len(masks)} masks belong to no frame ({', '.join(strangers[:3])}"
            f"{', …' if len(strangers) > 3 else ''}), expected are {frames[0].stem}.png to {frames[-1].stem}.png"
        )
    if not masks and folder.is_dir() and (others := list_images(folder)):
        raise VideoError(
            f"{folder}: {len(others)} {others[0].suffix} images ({others[0].name} …) where masks should be; save them "
            f"as PNG ({frames[0].stem}.png …), since other formats may change ids"
        )
    return matched


def _masks_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in list_images(folder) if path.suffix.lower() in suffixes]


def _frame_numbers(files: Sequence[Path]) -> list[int]:
    """The frame number of each file: the number that differs between the names of the files."""
    parts = [numbers(file) for file in files]
    differing = [place for place, values in enumerate(zip(*parts, strict=False)) if len(set(values)) > 1]
    place = differing[-1] if differing else -1
    return [values[place] if values else -1 for values in parts]


def check_mask(path: Path, size: Size, owner: Path | None = None) -> None:
    """Check that a mask is complete and has the size of the video, without decoding it.

    Args:
        path: the mask.
        size: (height, width) that it must have.
        owner: the frame that it belongs to, for the message.

    Raises:
        VideoError: if it is not.
    """
    try:
        stored = probe_size(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged_mask(path, error) from error
    if stored != size:
        raise VideoError(
            f"{path}: mask of {stored[0]}x{stored[1]} (height x width), but {owner or 'its frame'} is "
            f"{size[0]}x{size[1]}; take frames and masks of the same resolution"
        )


def read_ids(path: Path, size: Size, owner: Path | None = None, colours: bool = False) -> np.ndarray:
    """Decode a mask to the numbers that it stores: palette indices or gray values (`images.read_numbers`).

    Args:
        path: the PNG.
        size: (height, width) that it must have.
        owner: the frame that it belongs to, for the message.
        colours: accept a colour image, and take the largest of red, green and blue. By default it is refused.

    Returns:
        [H, W] of an integer type.

    Raises:
        VideoError: if it is damaged, of another size, or not a map of ids.
    """
    check_mask(path, size, owner)
    try:
        return read_numbers(path)
    except (OSError, SyntaxError, ValueError) as error:
        if colours and isinstance(error, UnsuitableError) and not isinstance(error, TooDeepError):
            return read_rgb(path).max(axis=-1)
        raise damaged_mask(path, error) from error


def read_mask(path: Path, size: Size, binary: bool = False, owner: Path | None = None) -> np.ndarray:
    """Decode a mask to uint8 [H, W]: 0 background, 1 to 254 objects, 255 void.

    Args:
        path: the PNG.
        size: (height, width) that it must have.
        binary: every non-zero pixel becomes 1. The mask may then be a colour image, as a few of DAVIS 2016 are.
        owner: the frame that it belongs to, for the message.

    Raises:
        VideoError: if it is damaged, of another size, not a map of ids, or holds an id above 255.
    """
    ids = read_ids(path, size, owner, colours=binary)
    if binary:
        return (ids > 0).astype(np.uint8)
    if ids.max() > VOID or ids.min() < 0:
        value = ids.max() if ids.max() > VOID else ids.min()
        raise VideoError(f"{path}: id {value}, but ids are 1 to {MAX_OBJECTS} and {VOID} is void; renumber them")
    return ids.astype(np.uint8)


def damaged_mask(path: Path, error: Exception) -> VideoError:
    """The error for a mask that Pillow does not read."""
    if isinstance(error, UnsuitableError):
        return VideoError(f"{path}: {error}")
    return VideoError(f"{path}: damaged mask ({' '.join(str(error).split())}); restore the file")
