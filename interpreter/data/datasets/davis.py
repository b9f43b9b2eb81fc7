"""The DAVIS directory layout: image sets, frames and palette masks (Perazzi et al. 2016, Pont-Tuset et al. 2017)."""

from pathlib import Path, PurePosixPath

from interpreter.data.datasets.annotations import MaskFiles, match_masks
from interpreter.data.datasets.unopened import UnopenedVideo, unopened_folder
from interpreter.data.images import hidden
from interpreter.data.options import DavisAnnotations
from interpreter.data.tree import listing, locate
from interpreter.data.video import FrameFolder
from interpreter.files import read_text

YEARS = (2016, 2017)
RESOLUTION = "480p"
FOLDERS: dict[DavisAnnotations, str] = {"unsupervised": "Annotations_unsupervised", "semi-supervised": "Annotations"}


def find_davis(root: Path, split: str | None, year: int, annotations: DavisAnnotations) -> list[UnopenedVideo]:
    """Read the image sets of a DAVIS release.

    Args:
        root: the folder that holds ``ImageSets``, ``JPEGImages`` and ``Annotations``.
        split: name of one image set, or None for all of them, in alphabetical order and without repeats.
        year: 2016 or 2017.
        annotations: masks of 2017: ``unsupervised`` (every salient object) or ``semi-supervised`` (those of the first
            frame). 2016 has one kind.

    Raises:
        FileNotFoundError: if a part of the layout is missing, or only the other kind of masks exists; lists what
            exists.
        ValueError: if the year or the kind of masks is none of the above.
    """
    if annotations not in FOLDERS:
        raise ValueError(f"annotations must be one of {', '.join(FOLDERS)}, not {annotations!r}")
    if year not in YEARS:
        raise ValueError(f"DAVIS year must be 2016 or 2017, not {year!r}")
    frames = root / "JPEGImages" / RESOLUTION
    if not frames.is_dir():
        raise FileNotFoundError(
            f"{root}: no JPEGImages/{RESOLUTION} below it, so it is no DAVIS root; "
            f"it holds {listing(root)}, JPEGImages holds {listing(root / 'JPEGImages')}"
        )
    folder = FOLDERS[annotations] if year == 2017 else "Annotations"
    masks = root / folder / RESOLUTION
    others = [kind for kind, other in FOLDERS.items() if other != folder and (root / other / RESOLUTION).is_dir()]
    if year == 2017 and not masks.is_dir() and others:
        raise FileNotFoundError(
            f"{root}: no {folder}/{RESOLUTION}, so it has no {annotations} masks; it has the {others[0]} ones: "
            f"choose --annotations {others[0]}"
        )
    names = dict.fromkeys(name for file in _image_sets(root, split, year) for name in _names(file))
    return [_unopened(name, locate(frames, name), locate(masks, name), binary=year == 2016) for name in names]


def _unopened(name: str, frames: Path, masks: Path, binary: bool) -> UnopenedVideo:
    def load() -> tuple[FrameFolder, MaskFiles]:
        video = FrameFolder(frames, name)
        return video, MaskFiles(match_masks(video.files, masks), video.files, masks, binary)

    return unopened_folder(name, frames, load)


def _image_sets(root: Path, split: str | None, year: int) -> list[Path]:
    folder = root / "ImageSets" / str(year)
    if year == 2016 and not folder.is_dir():
        folder = root / "ImageSets" / RESOLUTION  # the archive of 2016 has no folder for the year
    files = [file for file in sorted(folder.glob("*.txt")) if not hidden(file.name)]
    chosen = [file for file in files if split in (None, file.stem)]
    if not chosen:
        sets = [f"{p.parent.name}/{p.stem}" for p in sorted((root / "ImageSets").glob("*/*.txt")) if not hidden(p.name)]
        raise FileNotFoundError(
            f"{folder}: no image set {f'{split}.txt' if split else '(*.txt)'}; "
            f"ImageSets holds {', '.join(sets) or 'none'} (year/split)"
        )
    return chosen


def _names(file: Path) -> list[str]:
    """Sequence names of an image set, whose lines are names or (2016) pairs of a frame's and a mask's path."""
    names = []
    for line in read_text(file).splitlines():
        if fields := line.split():
            path = PurePosixPath(fields[0].replace("\\", "/"))
            name = path.parent.name if len(path.parts) > 1 else path.name
            if name in ("", "..") or "\0" in name:
                raise ValueError(f"{file}: {line!r} names no sequence")
            names.append(name)
    return list(dict.fromkeys(names))
