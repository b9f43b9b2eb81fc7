"""Writes data sets in the DAVIS 2017 layout. Videos appear when complete, so interrupted work can be resumed."""

import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from interpreter.data.images import list_images
from interpreter.files import read_text, write_text
from interpreter.locks import waiting_for

FRAMES, MASKS, SETS = "JPEGImages/480p", "Annotations_unsupervised/480p", "ImageSets/2017"


class Picture(NamedTuple):
    """One file of a video: frame number, suffix and content."""

    frame: int
    suffix: str
    content: bytes


def make_folders(root: Path) -> None:
    """Make the folders of the layout."""
    for part in (FRAMES, MASKS, SETS):
        (root / part).mkdir(parents=True, exist_ok=True)


def has_video(root: Path, name: str, num_frames: int | None = None) -> bool:
    """Whether `write_video` finished this video, with ``num_frames`` frames unless that is None."""
    folder = root / FRAMES / name
    return folder.is_dir() and (num_frames is None or len(list_images(folder)) == num_frames)


def write_video(root: Path, name: str, masks: Iterable[Picture], frames: Iterable[Picture]) -> None:
    """Write one video under a temporary name, then rename it.

    Masks are renamed first, so a video that has frames is complete. Masks and frames are taken in turn, so a caller
    that computes both at once need not keep them in memory.

    Raises:
        OSError: if it cannot be written; :func:`locked` then removes the partial files.
    """
    partial = {part: root / part / f".{name}.partial" for part in (MASKS, FRAMES)}
    for part, folder in partial.items():
        for leftover in (folder, root / part / name):  # of an interrupted run
            shutil.rmtree(leftover, ignore_errors=True)
        folder.mkdir()
    for pair in zip_longest(masks, frames):
        for folder, picture in zip(partial.values(), pair, strict=True):
            if picture is not None:
                (folder / f"{picture.frame:05d}{picture.suffix}").write_bytes(picture.content)
    for part, folder in partial.items():
        folder.rename(root / part / name)


def write_set(root: Path, split: str, names: Iterable[str]) -> None:
    """Write the image set of a split. Do this last: it makes the split readable."""
    write_text(root / SETS / f"{split}.txt", "".join(f"{name}\n" for name in names))


def claim(manifest: Path, record: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Record in a manifest what a split is made of, or compare with an existing manifest.

    Args:
        manifest: the JSON file.
        record: what the split is made of; ``num_videos`` may be larger than before, everything else must be equal.
        defaults: entries with these values are not written, because older manifests do not have them.

    Raises:
        ValueError: if the split was made of something else, or of more videos.
    """
    record, defaults = json.loads(json.dumps([record, defaults or {}]))
    if manifest.exists():
        try:
            existing = {**defaults, **json.loads(read_text(manifest))}
            before = int(existing["num_videos"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{manifest}: damaged ({error!r}); delete it and run the same command again") from error
        different = [
            f"{k}={existing.get(k)} (now {v})" for k, v in record.items() if k != "num_videos" and existing.get(k) != v
        ]
        if before > record["num_videos"]:
            different.append(f"num_videos={before} (now {record['num_videos']})")
        if different:
            raise ValueError(
                f"{manifest}: this split was made with {', '.join(different)}; "
                "choose another root or split, or delete this one"
            )
    record = {k: v for k, v in record.items() if k not in defaults or v != defaults[k]}
    write_text(manifest, json.dumps(record, indent=2) + "\n")


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """An image as the bytes of a file."""
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def encoded_mask(mask: np.ndarray) -> bytes:
    """A label map uint8 [H, W] as a palette PNG with the colours of PASCAL VOC and DAVIS."""
    image = Image.fromarray(mask)
    image.putpalette(_PALETTE)
    return encoded(image, "PNG")


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Let one process at a time write to a root. The others print a line and wait.

    Partial videos of an interrupted process are removed at the start and at the end.
    """
    with waiting_for(root / ".lock", str(root)) as lock:
        try:
            if lock.exclusive:
                _remove_partial(root)
            yield
        finally:
            if lock.exclusive:
                _remove_partial(root)


def _remove_partial(root: Path) -> None:
    for part in (FRAMES, MASKS):
        for folder in (root / part).glob(".*.partial"):
            shutil.rmtree(folder)


def _palette() -> list[int]:
    """The colour map of PASCAL VOC and DAVIS: the bits of an id, spread over the high bits of red, green and blue."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours.ravel().tolist()


_PALETTE = _palette()
