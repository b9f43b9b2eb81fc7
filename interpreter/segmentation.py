"""Segmentation of a video: soft masks at patch resolution, label maps of any size, and the files made from them."""

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from slotkernels import guided_labels, propagate_attention, propagate_labels
from torch import Tensor

from interpreter.console import progress_bar
from interpreter.data import Video
from interpreter.data.datasets.ytvis import published_number
from interpreter.data.video.frames import HeldFrames, SpooledFrames
from interpreter.data.video.squares import uncut
from interpreter.files import write_text, written_whole
from interpreter.output_checks import check_place
from interpreter.output_folder import written_together
from interpreter.render import overlay, write_palette_png
from interpreter.render.preview import PREVIEW_FRAMES, Shown, show, write_preview

Edges = Literal["guided", "none"]
"""Edges of label maps: ``guided`` by the frames (a guided filter of the soft masks), or ``none`` (soft masks that are
upsampled bilinearly)."""

LABELS_AT_ONCE = 8  # number of frames whose label maps are computed together
MAX_SEGMENTS = 254  # ids 1..254: DAVIS reads 0 as background and 255 as void
FILES = ("slots.safetensors", "overlay.mp4", "segments.json", "videos.json", "preview.png")
HIERARCHY = "hierarchy.json"  # only of methods with several levels


class LabelMap(NamedTuple):
    """Segments of a frame."""

    labels: np.ndarray  # [H, W] uint8, the segment of each pixel
    areas: np.ndarray  # [S] int32, the number of pixels of each segment


@dataclass
class Segmentation:
    """Segments of a video of T frames.

    The soft mask of a patch is its row of ``attention``. If slots of a frame are combined into segments, it is its row
    of ``attention @ across``. The product is computed for a few frames at a time, so the masks [T, M, S] of all frames
    are never in memory together.

    >>> attention = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]])  # one frame of two patches, side by side, and two slots
    >>> Segmentation((1, 2), attention).labels(size=(2, 4)).tolist()
    [[[0, 0, 1, 1], [0, 0, 1, 1]]]

    Attributes:
        grid: patch grid (h, w), M = h w.
        attention: [T, M, N] fp16, patches over the slots of their frame; each row over N sums to 1. A large one may be
            on another device than ``across``, or in a file (:mod:`interpreter.large`).
        across: [T, N, S], slots over segments, each row over S sums to 1; None if each slot is a segment.
        tensors: what ``segment`` writes to slots.safetensors, by name.
        tied_over_time: whether a segment is the same object in all frames.
        hierarchy: contents of hierarchy.json, for methods with several levels: which segment of a level is part of
            which segment of the next level.
        outlines: a finer segmentation, whose segments the overlay outlines.
    """

    grid: tuple[int, int]
    attention: Tensor
    across: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    tied_over_time: bool = True
    hierarchy: list[dict[str, Any]] | None = None
    outlines: "Segmentation | None" = None

    def __len__(self) -> int:
        return len(self.attention)

    @property
    def num_segments(self) -> int:
        """Number of segments S."""
        return (self.attention if self.across is None else self.across).shape[-1]

    @property
    def device(self) -> torch.device:
        """Device on which masks and label maps are computed."""
        return (self.attention if self.across is None else self.across).device

    def part(self, frames: slice) -> "Segmentation":
        """The segmentation of some of the frames, without ``tensors`` and other data of the whole video."""
        across = None if self.across is None else self.across[frames]
        return Segmentation(self.grid, self.attention[frames], across, tied_over_time=self.tied_over_time)

    def masks(self, frames: slice = slice(None)) -> Tensor:
        """Soft masks at patch resolution, [t, M, S] fp32; each row sums to 1."""
        if self.across is None:
            return self.attention[frames].float()
        attention = self.attention[frames].to(self.across.device, torch.float32)
        return propagate_attention(attention[None], self.across[frames][None])[0]

    def labels(self, frames: slice = slice(None), size: tuple[int, int] | None = None) -> np.ndarray:
        """Segment of each pixel, uint8 [t, H, W]; ``size`` (H, W), by default the patch grid."""
        if self.across is None or self.attention.device == self.across.device:
            return propagate_labels(*self._factors(frames), self.grid, size)[0].cpu().numpy()
        chosen = range(len(self))[frames]  # the attention may be too large for the device, so move only these frames
        pieces = (chosen[start : start + LABELS_AT_ONCE] for start in range(0, max(len(chosen), 1), LABELS_AT_ONCE))
        factors = (self._factors(slice(piece.start, piece.stop, piece.step)) for piece in pieces)
        return np.concatenate([propagate_labels(*pair, self.grid, size)[0].cpu().numpy() for pair in factors])

    def label_maps(
        self, size: tuple[int, int] | None = None, guide: Iterable[np.ndarray] | None = None
    ) -> Iterator[LabelMap]:
        """Yield the label map of each frame; a few frames are in memory at a time.

        >>> frame = np.zeros((8, 32, 3), np.uint8)
        >>> frame[:, 12:] = 255  # the object begins at column 12, the second of two patches at column 16
        >>> segmentation = Segmentation((1, 2), torch.eye(2)[None])
        >>> for guide in (None, [frame]):
        ...     print(next(segmentation.label_maps((8, 32), guide)).labels[0].tolist().index(1))
        16
        12

        Args:
            size: (H, W) of the maps, by default the patch grid.
            guide: the frames in this size, uint8 [H, W, 3] RGB each, such as ``video.frames(size)``: a guided filter
                moves the edges of the segments to those of the frame (:func:`slotkernels.guided_labels`). Without a
                guide, soft masks are upsampled bilinearly.

        Raises:
            ValueError: if a frame of the guide has a wrong size or type, or the guide does not have T frames.
        """
        size, frames = size or self.grid, None if guide is None else iter(guide)
        for start in range(0, len(self), LABELS_AT_ONCE):
            part = slice(start, min(start + LABELS_AT_ONCE, len(self)))
            factors = self._factors(part)
            if frames is None:
                maps = propagate_labels(*factors, self.grid, size, statistics=True)
            else:
                pixels = self._guide(list(islice(frames, part.stop - start)), part, size)
                maps = guided_labels(*factors, self.grid, pixels, statistics=True)
            assert maps.areas is not None
            areas = maps.areas[0].cpu().numpy()
            yield from map(LabelMap._make, zip(maps.labels[0].cpu().numpy(), areas, strict=True))
        if frames is not None and next(frames, None) is not None:
            raise ValueError(f"the guide has more frames than the {len(self)} that were segmented")

    def _guide(self, frames: Sequence[np.ndarray], part: slice, size: tuple[int, int]) -> Tensor:
        """Frames ``part`` of a guide as a batch of one video, uint8 [1, t, H, W, 3]."""
        for number, frame in enumerate(frames, start=part.start):
            if frame.shape != (*size, 3) or frame.dtype != np.uint8:
                raise ValueError(
                    f"frame {number} of the guide is {frame.dtype} {list(frame.shape)}, but label maps of size "
                    f"{size[0]}x{size[1]} need uint8 {[*size, 3]}; decode the frames with video.frames(size)"
                )
        if len(frames) < part.stop - part.start:
            raise ValueError(f"the guide has {part.start + len(frames)} frames, but {len(self)} were segmented")
        return torch.from_numpy(np.stack(frames)).to(self.device)[None]

    def _factors(self, frames: slice) -> tuple[Tensor, Tensor]:
        """Both factors of the masks, as a batch of one video. If each slot is a segment, the second is the identity."""
        attention, across = self.attention[frames].to(self.device), self.across
        if across is None:
            across = torch.eye(self.num_segments, device=attention.device).expand(len(self), -1, -1)
        return attention[None], across[frames][None]


@dataclass(frozen=True)
class SegmentedVideo:
    """A video and its segmentation; label maps are computed on demand, a few frames at a time.

    Attributes:
        video: the video.
        segmentation: soft masks of its segments.
        edges: "guided": label maps follow the edges of the frames, which are decoded again for that purpose.
            "none": soft masks are upsampled bilinearly, without the frames.
    """

    video: Video
    segmentation: Segmentation
    edges: Edges = "guided"

    def label_maps(self, size: tuple[int, int] | None = None) -> Iterator[LabelMap]:
        """Yield the label map of each frame at ``size`` (H, W), by default the video's own."""
        guide = _frames(self, size) if self.edges == "guided" else None
        return self.segmentation.label_maps(size or (self.video.height, self.video.width), guide)

    def labels(self, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
        """Yield the segment of each pixel, uint8 [H, W] in 0..segments-1, frame by frame.

        Args:
            size: (H, W) in pixels, by default the video's own.
        """
        return (labels for labels, _ in self.label_maps(size))

    def frames_with_maps(self) -> Iterator[tuple[np.ndarray, LabelMap]]:
        """Yield each frame with its label map, both at the video's own size; decodes the video once, for both."""
        if self.edges != "guided":
            yield from zip(_frames(self), self.label_maps(), strict=True)
            return
        waiting: deque[np.ndarray] = deque()  # for their label maps; itertools.tee would keep up to 57 more frames

        def guide() -> Iterator[np.ndarray]:
            for frame in _frames(self):
                waiting.append(frame)
                yield frame

        for maps in self.segmentation.label_maps((self.video.height, self.video.width), guide()):
            yield waiting.popleft(), maps

    def detections(self) -> Iterator[Any]:
        """Yield the segments of each frame as ``supervision.Detections``.

        For example ``sv.MaskAnnotator(color_lookup=sv.ColorLookup.TRACK).annotate(frame, detections)`` paints them.
        ``mask`` is [n, H, W] of the n segments in the frame, ``xyxy`` their boxes (right - left is the width),
        ``tracker_id`` the number of each segment, counted from 1 as in all files.
        Segments have no class and no score: ``class_id`` is 0, ``confidence`` None.

        Raises:
            ValueError: if the package ``supervision`` is not installed.
        """
        from interpreter.render.detections import detections

        return detections(self.labels())

    def write(
        self, out: str | Path, alpha: float = 0.5, video_id: int | None = None, formats: Sequence[str] = ()
    ) -> np.ndarray:
        """Write label maps, overlay, RLE, slots and preview (docs/use/segment.md). Decodes the video again.

        If an error or Ctrl-C happens before all files are complete, ``out`` stays unchanged. Several processes can
        write to one directory.

        Args:
            out: directory to write to; files of an earlier call are replaced.
            alpha: opacity of the overlay's tint, 0..1.
            video_id: number of the video in segments.json. Default: the one that YouTube-VIS gives it
                (:func:`interpreter.data.datasets.ytvis.published_number`), else 1.
            formats: data sets to write as well, each into the folder of its name: "coco", "youtube-vis",
                "label-studio" (:mod:`interpreter.render.formats`).

        Returns:
            [segments] share of the video's pixels in each segment; they sum to 1.

        Raises:
            ValueError: if ``out`` would overwrite the video or files of another program, ``alpha`` is out of range, a
                format does not exist, its package is not installed, there are more than 254 segments, or the video
                changed after it was segmented.
            OSError: if ``out`` cannot be written, for example because the disk is full.
        """
        out, segmentation = Path(out), self.segmentation
        check_output(out, self.video, alpha, formats)
        check_count(segmentation.num_segments)
        # slots.safetensors is moved first, because check_output recognises annotations of an earlier call by it.
        hierarchy = segmentation.hierarchy
        names = (*FILES, f"Annotations/{self.video.name}", *([HIERARCHY] if hierarchy else []), *dict.fromkeys(formats))
        absent = () if hierarchy else (HIERARCHY,)
        with written_together(out, names, absent) as folder, progress_bar("frames") as progress:
            bar = progress.add_task("write", total=len(segmentation), status=self.video.name)
            _write_slots(folder / "slots.safetensors", self)
            if hierarchy:
                write_text(folder / HIERARCHY, json.dumps({"format": 1, "levels": hierarchy}) + "\n")
            if video_id is None:
                number = published_number(uncut(self.video).path)
                video_id = 1 if number is None else number
            return _write_pictures(folder, self, alpha, video_id, formats, lambda: progress.advance(bar))


def check_output(out: Path, video: Video, alpha: float, formats: Sequence[str] = ()) -> None:
    """Check, before the video is segmented, what :meth:`SegmentedVideo.write` would refuse. Creates nothing.

    Raises:
        ValueError: says which option to change.
    """
    check_place(out, alpha, video.name, formats)
    if isinstance(uncut(video), HeldFrames | SpooledFrames):
        return  # their path is only a name, and may equal that of the output folder
    source, annotations = video.path.resolve(), (out / "Annotations" / video.name).resolve()
    written = {out.resolve(), *((out / name).resolve() for name in (*FILES, HIERARCHY))}
    if source in written or source.is_relative_to(annotations):
        raise ValueError(f"--out {out} would overwrite {video.path}; give another directory")


def check_count(segments: int) -> None:
    """Raise ValueError for more segments than :meth:`SegmentedVideo.write` can write."""
    if segments > MAX_SEGMENTS:
        raise ValueError(f"{segments} segments, but a palette PNG can have at most {MAX_SEGMENTS}; ask for fewer")


def _write_slots(path: Path, segmented: SegmentedVideo) -> None:
    """Write the segmentation's tensors, and facts about the video as JSON in the metadata entry "video"."""
    video, segmentation = segmented.video, segmented.segmentation
    about = {
        "grid": segmentation.grid,
        "source": video.path.name,
        "fps": str(video.fps),
        "size": (video.height, video.width),
        "edges": segmented.edges,
    }
    with written_whole(path) as temporary:
        # One metadata entry, because safetensors writes several in random order: equal videos should give equal bytes.
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in segmentation.tensors.items()},
            temporary,
            {"video": json.dumps(about)},
        )


def _write_pictures(
    folder: Path,
    segmented: SegmentedVideo,
    alpha: float,
    video_id: int,
    formats: Sequence[str],
    advance: Callable[[], None],
) -> np.ndarray:
    """Write every file that shows label maps; returns the share [segments] of the pixels in each segment."""
    # Imported here because they load PyAV and pycocotools, which training on stored features does not need.
    from interpreter.render.formats import About, format_writers
    from interpreter.render.rle import ListedVideo, RleWriter, write_videos
    from interpreter.render.video import VideoWriter

    video, count = segmented.video, len(segmented.segmentation)
    pixels = np.zeros(segmented.segmentation.num_segments, np.int64)
    chosen = set(np.linspace(0, count - 1, min(PREVIEW_FRAMES, count)).round().astype(int).tolist())
    shown: list[Shown] = []
    about = About(video_id, video.name, video.height, video.width, float(video.fps))
    with (
        VideoWriter(folder / "overlay.mp4", video.fps, (video.height, video.width), video.pixel_aspect) as painted,
        RleWriter(folder / "segments.json") as codes,
        format_writers(formats, folder, about) as writers,
    ):
        for number, ((frame, (labels, areas)), finer) in enumerate(
            zip(segmented.frames_with_maps(), _outlines(segmented), strict=True)
        ):
            write_palette_png(labels + 1, folder / "Annotations" / video.name / f"{number:05d}.png")
            painted.write(overlay(frame, labels, alpha, outlines=finer))
            codes.write(video_id, labels)
            for writer in writers:
                writer.write(frame, labels)
            pixels += areas
            if number in chosen:
                shown.append(show(frame, labels, video.pixel_aspect))
            advance()
    write_videos(folder / "videos.json", [ListedVideo(video_id, video.name, video.height, video.width, count)])
    write_preview(folder / "preview.png", shown)
    return pixels / pixels.sum()


def _outlines(segmented: SegmentedVideo) -> Iterator[np.ndarray | None]:
    """The finer segments of each frame that the overlay outlines, or None; decodes the video for their edges."""
    finer = segmented.segmentation.outlines
    if finer is None:
        return itertools.repeat(None, len(segmented.segmentation))
    return replace(segmented, segmentation=finer).labels()


def _frames(segmented: SegmentedVideo, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
    """The video's frames, at their own size or resized to ``size`` (H, W).

    Raises:
        ValueError: if there are no longer as many as were segmented.
    """
    count = 0
    for count, frame in enumerate(segmented.video.frames(size), start=1):
        if count > len(segmented.segmentation):
            break
        yield frame
    if count != len(segmented.segmentation):
        raise changed_video(segmented.video)


def changed_video(video: Video) -> ValueError:
    """The error of a video whose number of frames changed."""
    return ValueError(f"{video.path} changed while it was segmented; do not change it until the command has finished")
