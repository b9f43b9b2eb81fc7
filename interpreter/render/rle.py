"""Masks in the results format of YouTube-VIS: one entry for each object, one RLE (or null) for each frame."""

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
CATEGORY = 1  # the format requires one; every ground truth of YouTube-VIS has a category 1


class ListedVideo(NamedTuple):
    """What :func:`write_videos` writes of a video."""

    id: int
    name: str
    height: int
    width: int
    length: int  # frames


def write_videos(path: str | Path, videos: Iterable[ListedVideo]) -> None:
    """Write the numbers and names of videos, in the form of YouTube-VIS's ground truth without annotations.

    So the YouTube-VIS API opens the file, and loads results for it, where the data set has no ground truth of its own.
    """
    categories = [{"id": CATEGORY, "name": "segment"}]
    content = {"videos": [video._asdict() for video in videos], "categories": categories, "annotations": []}
    write_text(Path(path), json.dumps(content) + "\n")


class RleWriter:
    """Collect label maps frame by frame and write all of them as one JSON file.

    Memory grows only by the run-length codes, about 100 bytes for each object and frame; no pixels are kept.
    Use it as a context manager: the file appears, complete, when the block ends well, and not at all if it fails.

    Each id that occurs is an object, also that of a slot that covers the background. Its entry is ``{"video_id",
    "category_id": 1, "score": 1.0, "segmentations": [...]}`` with a compressed COCO RLE ``{"size": [H, W], "counts":
    str}`` for each frame, None for the frames without it. The format requires a category and a score; without labels
    there are neither, so all are the same. Entries of a video are in ascending order of the ids. The YouTube-VIS API
    accepts the file for a ground truth that has the video's number.

    Args:
        path: of the JSON file; missing folders are made.
        hidden: an id that is no object, such as 0 for pixels without one.
        names: of objects, by their ids; their entries get ``"name"`` as well.
    """

    def __init__(self, path: str | Path, hidden: int | None = None, names: Mapping[int, str] | None = None) -> None:
        self.path, self.hidden, self.names = Path(path), hidden, names or {}
        self._videos: dict[int | str, _Video] = {}

    def write(self, video_id: int | str, labels: np.ndarray) -> None:
        """Append a frame to the video of a number (or name): integer [H, W] ids, the same in all of its frames.

        Raises:
            ValueError: if the frame is not [H, W] integers, or of another size than the video's frames before it.
        """
        self._videos.setdefault(video_id, _Video()).add(labels)

    def __enter__(self) -> "RleWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with written_whole(self.path) as temporary, temporary.open("w", encoding="ascii") as file:
                separator = "["
                for video_id, video in self._videos.items():
                    for label, entry in video.entries(video_id):  # one at a time: all are ten times the codes
                        if label == self.hidden:
                            continue
                        named = {"name": self.names[label]} if label in self.names else {}
                        file.write(separator + json.dumps(entry | named))
                        separator = ", "
                file.write("[]" if separator == "[" else "]")


class RleSpool:
    """Writes what :class:`RleWriter` writes of one video, of any length: codes wait in files, not in memory.

    Args:
        path: of the JSON file; it appears, complete, when the block ends well.
        video_id: of the video.
        folder: for the codes of each object; it is removed at the end.
    """

    def __init__(self, path: Path, video_id: int | str, folder: Path) -> None:
        self.path, self.video_id, self.folder = path, video_id, folder
        self._length, self._size = 0, [0, 0]
        self._files: dict[int, TextIO] = {}
        folder.mkdir(parents=True)

    def write(self, labels: np.ndarray) -> None:
        """Append a frame, integer [H, W] ids."""
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
        """The text of an object's entry, in pieces."""
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
