"""FBMS-59 as published (Ochs et al. 2014): some frames of each sequence have masks, in which a colour is a region."""

import re
from functools import cached_property
from pathlib import Path, PureWindowsPath

import numpy as np

from interpreter.data.datasets.annotations import MAX_OBJECTS, VOID, Annotation, check_mask, damaged_mask
from interpreter.data.datasets.unopened import UnopenedVideo, unopened_folder
from interpreter.data.images import hidden, normal, opened, upright
from interpreter.data.tree import folders, listing, locate
from interpreter.data.video import FrameFolder, Size, VideoError
from interpreter.files import read_text

SPLITS = {"train": "Trainingset", "test": "Testset"}
_SUFFIXES = (".ppm", ".pgm", ".png")


class RegionMasks(Annotation):
    """Masks that are images in which each colour code is a region.

    Args:
        files: the image of each annotated frame.
        codes: code of each region, the background first, as in the file ``…Def.dat``; pixels of any other code are
            void. None if there is no such file: 0 is then the background, and the other codes of the sequence are its
            objects, in ascending order.
    """

    def __init__(self, files: dict[int, Path], codes: list[int] | None) -> None:
        self.files, self.frames = files, sorted(files)
        self.definition = codes

    def read(self, frame: int, size: Size) -> np.ndarray:
        """See `Annotation.read`."""
        check_mask(self.files[frame], size)
        stored, inverse = np.unique(_codes(self.files[frame]), return_inverse=True)
        labels = np.array([self._labels.get(code, VOID) for code in stored.tolist()], np.uint8)
        return labels[inverse].reshape(size)

    def check(self, size: Size) -> None:
        """See `Annotation.check`."""
        for file in self.files.values():
            check_mask(file, size)

    @cached_property
    def _labels(self) -> dict[int, int]:
        codes = self.definition
        if codes is None:
            stored = np.unique(np.concatenate([np.unique(_codes(file)) for file in self.files.values()]))
            codes = [0, *(code for code in stored.tolist() if code)]
        if len(codes) > MAX_OBJECTS + 1:
            folder = self.files[self.frames[0]].parent
            raise VideoError(f"{folder}: {len(codes) - 1} objects, but label maps hold at most {MAX_OBJECTS}")
        return {code: label for label, code in enumerate(codes)}


def find_fbms(root: Path, split: str | None) -> list[UnopenedVideo]:
    """Find the sequences of FBMS-59.

    Args:
        root: folder that holds ``Trainingset`` and ``Testset``, each with ``SEQUENCE/*.jpg`` and
            ``SEQUENCE/GroundTruth/{*Def.dat,*_gt.ppm,*_gt.pgm}``.
        split: ``train``, ``test`` or None for both.

    Raises:
        FileNotFoundError: if a part is missing; lists the files found.
        ValueError: if the split does not exist.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"FBMS-59 has the splits {' and '.join(SPLITS)}, not {split!r}")
    parts = [SPLITS[split]] if split else list(SPLITS.values())
    sequences = [sequence for part in parts for sequence in folders(root / part)]
    if not sequences:
        raise FileNotFoundError(f"{root}: no sequences in {' or '.join(parts)} below it; it holds {listing(root)}")
    return [_unopened(frames) for frames in sequences]


def _unopened(frames: Path) -> UnopenedVideo:
    def load() -> tuple[FrameFolder, RegionMasks | None]:
        video = FrameFolder(frames)
        truth = frames / "GroundTruth"
        definitions = [file for file in sorted(truth.glob("*.dat")) if not hidden(file.name)]
        numbers = {normal(file.stem): number for number, file in enumerate(video.files)}
        files, codes = _read_definition(definitions[0], numbers) if definitions else (_match(truth, numbers), None)
        return video, RegionMasks(files, codes) if files else None

    return unopened_folder(frames.name, frames, load)


def _match(truth: Path, numbers: dict[str, int]) -> dict[int, Path]:
    """Masks by frame, from their names: FRAME_gt.ppm. FRAME_PROB_gt.ppm is not a mask."""
    masks = [file for file in sorted(truth.glob("*_gt.*")) if not hidden(file.name)]
    named = {normal(mask.stem.removesuffix("_gt")): mask for mask in masks if mask.suffix.lower() in _SUFFIXES}
    return {numbers[stem]: mask for stem, mask in named.items() if stem in numbers}


def _read_definition(path: Path, numbers: dict[str, int]) -> tuple[dict[int, Path], list[int]]:
    """Masks by frame number, and the codes of the regions, from ``…Def.dat``.

    The file is a list of headings, each with its values on the lines below it. A frame is found by the name of its
    input file, or by its number (counted from 0) if no frame has this name.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except ValueError as error:
        raise VideoError(str(error)) from error
    if len(lines) > 100_000:
        raise VideoError(f"{path}: {len(lines)} lines, which is no definition of regions; restore the file")

    def value(heading: int) -> str:
        return lines[heading + 1] if heading + 1 < len(lines) else ""

    def number(text: str, what: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text):
            raise VideoError(f"{path}: {text!r} where {what} should be; restore the file")
        return int(text)

    headings: dict[str, list[int]] = {}
    for place, line in enumerate(lines):
        headings.setdefault(line.lower(), []).append(place)
    regions = headings.get("total number of regions:", [])
    if len(regions) != 1:
        raise VideoError(f"{path}: no 'Total number of regions:'; restore the file")
    count = number(value(regions[0]), "the number of regions")
    codes = [number(text, "the code of a region") for text in lines[regions[0] + 2 : regions[0] + 2 + count]]
    if len(codes) != count or len(set(codes)) != count or not count:
        raise VideoError(f"{path}: not {count} different codes of regions; restore the file")
    names, inputs = headings.get("file name:", []), headings.get("input file name:", [])
    frames = headings.get("frame number:", [])
    if not len(names) == len(inputs) == len(frames):
        raise VideoError(f"{path}: frame numbers, file names and input file names differ in count; restore the file")
    files = {}
    for at, name_at, input_at in zip(frames, names, inputs, strict=True):
        frame = numbers.get(normal(PureWindowsPath(value(input_at)).stem), number(value(at), "the number of a frame"))
        name = value(name_at)
        if not name or PureWindowsPath(name).name != name or "\0" in name or frame >= len(numbers):
            raise VideoError(f"{path}: mask {name!r} of frame {frame}, which does not belong to this sequence")
        files[frame] = locate(path.parent, name)
    return files, codes


def _codes(path: Path) -> np.ndarray:
    """The code of each pixel, int64 [H, W]: 65536 red + 256 green + blue, or the gray value."""
    try:
        with opened(path) as stored:
            image = upright(stored)
            if image.mode in ("L", "I", "I;16", "I;16B", "1"):
                return np.asarray(image.convert("I")).astype(np.int64)
            return np.asarray(image.convert("RGB")).astype(np.int64) @ np.array([65536, 256, 1])
    except (OSError, SyntaxError, ValueError) as error:
        raise damaged_mask(path, error) from error
