"""Writing a data set in the DAVIS 2017 layout."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from interpreter.console import tracked
from interpreter.data.datasets import VideoDataset
from interpreter.data.datasets.layout import (
    Picture,
    claim,
    encoded,
    encoded_mask,
    has_video,
    locked,
    make_folders,
    write_set,
    write_video,
)
from interpreter.data.video import FrameFolder, Video


def convert_dataset(dataset: VideoDataset, origin: str, out: Path, split: str) -> None:
    """Write a data set as DAVIS 2017 with unsupervised masks; ``open_dataset("davis", out, split)`` reads it.

    Frames of a folder are copied byte for byte; frames of video files and cropped frames become PNG, without loss.
    Frames without annotation get no mask. ``OUT/converted-SPLIT.json`` records what the split is made of. If
    interrupted, repeat the call to resume.

    >>> convert_dataset(open_dataset("folder", clips), "clips", folder / "copy", "all")
    >>> [video.num_frames for video in open_dataset("davis", folder / "copy", "all")]
    [3, 5]

    Args:
        dataset: the data set to write.
        origin: name of the data set in the manifest; an existing split must have the same origin.
        out: folder to write to; several splits can share it.
        split: name of the split to write.

    Raises:
        ValueError: if two videos would get the same name, or the split exists and was made of something else.
        VideoError: if a mask is damaged.
    """
    names = [video.name.replace("/", "-") for video in dataset.videos]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two videos would both be called {twice!r} in {out}; rename one of their folders")
    make_folders(out)
    with locked(out):
        claim(out / f"converted-{split}.json", {"origin": origin, "split": split, "num_videos": len(names)})
        for index, name in enumerate(tracked(names, len(names), f"converting {split}")):
            if not has_video(out, name, dataset.videos[index].num_frames):
                write_video(out, name, _masks(dataset, index), _frames(dataset.videos[index]))
        write_set(out, split, names)


def _masks(dataset: VideoDataset, index: int) -> Iterator[Picture]:
    masks = dataset.masks(index)
    for frame in dataset.mask_frames(index).tolist():
        assert masks is not None
        yield Picture(frame, ".png", encoded_mask(masks[frame]))


def _frames(video: Video) -> Iterator[Picture]:
    if isinstance(video, FrameFolder):
        for frame, file in enumerate(video.files):
            yield Picture(frame, file.suffix.lower(), file.read_bytes())
    else:
        for frame, pixels in enumerate(video.frames()):
            yield Picture(frame, ".png", encoded(Image.fromarray(pixels), "PNG", compress_level=1))
