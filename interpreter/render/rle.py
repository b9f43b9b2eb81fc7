"""Masks in the format of YouTube-VIS results: one entry per object, with one RLE (or null) per frame."""

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from pycocotools import mask as coco

from interpreter.files import write_text, written_whole

Entry = dict[str, object]
CATEGORY = 1  # required by the format; every ground truth of YouTube-VIS has a category 1


class ListedVideo(NamedTuple):
    """Facts about a video for :func:`write_videos`."""

    id: int
    name: str
    height: int
    width: int
    length: int  # frames


def write_videos(path: str | Path, videos: Iterable[ListedVideo]) -> None:
    """Write the numbers and names of videos, in the form of YouTube-VIS's ground truth without annotations.

    So the YouTube-VIS API can open the file and load results for it if the data set has no ground truth.
    """
    categories = [{"id": CATEGORY, "name": "segment"}]
    content = {"videos": [video._asdict() for video in videos], "categories": categories, "annotations": []}
    write_text(Path(path), json.dumps(content) + "\n")


class RleWriter:
    """Collect label maps frame by frame, and write them as one JSON file.

    Only run-length codes are kept in memory, about 100 bytes for each object and frame.
    Use it as a context manager: the complete file appears if the block succeeds, and no file if it fails.

    Each id that occurs is an object, also the id of a slot that covers the background. Its entry is ``{"video_id",
    "category_id": 1, "score": 1.0, "segmentations": [...]}``, with a compressed COCO RLE ``{"size": [H, W], "counts":
    str}`` for each frame, and None for frames without the object. The format requires a category and a score, so all
    entries have the same ones. Entries of a video are in ascending order of the ids. The YouTube-VIS API accepts the
    file for a ground truth that has the video's number.

    Args:
        path: path of the JSON file. Missing folders are created.
        hidden: an id that is not an object, such as 0 for pixels without an object.
        names: names of objects, by their ids. Their entries also get a ``"name"``.
    """

    def __init__(self, path: str | Path, hidden: int | None = None, names: Mapping[int, str] | None = None) -> None:
        self.path, self.hidden, self.names = Path(path), hidden, names or {}
        self._videos: dict[int | str, _Video] = {}

    def write(self, video_id: int | str, labels: np.ndarray) -> None:
        """Append a frame to a video, by its number or name: integer ids [H, W], consistent over its frames.

        Raises:
            ValueError: if the frame is not integers [H, W], or has a different size than the earlier frames.
        """
        self._videos.setdefault(video_id, _Video()).add(labels)

    def __enter__(self) -> "RleWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with written_whole(self.path) as temporary, temporary.open("w", encoding="ascii") as file:
                separator = "["
                for video_id, video in self._videos.items():
                    for label, entry in video.entries(video_id):  # one at a time: all take ten times the codes
                        if label == self.hidden:
                            continue
                        named = {"name": self.names[label]} if label in self.names else {}
                        file.write(separator + json.dumps(entry | named))
                        separator = ", "
                file.write("[]" if separator == "[" else "]")


class RleSpool:
    """Writes the same as :class:`RleWriter` for one video of any length. Codes are kept in files, not in memory.

    Args:
        path: path of the JSON file. The complete file appears if the block succeeds.
        video_id: number of the video.
        folder: folder for the codes of each object. It is removed at the end.
    """

    def __init__(self, path: Path, video_id: int | str, folder: Path) -> None:
        self.path, self.video_id, self.folder = path, video_id, folder
        self._length, self._size = 0, [0, 0]
        self._files: dict[int, TextIO] = {}
        folder.mkdir(parents=True)

    def write(self, labels: np.ndarray) -> None:
        """Append a frame, integer ids [H, W]."""
        self._size = list(labels.shape)
        for label, counts in _codes(labels):
            if label not in self._files:
                self._files[label] = (self.folder / str(label)).open("w+", encoding="ascii")
            self._files[label].write(f"{self._length} {counts.decode('ascii')}\n")
        self._length += 1

    def __enter__(self) -> "RleSpool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with written_whole(self.path) as temporary, temporary.open("w", encoding="ascii") as file:
                    file.write("[")
                    for number, label in enumerate(sorted(self._files)):
                        file.write(", " * bool(number))
                        file.writelines(self._entry(label))
                    file.write("]")
        finally:
            for opened in self._files.values():
                opened.close()
            shutil.rmtree(self.folder)

    def _entry(self, label: int) -> Iterator[str]:
        """The text of the entry of an object, in pieces."""
        entry = json.dumps({"video_id": self.video_id, "category_id": CATEGORY, "score": 1.0, "segmentations": []})
        yield entry.removesuffix("]}")
        frame, separator = 0, ""
        self._files[label].seek(0)
        for line in self._files[label]:
            number, counts = line.split()
            code = json.dumps({"size": self._size, "counts": counts})
            for text in (*itertools.repeat("null", int(number) - frame), code):
                yield separator + text
                separator = ", "
            frame = int(number) + 1
        for _ in range(frame, self._length):
            yield separator + "null"
        yield "]}"


def _codes(labels: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Each id of a label map in ascending order, and the counts of its RLE."""
    columns_first = np.asfortranarray(labels)  # the order of COCO's runs
    for label in np.unique(labels).tolist():
        yield label, coco.encode((columns_first == label).view(np.uint8))["counts"]


class _Video:
    """The codes of one video: id -> {frame: counts of its RLE}."""

    def __init__(self) -> None:
        self.length = 0
        self.size: tuple[int, ...] | None = None
        self.objects: dict[int, dict[int, bytes]] = {}

    def add(self, labels: np.ndarray) -> None:
        if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels must be integers [H, W], got {labels.dtype} {labels.shape}")
        if self.size not in (None, labels.shape):
            raise ValueError(f"labels {labels.shape} differ in size from the frames before, {self.size}")
        self.size = labels.shape
        for label, counts in _codes(labels):
            self.objects.setdefault(label, {})[self.length] = counts
        self.length += 1

    def entries(self, video_id: int | str) -> Iterator[tuple[int, Entry]]:
        for label, codes in sorted(self.objects.items()):
            segmentations = [
                {"size": list(self.size or ()), "counts": codes[frame].decode("ascii")} if frame in codes else None
                for frame in range(self.length)
            ]
            entry: Entry = {"video_id": video_id, "category_id": CATEGORY, "score": 1.0, "segmentations": segmentations}
            yield label, entry
