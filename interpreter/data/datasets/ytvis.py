"""YouTube-VIS 2019 and 2021 as published (Yang et al. 2019): JPEG folders, and one JSON file with run-length codes."""

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np

from interpreter.data.datasets.annotations import MAX_OBJECTS, VOID, Annotation
from interpreter.data.datasets.unopened import UnopenedVideo
from interpreter.data.rle import decode_rle
from interpreter.data.tree import listing, locate
from interpreter.data.video import FrameFolder, Size, VideoError
from interpreter.files import read_text

# The evaluation set of SOLV (Aydemir et al. 2023): these entries of train.json, in file order.
HOLDOUT = slice(600, 900)
# The evaluation set of Slot Contrast (Manasyan et al. 2025): the entries of train.json with the largest ids; their
# number.
LAST = 300
# Splits of train.json, and those of the other files.
SPLITS_OF_TRAIN = ("train", "holdout", "without-last-300", "last-300", "all")
SPLITS = (*SPLITS_OF_TRAIN, "valid", "test")
# Splits for evaluation, and for each the split for training that shares no video with it.
TRAINING_FOR = {"holdout": "train", "last-300": "without-last-300"}
Track: TypeAlias = Sequence[Mapping[str, Any] | None]  # code of an object in each frame; None: not visible


class RleTracks(Annotation):
    """Masks as run-length codes, which stay compressed until a frame is read.

    Args:
        objects: ``objects[k]`` is object k + 1; where two overlap, the later one is in front.
        crowds: regions of many objects; their pixels are void unless they belong to an object.
        where: file and video, for messages.

    Raises:
        VideoError: if there are more than 254 objects.
    """

    def __init__(self, objects: Sequence[Track], crowds: Sequence[Track], num_frames: int, where: str) -> None:
        if len(objects) > MAX_OBJECTS:
            raise VideoError(f"{where}: {len(objects)} objects, but label maps hold at most {MAX_OBJECTS}")
        self.frames = range(num_frames)
        self.objects, self.crowds, self.where = objects, crowds, where

    def read(self, frame: int, size: Size) -> np.ndarray:
        """See `Annotation.read`."""
        mask = np.zeros(size, np.uint8)
        layers = [(VOID, track) for track in self.crowds] + list(enumerate(self.objects, 1))
        for label, track in layers:
            if (code := track[frame]) is not None:
                mask[self._decode(code, size, frame)] = label
        return mask

    def check(self, size: Size) -> None:
        """Compare the sizes that the codes declare. Runs are checked when they are decoded."""
        for track in (*self.objects, *self.crowds):
            for frame, code in enumerate(track):
                if code is not None and code.get("size") != list(size):
                    raise VideoError(
                        f"{self.where}: frame {frame} has a mask of size {code.get('size')} for frames of {list(size)}"
                    )

    def _decode(self, code: Mapping[str, Any], size: Size, frame: int) -> np.ndarray:
        counts = code.get("counts")
        plain = {**code, "counts": counts.tolist()} if isinstance(counts, array) else code
        try:
            return decode_rle(plain, size, f"{self.where}: frame {frame}")
        except VideoError:
            raise
        except ValueError as error:
            raise VideoError(str(error)) from error


def find_ytvis(root: Path, split: str | None) -> list[UnopenedVideo]:
    """Read the index of a split.

    Args:
        root: folder that holds ``train/JPEGImages`` and ``train.json`` (or ``train/instances.json``), and likewise
            for ``valid`` and ``test``.
        split: ``train`` (train.json without the hold-out), ``holdout`` (its entries 600 to 899 in file order),
            ``last-300`` (its 300 entries with the largest ids), ``without-last-300`` (all but these), ``all`` (the
            whole train.json), ``valid`` or ``test``; None is ``all``. Entries stay in file order.

    Raises:
        FileNotFoundError: if the JSON or the frames are missing; lists the files found.
        ValueError: if the split does not exist, or the JSON is damaged.
    """
    split = split or "all"
    if split not in SPLITS:
        raise ValueError(f"YouTube-VIS has the splits {', '.join(SPLITS)}, not {split!r}")
    part = "train" if split in SPLITS_OF_TRAIN else split
    index, frames = find_index(root, part), root / part / "JPEGImages"
    if not frames.is_dir():
        raise FileNotFoundError(f"{frames}: no such folder; {root / part} holds {listing(root / part)}")
    content = _load(index)
    videos = _entries(content.get("videos"), "videos", index)
    chosen = _chosen(videos, split, index)
    ids = [video.get("id") for video in videos]
    if len(set(map(repr, ids))) != len(ids):
        raise ValueError(f"{index}: two videos have the same id; restore the file")
    annotated = content.get("annotations") is not None  # valid and test have no annotations
    tracks: dict[str, list[dict[str, Any]]] = {repr(identity): [] for identity in ids}
    for entry in _entries(content.get("annotations") or [], "annotations", index):
        if (key := repr(entry.get("video_id"))) not in tracks:
            raise ValueError(f"{index}: annotation {entry.get('id')!r} is of video {key}, which is not there")
        tracks[key].append(entry)
    return [_unopened(video, tracks[repr(video.get("id"))] if annotated else None, index, frames) for video in chosen]


def _chosen(videos: list[dict[str, Any]], split: str, index: Path) -> list[dict[str, Any]]:
    """The entries of a split, in file order."""
    if split == "holdout":
        if len(videos) <= HOLDOUT.start:
            raise ValueError(
                f"{index}: the hold-out is its entries {HOLDOUT.start} to {HOLDOUT.stop - 1}, but it has {len(videos)}"
            )
        return videos[HOLDOUT]
    if split == "train":
        return videos[: HOLDOUT.start] + videos[HOLDOUT.stop :]
    if split not in ("last-300", "without-last-300"):
        return videos
    if len(videos) <= LAST:
        raise ValueError(f"{index}: split {split} divides more than {LAST} entries, but it has {len(videos)}")
    if not all(type(video.get("id")) is int for video in videos):
        raise ValueError(f"{index}: split {split} needs whole numbers as ids of the videos; restore the file")
    last = {video["id"] for video in sorted(videos, key=lambda video: video["id"])[-LAST:]}
    return [video for video in videos if (video["id"] in last) == (split == "last-300")]


def find_index(root: Path, part: str) -> Path:
    """The JSON file of ``train``, ``valid`` or ``test``.

    Raises:
        FileNotFoundError: if it is in none of the three possible places.
    """
    places = [root / f"{part}.json", root / part / "instances.json", root / part / f"{part}.json"]
    for place in places:
        if place.is_file():
            return place
    names = " or ".join(place.relative_to(root).as_posix() for place in places)
    raise FileNotFoundError(f"{root}: no {names}; it holds {listing(root)}")


def published_number(folder: Path) -> int | None:
    """The number that YouTube-VIS gives a video: its ``video_id`` in files of results.

    Args:
        folder: the folder of the video's frames, ``ROOT/SPLIT/JPEGImages/NAME`` for a video of YouTube-VIS.

    Returns:
        Its id in the index of the split; None if the folder is not in YouTube-VIS, or the index does not list it.
    """
    folder = folder.resolve()
    frames = folder.parent
    if frames.name != "JPEGImages" or not folder.is_dir():
        return None
    try:
        index = find_index(frames.parent.parent, frames.parent.name)
        state = index.stat()
    except FileNotFoundError:
        return None
    return _numbers(index, state.st_mtime_ns, state.st_size).get(folder.name)


@lru_cache(maxsize=8)  # a release has three indices; each is read once for all of its videos
def _numbers(index: Path, modified: int, size: int) -> dict[str, int]:
    """The number of each video, by its folder. Time and size of the index are part of the key of the cache."""
    text = read_text(index)
    numbers: dict[str, int] = {}
    # The list of videos is small; the annotations in the same file take seconds to parse.
    for start in re.finditer(r'"videos"\s*:\s*(?=\[)', text):
        try:
            videos, _ = json.JSONDecoder().raw_decode(text, start.end())
        except (ValueError, RecursionError):
            continue
        for video in videos:
            if isinstance(video, dict) and type(video.get("id")) is int:
                numbers.setdefault(_folder_of(video), video["id"])
    return numbers


def _folder_of(video: Mapping[str, Any]) -> str:
    """The folder of a video's frames, below JPEGImages."""
    names = video.get("file_names")
    first = names[0] if isinstance(names, list) and names else ""
    return str(first).replace("\\", "/").rpartition("/")[0]


def _load(index: Path) -> dict[str, Any]:
    text = read_text(index)
    try:
        content = json.loads(text, object_hook=_compact)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index}: damaged JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{index}: not an object with videos and annotations; is it the right file?")
    return content


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """Pack uncompressed runs as 32-bit numbers while parsing. As Python objects, those of 2019 take gigabytes."""
    counts = entry.get("counts")
    if isinstance(counts, list) and all(type(count) is int and 0 <= count < 1 << 32 for count in counts):
        entry["counts"] = array("I", counts)
    return entry


def _entries(value: object, name: str, index: Path) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{index}: {name!r} is no list of objects; restore the file")
    return value


def _unopened(video: dict[str, Any], entries: list[dict[str, Any]] | None, index: Path, frames: Path) -> UnopenedVideo:
    where = f"{index}: video {video.get('id')!r}"
    names = video.get("file_names")
    try:
        files = [locate(frames, str(safe_path(name, where))) for name in names] if isinstance(names, list) else []
        problem = "" if files else "has no list of file_names"
    except VideoError as error:
        files, problem = [], str(error).removeprefix(f"{where}: ")
    folder = files[0].parent if files else frames
    name = folder.relative_to(frames).as_posix() if folder != frames else f"video-{video.get('id')}"

    def load() -> tuple[FrameFolder, Annotation | None]:
        if problem:
            raise VideoError(f"{where}: {problem}; restore the file")
        opened = FrameFolder(folder, name, files)
        declared = [video.get("height"), video.get("width")]
        if declared != [opened.height, opened.width]:
            raise VideoError(
                f"{where}: frames of {opened.height}x{opened.width} in {folder} where the index says "
                f"{declared[0]}x{declared[1]} (height x width)"
            )
        return opened, None if entries is None else _annotation(entries, len(files), where)

    return UnopenedVideo(name, folder, load, files, id=video.get("id"))


def _annotation(entries: list[dict[str, Any]], num_frames: int, where: str) -> RleTracks:
    objects: list[Track] = []
    crowds: list[Track] = []
    for entry in entries:
        track = entry.get("segmentations")
        if not isinstance(track, list) or not all(code is None or isinstance(code, dict) for code in track):
            raise VideoError(f"{where}: annotation {entry.get('id')!r} has no list of run-length codes")
        if len(track) != num_frames:
            raise VideoError(f"{where}: annotation {entry.get('id')!r} has {len(track)} masks for {num_frames} frames")
        (crowds if entry.get("iscrowd") else objects).append(track)
    return RleTracks(objects, crowds, num_frames, where)


def safe_path(name: object, where: str) -> PurePosixPath:
    """A relative path from an index, which may have Windows' backslashes.

    Raises:
        VideoError: if it is not a relative path, or leads out of its folder.
    """
    path = PurePosixPath(name.replace("\\", "/")) if isinstance(name, str) else PurePosixPath()
    outside = path.is_absolute() or Path(path).drive or ".." in path.parts
    if not path.parts or outside or "\0" in str(path):
        raise VideoError(f"{where}: {name!r} is no path below the folder of frames")
    return path
