"""Propagates the mask of a video's first frame through the video, and writes the masks of all frames."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from interpreter.configs import BackboneConfig
from interpreter.data import VOID, Video, VideoError
from interpreter.data.datasets.annotations import read_mask
from interpreter.data.images import resize
from interpreter.engine.distributed import device_of_rank
from interpreter.engine.precision import in_precision, resolve_precision
from interpreter.files import write_text, written_whole
from interpreter.hub.names import run_name, title_name
from interpreter.method_options import choose_method
from interpreter.methods.runs import open_segmenter
from interpreter.metrics.label_maps import resize_labels
from interpreter.models.backbones import Backbone, load_backbone
from interpreter.models.label_propagation import LabelPropagation, Propagation, patch_labels
from interpreter.output_folder import written_together
from interpreter.render import mask_grid, overlay, write_palette_png
from interpreter.render.preview import PREVIEW_FRAMES, PREVIEW_WIDTH
from interpreter.segmentation import Edges, Segmentation, changed_video
from interpreter.store.features import encode_batch
from interpreter.versions import own_version

SHORTER_SIDE = 480
"""Default length in pixels of the shorter side of the frames that a backbone reads, as in DAVIS."""
FRAMES_AT_ONCE = 8
RECORD = "propagation.json"
NOT_PAINTED = 255  # DISPLAY_PALETTE's last entry; background in pictures


@dataclass(frozen=True)
class Encoder:
    """A backbone and the size of the frames that it reads.

    Attributes:
        backbone: feature extractor.
        precision: of its matrix products: "fp32", "bf16" or "fp8-backbone".
        frame_size: (H, W) that frames are resized to. None: chosen for each video, see :meth:`size`.
        name: of the features, for tables.
    """

    backbone: Backbone
    precision: str
    frame_size: tuple[int, int] | None
    name: str

    def size(self, video: Video) -> tuple[int, int]:
        """Frame size (H, W) for a video. Default: its own size in whole patches, the shorter side at most 480."""
        if self.frame_size is not None:
            return self.frame_size
        scale = min(1.0, SHORTER_SIDE / min(video.height, video.width)) / self.backbone.patch
        rows, columns = (max(1, round(side * scale)) for side in (video.height, video.width))
        return rows * self.backbone.patch, columns * self.backbone.patch

    def encode(self, frames: Sequence[np.ndarray], size: tuple[int, int]) -> Tensor:
        """Features [n, M, C] fp32 of frames uint8 [H, W, 3] of any size."""
        pixels = torch.from_numpy(np.stack([resize(frame, size) for frame in frames]))
        return encode_batch(self.backbone, pixels.to(self.backbone.device), self.precision)


def open_encoder(
    run: Path | None, backbone: BackboneConfig, frame_size: tuple[int, int] | None, device: torch.device | None = None
) -> Encoder:
    """The backbone of a run, trained or frozen, or one by name.

    Args:
        run: run directory. Its features and, by default, its frame size are used; ``backbone`` is ignored.
        backbone: loaded without a run.
        frame_size: (H, W) that frames are resized to.
        device: where to compute. Default: the GPU if there is one.

    Raises:
        FileNotFoundError: if the run or the backbone does not exist.
        ValueError: if the run or the backbone is damaged, or the frame size is not a multiple of the patch size.
    """
    if run is not None:
        method, stored = choose_method(None, run)
        segmenter = open_segmenter(method, run, None, frame_size, device, stored)
        return Encoder(segmenter.backbone, segmenter.precision, segmenter.frame_size, title_name(run))
    device = device or device_of_rank()
    precision = resolve_precision("auto", device)
    loaded = in_precision(load_backbone(backbone), precision).to(device)
    if frame_size is not None:
        loaded.grid(frame_size)
    return Encoder(loaded, precision, frame_size, Path(backbone.backbone).stem)


class FirstMask(NamedTuple):
    """The mask of a first frame.

    Attributes:
        pixels: uint8 [H, W], ids of objects, 0 is background.
        ids: uint8 [L], the ids that occur, and 0, in ascending order.
    """

    pixels: np.ndarray
    ids: np.ndarray


def first_mask(pixels: np.ndarray, where: str | Path) -> FirstMask:
    """Check that a mask has an object. Void pixels (255) become background.

    >>> first_mask(np.array([[0, 7], [255, 2]], np.uint8), "00000.png").ids.tolist()
    [0, 2, 7]

    Args:
        pixels: uint8 [H, W], 0 background, 1 to 254 objects, 255 void.
        where: file or video, for the message.

    Raises:
        VideoError: if it has no object.
    """
    known = np.where(pixels == VOID, 0, pixels).astype(np.uint8)
    ids = np.unique(known)
    if not ids.any():
        raise VideoError(f"{where}: the mask of the first frame has no object (ids 1 to 254; 255 is void)")
    return FirstMask(known, np.union1d(ids, [0]).astype(np.uint8))


def read_first_mask(path: Path, video: Video) -> FirstMask:
    """Read the mask of a video's first frame from a file. If it has only the values 0 and 255, 255 is the object.

    Raises:
        FileNotFoundError: if there is no such file.
        VideoError: if it is not a map of ids, has a different size than the video, or has no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--mask {path}: no such file; give the PNG with the object ids of the first frame")
    pixels = read_mask(path, (video.height, video.width), owner=video.path)
    if set(np.unique(pixels).tolist()) == {0, VOID}:  # programs for segmentation often save one object like this
        pixels = (pixels > 0).astype(np.uint8)
    return first_mask(pixels, path)


def soft_labels(
    video: Video, mask: FirstMask, encoder: Encoder, how: Propagation
) -> Iterator[tuple[list[np.ndarray], Segmentation]]:
    """Yield a few frames of a video at a time, uint8 [H, W, 3] each, with the soft labels of their patches.

    The video is decoded and encoded once, and memory does not grow with its length. Segment l of the soft labels is the
    object ``mask.ids[l]``.

    Args:
        video: the video.
        mask: of its first frame.
        encoder: computes the features.
        how: parameters of label propagation.

    Raises:
        ValueError: if the video is damaged, or changes while it is read.
    """
    size, stream, count = encoder.size(video), video.frames(), 0
    patches, device = encoder.backbone.grid(size), encoder.backbone.device
    fine = (patches[0] * how.upsample, patches[1] * how.upsample)
    first = patch_labels(torch.from_numpy(mask.pixels).to(device), torch.from_numpy(mask.ids).to(device), fine)
    carried: LabelPropagation | None = None
    while frames := list(islice(stream, FRAMES_AT_ONCE)):
        count += len(frames)
        soft: list[Tensor] = []
        for features in encoder.encode(frames, size):
            if carried is None:
                carried = LabelPropagation(features, first, patches, how)
                soft.append(first)
            else:
                soft.append(carried.step(features))
        yield frames, Segmentation(fine, torch.stack(soft))
    if count != video.num_frames:
        raise changed_video(video)


def propagated(
    video: Video, mask: FirstMask, encoder: Encoder, how: Propagation, edges: Edges = "none"
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each frame of a video, uint8 [H, W, 3], with its ids, uint8 [H, W]; the first has the ids of the mask.

    Args:
        video, mask, encoder, how: see :func:`soft_labels`, also for errors.
        edges: of the masks: "none" upsamples soft labels bilinearly, "guided" moves edges to those of the frames.
    """
    number = 0
    for frames, soft in soft_labels(video, mask, encoder, how):
        maps = soft.label_maps((video.height, video.width), frames if edges == "guided" else None)
        for frame, (labels, _) in zip(frames, maps, strict=True):
            yield frame, mask.ids[labels] if number else mask.pixels
            number += 1


@dataclass
class Preview:
    """Small pictures of a few frames with their masks, collected while a video is read."""

    video: Video
    shown: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        last, video = self.video.num_frames - 1, self.video
        self.chosen = set(np.linspace(0, last, min(PREVIEW_FRAMES, last + 1)).round().astype(int).tolist())
        shape = video.height / (video.width * video.pixel_aspect)  # as players show it
        self.size = (max(1, round(PREVIEW_WIDTH * shape)), PREVIEW_WIDTH)

    def see(self, number: int, frame: np.ndarray, colours: np.ndarray) -> None:
        """Keep the frame if it is one of the frames in the preview."""
        if number in self.chosen:
            self.shown.append((resize(frame, self.size), resize_labels(colours[None], self.size)[0]))

    def save(self, path: Path) -> None:
        """Write them as PNG."""
        frames, maps = (np.stack(images) for images in zip(*self.shown, strict=True))
        picture = mask_grid(frames, {"masks": maps}, background=NOT_PAINTED, width=PREVIEW_WIDTH * len(frames))
        with written_whole(path) as temporary:
            Image.fromarray(picture).save(temporary, format="png")


def files_of(video: Video) -> tuple[str, str, str, str]:
    """The files of a video, relative to the output directory, in the order in which they appear."""
    return RECORD, f"overlays/{video.name}.mp4", f"previews/{video.name}.png", f"Annotations/{video.name}"


def check_output(out: Path, video: Video, alpha: float) -> None:
    """Refuse an output directory in which other files would be overwritten, before anything is computed.

    Raises:
        ValueError: says which option to change.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha {alpha}: the opacity must be between 0 and 1")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a directory")
    places = [(out / name).resolve() for name in files_of(video)]
    source = video.path.resolve()
    if any(source == place or source.is_relative_to(place) for place in places):
        raise ValueError(f"--out {out} would overwrite {video.path}; give another directory")
    if places[-1].exists() and not places[0].exists():
        raise ValueError(f"{out / files_of(video)[-1]} already exists and is not from this command; give another --out")


def write_propagated(
    out: Path,
    video: Video,
    maps: Iterable[tuple[np.ndarray, np.ndarray]],
    record: dict[str, Any],
    alpha: float,
    advance: Callable[[], None],
) -> np.ndarray:
    """Write the masks of a video, an overlay and a preview (docs/use/propagate.md): all files, or none.

    Args:
        out: directory to write to; files of an earlier call for the same video are replaced.
        video: the video.
        maps: frames with their ids, as :func:`propagated` yields them.
        record: options that the masks were computed with.
        alpha: opacity of the overlay's tint, 0..1.
        advance: called after each frame.

    Returns:
        [256] number of frames in which each id has a pixel.
    """
    from interpreter.render.video import VideoWriter  # late: loads PyAV, not needed for folders of frames

    names, preview, seen = files_of(video), Preview(video), np.zeros(256, np.int64)
    with written_together(out, names) as folder:
        size = (video.height, video.width)
        with VideoWriter(folder / names[1], video.fps, size, video.pixel_aspect) as painted:
            for number, (frame, ids) in enumerate(maps):
                write_palette_png(ids, folder / names[3] / f"{number:05d}.png")
                colours = ids - np.uint8(1)  # object 1 has the first colour; background wraps around to the last one
                painted.write(overlay(frame, colours, alpha, background=NOT_PAINTED))
                preview.see(number, frame, colours)
                seen += np.bincount(ids.ravel(), minlength=256) > 0
                advance()
        preview.save(folder / names[2])
        write_text(folder / RECORD, json.dumps(record, indent=1, default=str) + "\n")
    return seen


def record_of(options: Any) -> dict[str, Any]:
    """The record for :func:`write_propagated`: all options, and the version of the package."""
    record = {"version": own_version(), **asdict(options)}
    return record | {"run": None if options.run is None else run_name(options.run)}
