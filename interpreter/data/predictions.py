"""Saved segmentations of any method, read one video at a time: palette PNGs, YouTube-VIS results, .npz."""

import abc
import json
import math
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from interpreter.data.datasets.annotations import read_ids
from interpreter.data.images import natural_key, normal
from interpreter.data.rle import decode_rle
from interpreter.data.tree import LeftOut, listing, split_frames, walk
from interpreter.data.video import VideoError
from interpreter.files import read_text

T = TypeVar("T")
LARGEST_ID = 65535
KEYS = ("masks", "labels")
"""Names of the label maps in an .npz file of a single video."""


class PredictionError(ValueError):
    """Saved masks cannot be used. The message is one line: the file, what is wrong, and what was expected."""


class Predictions(abc.ABC):
    """The saved segmentations of a data set.

    Attributes:
        path: the file or folder they are read from.
        names: names of the videos, in natural order and in Unicode NFC.
        background: id of pixels that belong to no segment; None if every id is a segment.
    """

    path: Path
    names: list[str]
    background: int | None

    def labels(self, name: str, num_frames: int, size: tuple[int, int]) -> np.ndarray:
        """Read the label maps of one video. They are read again in each call.

        Args:
            name: name of the video.
            num_frames: required number of frames.
            size: required (H, W) of its maps.

        Returns:
            uint8 or uint16 [T, H, W]: the id of each pixel's segment, the same in all frames.

        Raises:
            PredictionError: if the video is missing, its file is damaged, or it has another number of frames or another
                size; names the file.
        """
        name = normal(name)
        if name not in self.names:
            shown = ", ".join(self.names[:5] + ["…"] * (len(self.names) > 5))
            raise PredictionError(
                f"{self.path}: no masks of video {name!r}; it holds {len(self.names)} videos: {shown}"
            )
        return self._read(name, num_frames, size)

    @abc.abstractmethod
    def _read(self, name: str, num_frames: int, size: tuple[int, int]) -> np.ndarray:
        """:meth:`labels` of a video that exists."""


def open_predictions(path: str | Path, video_ids: Mapping[str, int | str] | None = None) -> Predictions:
    """Open saved masks in one of three formats, recognised by the files at ``path``.

    >>> np.savez(folder / "results.npz", walk=np.zeros((5, 64, 96), np.uint8))
    >>> predictions = open_predictions(folder / "results.npz")
    >>> predictions.names, predictions.labels("walk", 5, (64, 96)).shape
    (['walk'], (5, 64, 96))

    - ``png``: DIR/VIDEO/00000.png …, one gray or palette image for each frame, in the order of their numbers. The value
      of a pixel is its segment (255 too), and 0 is background, as in DAVIS. The name of a video is its path below DIR,
      which may have several folders.
    - ``youtube-vis``: a results file, a list of ``{"video_id", "category_id", "score", "segmentations"}`` with an RLE
      or null for each frame. The entries of a video become segments 1, 2 … in the order of the file, whatever their
      category. Where entries overlap, the entry with the higher score gets the pixel; if scores are equal, the earlier
      entry. Pixels in no entry are 0, the background, which is never matched with an object. A file ``videos.json`` in
      the same folder, as ``interpreter.segment`` writes it, may give the name of each ``video_id``.
    - ``npz``: DIR/VIDEO.npz with one array ``masks`` or ``labels``, or one file FILE.npz with an array for each video,
      named like the video. Arrays are integers [T, H, W]. Every id is a segment, also 0.

    Args:
        path: folder or file.
        video_ids: name of each video of the data set -> its ``video_id`` in a YouTube-VIS file that has no
            ``videos.json``. By default the id is the name.

    Raises:
        FileNotFoundError: if there is nothing at ``path``, or no file of any of the formats.
        PredictionError: if the file is damaged, or there are two sets of masks for one video.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix.lower() == ".json":
            return _YouTubeVis(path, video_ids)
        if path.suffix.lower() == ".npz":
            return _NpzFile(path)
        raise PredictionError(f"{path}: masks are read from .json (YouTube-VIS results), .npz or a folder")
    suffixes = Counter(file.suffix.lower() for folder in walk(path, LeftOut()) for file in folder.files)
    if ".png" in suffixes:
        return _PngFolders(path)
    if ".npz" in suffixes:
        return _NpzFolder(path)
    shown = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in suffixes.most_common(5)) or "nothing"
    raise FileNotFoundError(
        f"{path}: no .png or .npz files below it, it holds {shown}; give a results .json as the file itself"
    )


def _by_name(path: Path, masks: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Where the masks of each video are, by its name in Unicode NFC.

    Raises:
        PredictionError: if two have the same name; names both.
    """
    by_name: dict[str, T] = {}
    for name, place in masks:
        if (name := normal(name)) in by_name:
            raise PredictionError(
                f"{path}: two sets of masks for video {name!r}: {by_name[name]} and {place}; keep one of them"
            )
        by_name[name] = place
    return by_name


class _PngFolders(Predictions):
    background = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        found = {}
        for folder in walk(path, LeftOut()):
            masks = [file for file in folder.files if file.suffix.lower() == ".png"]
            if masks and folder.path != path:
                found[folder.path] = masks
        folders = _by_name(path, ((folder.relative_to(path).as_posix(), folder) for folder in found))
        self._masks = {name: found[folder] for name, folder in folders.items()}
        self.names = sorted(self._masks, key=natural_key)
        if not self.names:
            raise FileNotFoundError(
                f"{path}: no folders of PNG masks below it (VIDEO/00000.png …); it holds {listing(path)}"
            )

    def _read(self, name: str, num_frames: int, size: tuple[int, int]) -> np.ndarray:
        files, others, problem = split_frames(self._masks[name])
        folder = self._masks[name][0].parent
        if problem:
            raise PredictionError(f"{folder}: {problem}")
        if len(files) != num_frames:
            beside = f", beside others such as {others[0].name}" if others else ""
            raise PredictionError(
                f"{folder}: {len(files)} masks ({files[0].name} to {files[-1].name}{beside}) for {num_frames} frames; "
                "there must be one for each frame"
            )
        maps = np.zeros((num_frames, *size), np.uint8)
        for t, file in enumerate(files):
            try:
                ids = read_ids(file, size)
            except VideoError as error:  # names the file
                raise PredictionError(str(error)) from error
            if ids.min() < 0 or ids.max() > LARGEST_ID:
                raise PredictionError(f"{file}: ids {ids.min()}..{ids.max()} where 0..{LARGEST_ID} are expected")
            if ids.max() > 255:
                maps = maps.astype(np.uint16, copy=False)
            maps[t] = ids
        return maps


class _YouTubeVis(Predictions):
    background = 0

    def __init__(self, path: Path, video_ids: Mapping[str, int | str] | None) -> None:
        self.path = path
        try:
            entries = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise PredictionError(f"{path}: not a JSON file that can be read ({error})") from error
        if not isinstance(entries, list):
            raise PredictionError(
                f"{path}: YouTube-VIS results are a list of entries, this is {type(entries).__name__}"
            )
        self._entries: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or type(entry.get("video_id")) not in (int, str):
                raise PredictionError(f"{path}: entry {number} is not an object with a video_id (number or string)")
            self._entries[str(entry["video_id"])].append((number, entry))
        self._ids = _by_name(path, self._named_ids(video_ids))
        self.names = sorted(self._ids, key=natural_key)

    def _named_ids(self, video_ids: Mapping[str, int | str] | None) -> list[tuple[str, str]]:
        """The names of the videos in the file, each with its id there."""
        listed = _listed_names(self.path.with_name("videos.json"))
        if video_ids is None:
            by_id = {key: key for key in self._entries} | listed
            return [(name, key) for key, name in by_id.items() if key in self._entries]
        known = {normal(name) for name in video_ids}
        named = [(name, key) for key, name in listed.items() if name in known]
        named += [(name, str(key)) for name, key in video_ids.items() if str(key) not in listed]
        return [(name, key) for name, key in named if key in self._entries]

    def _read(self, name: str, num_frames: int, size: tuple[int, int]) -> np.ndarray:
        entries = self._entries[self._ids[name]]
        if len(entries) > LARGEST_ID:
            raise PredictionError(f"{self.path}: {len(entries)} entries for video {name!r}; at most {LARGEST_ID} work")
        maps = np.zeros((num_frames, *size), np.uint8 if len(entries) < 256 else np.uint16)
        scored = [(self._score(number, entry), -i, number, entry) for i, (number, entry) in enumerate(entries)]
        for _, minus_i, number, entry in sorted(scored, key=lambda item: item[:2]):  # the best is painted last
            masks = entry.get("segmentations")
            where = f"{self.path}: entry {number}, video {name!r}"
            if not isinstance(masks, list) or len(masks) != num_frames:
                actual = f"{len(masks)} segmentations" if isinstance(masks, list) else "no list of segmentations"
                raise PredictionError(f"{where}: {actual} for {num_frames} frames")
            for t, rle in enumerate(masks):
                if rle is not None:
                    try:
                        maps[t][decode_rle(rle, size, f"{where}, frame {t}")] = 1 - minus_i
                    except ValueError as error:
                        raise PredictionError(str(error)) from error
        return maps

    def _score(self, number: int, entry: Mapping[str, Any]) -> float:
        score = entry.get("score")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise PredictionError(f"{self.path}: entry {number} has score {score!r}, which is no finite number")
        return score


def _listed_names(path: Path) -> dict[str, str]:
    """The name of each video in ``videos.json`` (in Unicode NFC), by its number; empty if there is no such file.

    Raises:
        PredictionError: if the file is damaged, or gives a number to two videos.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise PredictionError(f"{path}: not a JSON file that can be read ({error})") from error
    videos = content.get("videos") if isinstance(content, dict) else None
    names: dict[str, str] = {}
    for video in videos if isinstance(videos, list) else ():
        number, name = (video.get("id"), video.get("name")) if isinstance(video, dict) else (None, None)
        if type(number) is not int or not isinstance(name, str):
            continue
        if names.setdefault(str(number), name := normal(name)) != name:
            raise PredictionError(f"{path}: video {number} is both {names[str(number)]!r} and {name!r}")
    return names


class _NpzFolder(Predictions):
    background = None

    def __init__(self, path: Path) -> None:
        self.path = path
        files = [file for folder in walk(path, LeftOut()) for file in folder.files if file.suffix.lower() == ".npz"]
        self._files = _by_name(path, ((file.relative_to(path).with_suffix("").as_posix(), file) for file in files))
        self.names = sorted(self._files, key=natural_key)

    def _read(self, name: str, num_frames: int, size: tuple[int, int]) -> np.ndarray:
        file = self._files[name]
        arrays = _arrays(file)
        keys = [key for key in KEYS if key in arrays]
        if len(keys) != 1:
            raise PredictionError(f"{file}: exactly one array named masks or labels is expected, it holds {arrays[:5]}")
        return _read_array(file, keys[0], (num_frames, *size))


class _NpzFile(Predictions):
    background = None

    def __init__(self, path: Path) -> None:
        self.path = path
        arrays = _arrays(path)
        if not arrays:
            raise PredictionError(f"{path}: holds no arrays")
        single = len(arrays) == 1 and arrays[0] in KEYS
        self._keys = _by_name(path, [(path.stem, arrays[0])] if single else [(key, key) for key in arrays])
        self.names = sorted(self._keys, key=natural_key)

    def _read(self, name: str, num_frames: int, size: tuple[int, int]) -> np.ndarray:
        return _read_array(self.path, self._keys[name], (num_frames, *size))


_DAMAGED_ZIP = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
)


def _arrays(file: Path) -> list[str]:
    """Names of the arrays in an .npz file."""
    try:
        with zipfile.ZipFile(file) as archive:
            return [entry[: -len(".npy")] for entry in archive.namelist() if entry.endswith(".npy")]
    except _DAMAGED_ZIP as error:
        raise PredictionError(f"{file}: not an .npz file that can be read ({error})") from error


def _read_array(file: Path, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """One array of label maps. Its header is checked before memory is allocated."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as data:
            stored_shape, dtype = _header(data)
        if stored_shape != shape or dtype.kind not in "bui":
            raise ValueError(f"{dtype} {list(stored_shape)} where integers [T, H, W] = {list(shape)} are expected")
        with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as data:
            maps = np.lib.format.read_array(data, allow_pickle=False)
            if data.read(1):
                raise ValueError("more bytes than its header declares")
        if maps.min() < 0 or maps.max() > LARGEST_ID:
            raise ValueError(f"ids {maps.min()}..{maps.max()} where 0..{LARGEST_ID} are expected")
    except _DAMAGED_ZIP as error:
        raise PredictionError(f"{file}: array {key!r} cannot be used: {error}") from error
    return maps.astype(np.uint8 if maps.max() < 256 else np.uint16)


def _header(data: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type that an .npy stream declares."""
    version = np.lib.format.read_magic(data)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the .npy format is for structured arrays, not for label maps")
    shape, _, dtype = read(data)
    return shape, dtype
