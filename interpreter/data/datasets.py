"""Data sets of videos, with or without masks, that survive damaged files and say which they were."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np

from interpreter.data._progress import cpu_count, progress
from interpreter.data.davis import VOID, check_mask, find_sequences, listing, match_masks, read_mask
from interpreter.data.images import list_images, natural_key
from interpreter.data.video import FrameFolder, Video, VideoError, open_video
from interpreter.data.video_file import VIDEO_SUFFIXES

KINDS = ("folder", "davis", "synthetic")
Annotation: TypeAlias = Sequence[Path | None] | None  # a mask file or None for each frame; None: no masks at all


class VideoDataset:
    """Videos that were checked to decode in full, and the masks that belong to them.

    Attributes:
        videos: list of `Video`, in a fixed order; each ``name`` is unique.
        skipped: (path, reason) of every video that was left out because it is damaged, truncated or missing.

    Args:
        videos: the videos.
        annotations: for each video the mask file of each frame (None where a frame has none), or None if the whole
            video has none. None if the data set has no masks.
        skipped: see above.
        binary: whether every object counts as object 1 (DAVIS 2016).
    """

    def __init__(
        self,
        videos: Sequence[Video],
        annotations: Sequence[Annotation] | None = None,
        skipped: Sequence[tuple[Path, str]] = (),
        binary: bool = False,
    ):
        self.videos = list(videos)
        self.skipped = list(skipped)
        self._annotations: list[Annotation] = (
            list(annotations) if annotations is not None else [None] * len(self.videos)
        )
        self._binary = binary

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, i: int) -> Video:
        return self.videos[i]

    def mask_frames(self, i: int) -> np.ndarray:
        """Numbers of the annotated frames of video ``i``: int64 [n], ascending; empty if it has no masks at all."""
        files = self._annotations[i] or ()
        return np.array([t for t, file in enumerate(files) if file is not None], np.int64)

    def masks(self, i: int) -> np.ndarray | None:
        """Masks of video ``i`` at its native size.

        Returns:
            uint8 [T, H, W]: 0 background, 1.. object ids, 255 void (not to be evaluated); None if the video has no
            masks at all. Frames without annotation (see `mask_frames`) are void everywhere.

        Raises:
            VideoError: if a mask is damaged or its size is not the video's.
        """
        files = self._annotations[i]
        if files is None or all(file is None for file in files):
            return None
        video = self.videos[i]
        masks = np.full((len(files), video.height, video.width), VOID, np.uint8)
        for t, file in enumerate(files):
            if file is not None:
                masks[t] = read_mask(file, (video.height, video.width), self._binary)
        return masks

    def report(self) -> str:
        """One paragraph on what was skipped and why; empty if nothing was."""
        if not self.skipped:
            return ""
        total = len(self.videos) + len(self.skipped)
        reasons = " ".join(f"({number}) {reason}." for number, (_, reason) in enumerate(self.skipped, 1))
        return f"Skipped {len(self.skipped)} of {total} videos: {reasons}"


def open_dataset(
    kind: str, root: str | Path, split: str | None = None, year: int = 2017, resolution: str = "480p"
) -> VideoDataset:
    """Open a data set and check all of its videos, in threads, with a progress bar.

    - ``folder``: a video file, a folder of frames, or a directory that holds any number of both at any depth; no masks.
      Below a ``JPEGImages`` folder (YouTube-VIS, DAVIS) only that folder is searched. Videos are named by their path
      below the root, without suffix.
    - ``davis``: DAVIS 2016 (every annotated pixel is object 1) or 2017 (ids kept, 255 is void; masks from
      ``Annotations_unsupervised`` if the root has it, else from ``Annotations``).
    - ``synthetic``: scenes made by `interpreter.data.generate_scenes`, which writes the DAVIS 2017 layout.

    Args:
        kind: ``folder``, ``davis`` or ``synthetic``.
        root: where the data is.
        split: name of the image set (``train``, ``val`` …); None takes all image sets of the year together. Must be
            None for ``folder``.
        year: 2016 or 2017, for ``davis`` only.
        resolution: folder below ``JPEGImages`` and ``Annotations``: ``480p`` or ``Full-Resolution``.

    Raises:
        FileNotFoundError: if the root or something that its layout requires is missing; says what was found.
        ValueError: if an argument is none of the above.
        VideoError: if no video is left after skipping the damaged ones; names them.
    """
    root = Path(root)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of data set {kind!r}; choose from {', '.join(KINDS)}")
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or directory")
    if kind == "folder":
        if split is not None:
            raise ValueError(f"a folder of videos has no splits, so split={split!r} cannot be chosen; leave it out")
        return _open_folder(root)
    if kind == "synthetic":
        year, resolution = 2017, "480p"
    return _open_davis(root, split, year, resolution)


def _open_folder(root: Path) -> VideoDataset:
    single = root.is_file() or bool(list_images(root))
    top = root / "JPEGImages" if (root / "JPEGImages").is_dir() else root
    paths = [root] if single else _find_videos(top)
    if not paths:
        raise FileNotFoundError(f"{root}: no video files and no folders of frames below it; it holds {listing(root)}")
    names: list[str | None] = [None] if single else [*_unique_names(paths, top)]

    def load(i: int) -> tuple[Video, None]:
        video = open_video(paths[i], names[i])
        video.check()
        return video, None

    return _load_all(paths, load, binary=False)


def _find_videos(folder: Path) -> list[Path]:
    """Video files and folders with images at any depth, in natural order; hidden ones are left out."""
    found: list[Path] = []
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found.extend([path] if list_images(path) else _find_videos(path))
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            found.append(path)
    return sorted(found, key=natural_key)


def _unique_names(paths: Sequence[Path], top: Path) -> list[str]:
    """Paths below ``top`` without suffix, or with it where clip.mp4 stands beside clip.avi."""
    full = [path.relative_to(top) for path in paths]
    short = [p.with_suffix("") if path.is_file() else p for p, path in zip(full, paths, strict=True)]
    counts = Counter(short)
    return [(s if counts[s] == 1 else f).as_posix() for s, f in zip(short, full, strict=True)]


def _open_davis(root: Path, split: str | None, year: int, resolution: str) -> VideoDataset:
    sequences = find_sequences(root, split, year, resolution)

    def load(i: int) -> tuple[Video, Annotation]:
        sequence = sequences[i]
        video = FrameFolder(sequence.frames, sequence.name)
        video.check()
        if sequence.masks is None:
            return video, None
        masks = match_masks(video.files, sequence.masks)
        for mask in masks:
            if mask is not None:
                check_mask(mask, (video.height, video.width))
        return video, masks

    return _load_all([s.frames for s in sequences], load, binary=year == 2016)


def _load_all(paths: Sequence[Path], load: Callable[[int], tuple[Video, Annotation]], binary: bool) -> VideoDataset:
    """Open and check all videos. Threads suffice, because FFmpeg and file reads run outside the interpreter lock."""

    def attempt(i: int) -> tuple[Video, Annotation] | str:
        try:
            return load(i)
        except (VideoError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(cpu_count()) as pool:
        results = list(progress(pool.map(attempt, range(len(paths))), len(paths), "checking videos"))
    good = [result for result in results if not isinstance(result, str)]
    skipped = [(path, result) for path, result in zip(paths, results, strict=True) if isinstance(result, str)]
    dataset = VideoDataset([video for video, _ in good], [masks for _, masks in good], skipped, binary)
    if not good:
        raise VideoError(f"no video is left. {dataset.report()}")
    return dataset
