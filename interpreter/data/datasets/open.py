"""Opens a data set: damaged videos are skipped and named; all others were decoded as a check."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from interpreter.console import tracked
from interpreter.data.datasets.annotations import VOID, Annotation, CroppedMasks, UnusableMasks
from interpreter.data.datasets.davis import find_davis
from interpreter.data.datasets.fbms import find_fbms
from interpreter.data.datasets.folder import find_folder
from interpreter.data.datasets.segtrack import find_segtrack
from interpreter.data.datasets.unopened import UnopenedVideo, UnopenedVideos
from interpreter.data.datasets.ytvis import find_ytvis
from interpreter.data.datasets.ytvos import find_ytvos
from interpreter.data.options import DatasetKind, DavisAnnotations
from interpreter.data.threads import cpu_count, reading_threads
from interpreter.data.video import CentralSquare, CroppedVideo, Video, VideoError, find_borders


class VideoDataset:
    """Videos that can be decoded in full, and their masks.

    Attributes:
        videos: list of `Video`, in a fixed order; each ``name`` is unique.
        skipped: (path, reason) of every video that is damaged, truncated or missing.
        left_out: one line about files that belong to no video, and about masks of a plain folder that cannot be used
            (reading them raises an error); empty if everything is read.

    Args:
        videos: the videos.
        annotations: the masks of each video, or None for a video without masks. None if the data set has no masks.
        skipped, left_out: see above.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        annotations: Sequence[Annotation | None] | None = None,
        skipped: Sequence[tuple[Path, str]] = (),
        left_out: str = "",
    ):
        self.videos = list(videos)
        self.skipped = list(skipped)
        self.left_out = left_out
        self._annotations = list(annotations) if annotations is not None else [None] * len(self.videos)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, i: int) -> Video:
        return self.videos[i]

    def mask_frames(self, i: int) -> np.ndarray:
        """Numbers of the annotated frames of video ``i``: int64 [n], ascending; empty if it has no masks."""
        annotation = self._annotations[i]
        return np.array(annotation.frames if annotation else [], np.int64)

    def masks(self, i: int) -> np.ndarray | None:
        """Masks of video ``i`` at its native size.

        Returns:
            uint8 [T, H, W]: 0 background, 1.. object ids, 255 void (not scored); None if the video has no masks. Frames
            without annotation (see :meth:`mask_frames`) are void.

        Raises:
            VideoError: if a mask is damaged or its size is not the video's.
        """
        annotation, video = self._annotations[i], self.videos[i]
        if annotation is None or not len(annotation.frames):
            return None
        masks = np.full((video.num_frames, video.height, video.width), VOID, np.uint8)
        for t in annotation.frames:
            masks[t] = annotation.read(t, (video.height, video.width))
        return masks

    def mask(self, i: int, frame: int) -> np.ndarray:
        """Mask of one annotated frame of video ``i``: uint8 [H, W] as in :meth:`masks`.

        Args:
            i: number of the video.
            frame: one of its :meth:`mask_frames`.

        Raises:
            VideoError: if the mask is damaged or its size is not the video's.
        """
        annotation, video = self._annotations[i], self.videos[i]
        if annotation is None:
            raise ValueError(f"{video.path} has no masks")
        return annotation.read(frame, (video.height, video.width))

    def expected_masks(self, i: int) -> str:
        """Where masks of video ``i`` were expected, and which files exist; empty if unknown."""
        annotation = self._annotations[i]
        return annotation.expected if annotation else ""

    def report(self) -> str:
        """The skipped videos and why they were skipped, as one paragraph; empty if there are none."""
        if not self.skipped:
            return ""
        total = len(self.videos) + len(self.skipped)
        reasons = " ".join(f"({number}) {reason}." for number, (_, reason) in enumerate(self.skipped, 1))
        return f"Skipped {len(self.skipped)} of {total} videos: {reasons}"


def open_dataset(
    kind: DatasetKind,
    root: str | Path,
    split: str | None = None,
    *,
    year: int = 2017,
    annotations: DavisAnnotations = "unsupervised",
    crop_borders: bool = False,
    central_square: bool = False,
) -> VideoDataset:
    """Open a data set and check all of its videos, in threads, with a progress bar.

    - ``folder``: a video file, a folder of frames, or a directory that holds any number of both at any depth. If there
      is a folder ``JPEGImages``, only this folder is searched, and masks are read from ``Annotations`` next to it; else
      masks are read from ``masks`` below the root. The name of a video is its path below the root, without suffix. The
      mask of a frame is ``NAME/FRAME.png``, where FRAME is the name of the frame's file, or for video files the frame's
      number in five digits. Masks are optional.
    - ``davis``: DAVIS 2016 (every annotated pixel is object 1) or 2017 (ids kept, 255 is void), at 480p.
    - ``synthetic``: scenes that ``interpreter.data.scenes.generate_scenes`` wrote.
    - ``ytvis``: YouTube-VIS 2019 or 2021 as published, splits ``train`` (without the hold-out), ``holdout`` (entries
      600–899 of train.json), ``last-300`` (its 300 largest ids), ``without-last-300`` (the others), ``all`` (the whole
      train.json), ``valid``, ``test``. Crowd regions are void; where objects overlap, the later one in the file is in
      front.
    - ``ytvos``: YouTube-VOS 2018 or 2019 as published, splits ``train``, ``valid``, ``test`` and the same with
      ``_all_frames``; masks are optional.
    - ``movi``: MOVi-C, D or E after ``python -m interpreter.data convert movi``.
    - ``segtrack``: SegTrack-v2 as published; where objects overlap, the one with the higher number is in front.
    - ``fbms``: FBMS-59 as published, splits ``train`` and ``test``; few frames have masks.

    >>> dataset = open_dataset("folder", clips)
    >>> [(video.name, video.num_frames) for video in dataset]
    [('ball', 3), ('walk', 5)]

    Args:
        kind: one of the above.
        root: where the data is.
        split: name of the split, or several joined by ``+``, such as ``train+valid+test``, which are opened in this
            order; a video in two of them counts once. None opens all. Must be None for ``folder`` and ``segtrack``,
            which have no splits.
        year: edition of ``davis``, 2016 or 2017.
        annotations: masks of DAVIS 2017, ``unsupervised`` or ``semi-supervised``.
        crop_borders: crop black borders off frames and masks.
        central_square: keep the central square of frames and masks, after black borders are cropped.

    Raises:
        FileNotFoundError: if the root or a required part of its layout is missing; lists the files that are there.
        ValueError: if an argument has another value than those above.
        VideoError: if every video is damaged; names them.
    """
    found = find_sources(kind, root, split, year=year, annotations=annotations)
    return load_all(found, crop_borders, central_square)


def find_sources(
    kind: DatasetKind,
    root: str | Path,
    split: str | None = None,
    *,
    year: int = 2017,
    annotations: DavisAnnotations = "unsupervised",
) -> UnopenedVideos:
    """Find the videos of a split without opening them. Arguments and errors as for `open_dataset`."""
    root = Path(root)
    if kind not in get_args(DatasetKind):
        raise ValueError(f"unknown kind of data set {kind!r}; choose from {', '.join(get_args(DatasetKind))}")
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or directory")
    if kind == "folder":
        if split is not None:
            raise ValueError(f"a folder of videos has no splits, so split={split!r} cannot be chosen; leave it out")
        return find_folder(root)
    parts = [None] if split is None else split_parts(split)
    found = [_find_split(kind, root, part, year, annotations) for part in parts]
    return UnopenedVideos(_joined(found, f"{root}: split {split}"))


def split_parts(split: str) -> list[str]:
    """The splits in a name such as ``train+valid``.

    Raises:
        ValueError: if one of them has no name.
    """
    parts = split.split("+")
    if not all(parts):
        raise ValueError(f"split {split!r} joins splits, but one of them has no name; write for example train+valid")
    return parts


def _find_split(
    kind: DatasetKind, root: Path, split: str | None, year: int, annotations: DavisAnnotations
) -> Sequence[UnopenedVideo]:
    """The videos of one split; None for all splits."""
    if kind == "davis":
        videos = find_davis(root, split, year, annotations)
    elif kind in ("synthetic", "movi"):
        videos = find_davis(root, split, 2017, "unsupervised")
    else:
        readers = {"ytvis": find_ytvis, "ytvos": find_ytvos, "segtrack": find_segtrack, "fbms": find_fbms}
        videos = readers[kind](root, split)
    if not videos:
        raise FileNotFoundError(f"{root}: the index of {split or 'all splits'} names no video; restore it")
    return videos


def _joined(splits: Sequence[Sequence[UnopenedVideo]], where: str) -> list[UnopenedVideo]:
    """The videos of several splits in their order, without those that were in an earlier one."""
    joined: list[UnopenedVideo] = []
    paths: dict[str, Path] = {}
    for videos in splits:
        new = [one for one in videos if paths.get(one.name) != one.path]
        for one in new:
            if one.name in paths:
                raise ValueError(
                    f"{where} has two videos of the name {one.name}, {paths[one.name]} and {one.path}; rename one, or "
                    "open the splits separately"
                )
        joined += new
        paths |= {one.name: one.path for one in new}
    return joined


def load_all(unopened: UnopenedVideos, crop_borders: bool, central_square: bool) -> VideoDataset:
    """Open and check all videos, in threads: FFmpeg and file reads release Python's global lock."""

    def attempt(one: UnopenedVideo) -> tuple[Video, Annotation | None] | str:
        try:
            video, annotation = one.open()
            video.check()
            if annotation is not None:
                annotation = _checked(annotation, video)
            if crop_borders and (box := find_borders(video)) is not None:
                video, annotation = _cropped(CroppedVideo(video, box), annotation)
            if central_square and video.height != video.width:
                video, annotation = _cropped(CentralSquare(video), annotation)
            return video, annotation
        except (VideoError, OSError) as error:
            return str(error)

    with reading_threads(cpu_count()) as pool:
        results = list(tracked(pool.map(attempt, unopened), len(unopened), "checking"))
    good = [result for result in results if not isinstance(result, str)]
    skipped = [(one.path, result) for one, result in zip(unopened, results, strict=True) if isinstance(result, str)]
    left_out = "; ".join(filter(None, (str(unopened.left_out), _unusable([masks for _, masks in good]))))
    dataset = VideoDataset([video for video, _ in good], [masks for _, masks in good], skipped, left_out)
    if not good:
        raise VideoError(f"no video is left. {dataset.report()}")
    return dataset


def _cropped(video: CroppedVideo, annotation: Annotation | None) -> tuple[Video, Annotation | None]:
    """A cropped video, and its masks, cropped in the same way."""
    if annotation is None or isinstance(annotation, UnusableMasks):
        return video, annotation
    return video, CroppedMasks(annotation, video)


def _checked(annotation: Annotation, video: Video) -> Annotation:
    """The masks, or the reason why they cannot be used if the video can be used without them."""
    try:
        annotation.check((video.height, video.width))
    except VideoError as error:
        if not annotation.optional:
            raise
        return UnusableMasks(str(error))
    return annotation


def _unusable(annotations: Sequence[Annotation | None]) -> str:
    """One line about masks that cannot be used, with the reason for the first; empty if there are none."""
    reasons = [one.reason for one in annotations if isinstance(one, UnusableMasks)]
    if not reasons:
        return ""
    return f"left out: the masks of {len(reasons)} video{'s' * (len(reasons) > 1)} ({reasons[0]})"
