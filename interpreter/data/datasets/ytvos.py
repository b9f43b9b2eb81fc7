"""YouTube-VOS 2018 and 2019 as published (Xu et al. 2018): folders of JPEG frames, palette masks, and an index."""

import json
from pathlib import Path

from interpreter.data.datasets.annotations import MaskFiles, match_masks
from interpreter.data.datasets.unopened import UnopenedVideo, unopened_folder
from interpreter.data.tree import folders, listing, locate
from interpreter.data.video import FrameFolder
from interpreter.files import read_text

PARTS = ("train", "valid", "test")
ALL_FRAMES = "_all_frames"
SPLITS = (*PARTS, *(part + ALL_FRAMES for part in PARTS))


def find_ytvos(root: Path, split: str | None) -> list[UnopenedVideo]:
    """Find the videos of a split; masks are optional.

    Args:
        root: folder that holds ``train/JPEGImages/VIDEO``, ``train/Annotations/VIDEO`` and ``train/meta.json``, and
            likewise for ``valid``, ``test``, and ``train_all_frames`` and so on.
        split: ``train``, ``valid`` or ``test`` (every fifth frame, 6 per second), or one of them with ``_all_frames``
            (30 per second), whose masks may be in the folder of the split without ``_all_frames``. None is ``train``.

    Returns:
        The videos that meta.json lists, in its order. Without that file, the folders of frames, in natural order.

    Raises:
        FileNotFoundError: if there are no frames; lists the files found.
        ValueError: if the split does not exist, or meta.json is damaged.
    """
    split = split or "train"
    if split not in SPLITS:
        raise ValueError(f"YouTube-VOS has the splits {', '.join(SPLITS)}, not {split!r}")
    frames = root / split / "JPEGImages"
    if not frames.is_dir():
        raise FileNotFoundError(
            f"{frames}: no such folder; {root} holds {listing(root)}, {root / split} holds {listing(root / split)}"
        )
    index = root / split / "meta.json"
    names = _names(index) if index.is_file() else [folder.name for folder in folders(frames)]
    masks = [root / part / "Annotations" for part in (split, split.removesuffix(ALL_FRAMES))]
    chosen = next((folder for folder in masks if folder.is_dir()), masks[-1])
    return [_unopened(name, locate(frames, name), locate(chosen, name)) for name in names]


def _names(index: Path) -> list[str]:
    """The videos of an index: {"videos": {NAME: {"objects": …}}}."""
    try:
        content = json.loads(read_text(index))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index}: damaged JSON ({error}); download it again") from error
    videos = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(videos, dict):
        raise ValueError(f"{index}: it has no object 'videos'; restore the file, or remove it to read all folders")
    for name in videos:
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise ValueError(f"{index}: {name!r} is no name of a folder of frames; restore the file")
    return list(videos)


def _unopened(name: str, frames: Path, masks: Path) -> UnopenedVideo:
    def load() -> tuple[FrameFolder, MaskFiles]:
        video = FrameFolder(frames, name)
        return video, MaskFiles(match_masks(video.files, masks), video.files, masks)

    return unopened_folder(name, frames, load)
