"""SegTrack-v2 as published (Li et al. 2013): png or bmp frames, and a folder of binary masks for each object."""

from pathlib import Path

import numpy as np

from interpreter.data.datasets.annotations import MAX_OBJECTS, Annotation, check_mask, match_masks, read_ids
from interpreter.data.datasets.unopened import UnopenedVideo, unopened_folder
from interpreter.data.images import IMAGE_SUFFIXES, natural_key
from interpreter.data.tree import folders, listing
from interpreter.data.video import FrameFolder, Size, VideoError

_SUFFIXES = sorted(IMAGE_SUFFIXES)


class ObjectMasks(Annotation):
    """A binary mask for each object and frame, in gray, palette or colour. Edges may be blurred.

    Pixels above half of the mask's highest value belong to the object, so white may be 1, 255 or 65535.

    Args:
        objects: ``objects[k]`` are the masks of object k + 1, one or None for each frame. Where two objects overlap,
            the later one is in front. A frame is annotated if any object has a mask in it.
    """

    def __init__(self, objects: list[list[Path | None]]) -> None:
        self.objects = objects
        self.frames = [frame for frame, masks in enumerate(zip(*objects, strict=True)) if any(masks)]

    def read(self, frame: int, size: Size) -> np.ndarray:
        """See `Annotation.read`."""
        mask = np.zeros(size, np.uint8)
        for label, files in enumerate(self.objects, 1):
            if (file := files[frame]) is not None:
                values = read_ids(file, size, colours=True)
                mask[values > values.max() / 2] = label
        return mask

    def check(self, size: Size) -> None:
        """See `Annotation.check`."""
        for files in self.objects:
            for file in files:
                if file is not None:
                    check_mask(file, size)


def find_segtrack(root: Path, split: str | None) -> list[UnopenedVideo]:
    """Find the sequences of SegTrack-v2.

    Args:
        root: folder that holds ``JPEGImages/SEQUENCE`` and ``GroundTruth/SEQUENCE[/OBJECT]``.
        split: must be None: the release has none.

    Raises:
        FileNotFoundError: if there are no sequences; lists the files found.
        ValueError: if ``split`` is not None.
    """
    if split is not None:
        raise ValueError(f"SegTrack-v2 has no splits, so {split!r} cannot be chosen")
    sequences = folders(root / "JPEGImages")
    if not sequences:
        raise FileNotFoundError(f"{root}: no folders of frames in JPEGImages below it; it holds {listing(root)}")
    return [_unopened(frames, root / "GroundTruth" / frames.name) for frames in sequences]


def _unopened(frames: Path, truth: Path) -> UnopenedVideo:
    def load() -> tuple[FrameFolder, ObjectMasks | None]:
        video = FrameFolder(frames)
        objects = sorted(folders(truth), key=natural_key) or [truth]
        if len(objects) > MAX_OBJECTS:
            raise VideoError(f"{truth}: {len(objects)} objects, but label maps hold at most {MAX_OBJECTS}")
        masks = ObjectMasks([match_masks(video.files, folder, _SUFFIXES) for folder in objects])
        return video, masks if masks.frames else None

    return unopened_folder(frames.name, frames, load)
