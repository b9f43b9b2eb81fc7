"""The DAVIS directory layout: image sets, frames and palette masks (Perazzi et al. 2016, Pont-Tuset et al. 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from interpreter.data.images import probe_size
from interpreter.data.video import VideoError

VOID = 255
YEARS = (2016, 2017)


@dataclass(frozen=True)
class DavisSequence:
    """One line of an image set: where its frames and, if the release has them, its masks should be."""

    name: str
    frames: Path
    masks: Path | None


def find_sequences(root: Path, split: str | None, year: int, resolution: str) -> list[DavisSequence]:
    """Read the image sets of a DAVIS release.

    Args:
        root: the folder that holds ``ImageSets``, ``JPEGImages`` and ``Annotations``.
        split: name of one image set, or None for all of them, in alphabetical order and without repeats.
        year: 2016 or 2017.
        resolution: ``480p``, ``Full-Resolution`` or ``1080p``.

    Raises:
        FileNotFoundError: if a part of the layout is missing; lists what is there.
        ValueError: if the year is neither 2016 nor 2017.
    """
    if year not in YEARS:
        raise ValueError(f"DAVIS year must be 2016 or 2017, not {year!r}")
    frames = root / "JPEGImages" / resolution
    if not frames.is_dir():
        raise FileNotFoundError(
            f"{root}: no JPEGImages/{resolution} below it, so it is no DAVIS root at this resolution; "
            f"it holds {listing(root)}, JPEGImages holds {listing(root / 'JPEGImages')}"
        )
    masks = root / "Annotations" / resolution
    unsupervised = root / "Annotations_unsupervised" / resolution
    if year == 2017 and unsupervised.is_dir():
        masks = unsupervised
    names = dict.fromkeys(name for file in _image_sets(root, split, year, resolution) for name in _names(file))
    return [DavisSequence(n, frames / n, masks / n if (masks / n).is_dir() else None) for n in names]


def _image_sets(root: Path, split: str | None, year: int, resolution: str) -> list[Path]:
    folder = root / "ImageSets" / str(year)
    if year == 2016 and not folder.is_dir():
        folder = root / "ImageSets" / resolution  # as in the archive of 2016, before there was a second year
    found = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    chosen = [file for file in found if split in (None, file.stem)]
    if not chosen:
        sets = [f"{p.parent.name}/{p.stem}" for p in sorted((root / "ImageSets").glob("*/*.txt"))]
        raise FileNotFoundError(
            f"{folder}: no image set {f'{split}.txt' if split else '(*.txt)'}; "
            f"ImageSets holds {', '.join(sets) or 'none'} (year/split)"
        )
    return chosen


def _names(file: Path) -> list[str]:
    """Sequence names of an image set, whose lines are names or (2016) pairs of a frame's and a mask's path."""
    names = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if fields := line.split():
            path = PurePosixPath(fields[0])
            names.append(path.parent.name if len(path.parts) > 1 else path.name)
    return list(dict.fromkeys(names))


def match_masks(frames: Sequence[Path], folder: Path) -> list[Path | None]:
    """The mask file of each frame, which has the frame's name and ends in ``.png``; None where there is none."""
    candidates = (folder / f"{frame.stem}.png" for frame in frames)
    return [mask if mask.is_file() else None for mask in candidates]


def check_mask(path: Path, size: tuple[int, int]) -> None:
    """Make sure that a mask is complete and of the video's size, without decoding it.

    Raises:
        VideoError: if it is not.
    """
    try:
        found = probe_size(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise VideoError(f"{path}: damaged mask ({error}); restore the file") from error
    if found != size:
        raise VideoError(
            f"{path}: mask of {found[0]}x{found[1]} (height x width) for frames of {size[0]}x{size[1]}; "
            "take frames and masks of the same resolution"
        )


def read_mask(path: Path, size: tuple[int, int], binary: bool) -> np.ndarray:
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
        with Image.open(path) as image:
            if image.mode not in ("P", "L") and not binary:
                raise VideoError(f"{path}: colours ({image.mode}) instead of object ids; save it as a palette PNG")
            indexed = image.mode in ("P", "L")
            mask = np.array(image) if indexed else np.array(image.convert("RGB")).max(axis=-1)
    except OSError as error:
        raise VideoError(f"{path}: damaged mask ({error}); restore the file") from error
    return (mask > 0).astype(np.uint8) if binary else mask


def listing(folder: Path, limit: int = 8) -> str:
    """Names in a folder, for error messages."""
    if not folder.is_dir():
        return "nothing (no such folder)"
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return ", ".join(names[:limit] + ["…"] * (len(names) > limit)) or "nothing"
