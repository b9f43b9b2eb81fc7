"""Segment a video with a trained run: ``python -m interpreter.segment --help``."""

import contextlib
import errno
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from interpreter.commands import cli, run_command
from interpreter.console import progress_bar
from interpreter.data import FrameFolder, Video, open_video
from interpreter.data.datasets.tree import LeftOut
from interpreter.data.images import resize
from interpreter.files import written_whole
from interpreter.interrupts import Interrupted, StopRequest
from interpreter.locks import Lock, waiting_for
from interpreter.methods.interpreter.config import StageName
from interpreter.methods.interpreter.segmenter import Segmentation, Segmenter
from interpreter.metrics import resize_labels
from interpreter.render import DISPLAY_PALETTE, RleWriter, VideoWriter, mask_grid, overlay, write_palette_png

LABELS_AT_ONCE = 8  # frames whose label maps exist together
PREVIEW_FRAMES, PREVIEW_WIDTH = 6, 270
MAX_SEGMENTS = 254  # ids 1..254: DAVIS reads 0 as background and 255 as void
FILES = ("overlay.mp4", "segments.json", "slots.safetensors", "preview.png")


@dataclass(frozen=True)
class SegmentOptions:
    """Segment one video, at its own resolution and frame rate.

    Writes below OUT: Annotations/NAME/00000.png … (the pixel's value is its segment, counted from 1), overlay.mp4,
    segments.json (YouTube-VIS RLE), slots.safetensors and preview.png. What an earlier call wrote there is replaced.
    """

    clip: tyro.conf.Positional[Path]
    """Video file, or folder of frames: numbered images (00000.jpg, 00001.jpg …), with no video file among them."""
    run: Path
    """Run directory, as interpreter.train leaves it."""
    out: Path
    """Directory to write to."""
    stage: StageName = "video"
    """video: segments keep their identity. image: each frame by itself; a run without a video stage can do that."""
    frame_size: tuple[int, int] | None = None
    """Height and width that frames are resized to before the backbone. Default: as in training."""
    merge_threshold: float | None = None
    """Cosine distance below which video slots are merged: higher gives fewer segments. Default: as in training."""
    alpha: float = 0.5
    """Opacity of the overlay's tint, 0 to 1; 0 leaves the contours alone."""
    seed: int = 0
    """Seed of the slot prior."""


@dataclass
class SegmentedVideo:
    """A video and what a run says of it. Label maps are made when asked for, a few frames at a time."""

    video: Video
    segmentation: Segmentation
    shares: np.ndarray | None = None  # [segments] share of the video's pixels, sums to 1; known once it is written

    def labels(self, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
        """Yield the segment of each pixel, uint8 [H, W] in 0..segments-1, frame by frame.

        Args:
            size: (H, W) in pixels, by default the video's own.
        """
        return (labels for labels, _ in self.labels_and_areas(size or (self.video.height, self.video.width)))

    def labels_and_areas(self, size: tuple[int, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield :meth:`labels` and how many of the pixels are of each segment, int32 [segments]."""
        for start in range(0, len(self.segmentation), LABELS_AT_ONCE):
            labels, areas = self.segmentation.labels_and_areas(slice(start, start + LABELS_AT_ONCE), size)
            yield from zip(labels, areas, strict=True)

    def write(self, out: str | Path, alpha: float = 0.5) -> None:
        """Write label maps, overlay, RLE, slots and preview (docs/segment.md); decodes the video once more.

        Either everything is written or nothing: an error or Ctrl-C leaves what was there before. Where several
        processes write to one directory, each waits while another moves its files to their places.

        Args:
            out: directory to write to; files of an earlier call are replaced.
            alpha: opacity of the overlay's tint, 0..1.

        Raises:
            ValueError: if ``out`` would overwrite the video or other people's annotations, ``alpha`` is out of range,
                there are more than 254 segments, or the video changed since it was segmented.
            OSError: if ``out`` cannot be written, such as on a full disk.
        """
        out = Path(out)
        _check_output(out, self.video, alpha)
        if self.segmentation.num_segments > MAX_SEGMENTS:
            raise ValueError(f"{self.segmentation.num_segments} segments, but a palette PNG holds {MAX_SEGMENTS}")
        with _all_or_nothing(out, self.video.name) as folder, progress_bar("frames") as progress:
            bar = progress.add_task("write", total=len(self.segmentation), status=self.video.name)
            _write_slots(folder / "slots.safetensors", self)
            self.shares = _write_pictures(folder, self, alpha, lambda: progress.advance(bar))


def segment_video(
    path: str | Path,
    run: str | Path,
    out: str | Path | None = None,
    stage: StageName = "video",
    frame_size: tuple[int, int] | None = None,
    merge_threshold: float | None = None,
    alpha: float = 0.5,
    seed: int = 0,
) -> SegmentedVideo:
    """Segment a video file or folder of frames with a trained run.

    Args:
        path: the video.
        run: run directory, as ``interpreter.train`` leaves it.
        out: directory for all that :meth:`SegmentedVideo.write` writes; None writes nothing.
        stage: "video", or "image" to segment each frame by itself.
        frame_size: (H, W) that frames are resized to before the backbone; by default as in training.
        merge_threshold: cosine distance below which video slots are merged; by default as in training.
        alpha: opacity of the overlay's tint, 0..1.
        seed: of the slot prior.

    Raises:
        ValueError: if the video is damaged, the run's files do not belong together, or for one of the reasons of
            :meth:`SegmentedVideo.write`.
        OSError: if video or run do not exist, the run lacks the stage, or ``out`` cannot be written.
    """
    video = open_video(path)
    segmenter = Segmenter.from_run(Path(run), stage, frame_size, seed, merge_threshold=merge_threshold)
    if out is not None:
        _check_output(Path(out), video, alpha)
    with progress_bar("frames") as progress:
        # Counting decodes a file once. That is cheap beside encoding, and finds damage at the end before it, not after.
        bar = progress.add_task("encode", total=video.num_frames, status=video.name)
        found = SegmentedVideo(video, segmenter.segment(video, lambda frames: progress.advance(bar, frames)))
    if out is not None:
        found.write(out, alpha)
    return found


def _check_output(out: Path, video: Video, alpha: float) -> None:
    """Refuse before the long work what would fail, or do harm, after it."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha {alpha}: the opacity must be between 0 and 1")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a directory")
    source, annotations = video.path.resolve(), (out / "Annotations" / video.name).resolve()
    written = {out.resolve(), *((out / name).resolve() for name in FILES)}
    if source in written or source.is_relative_to(annotations):
        raise ValueError(f"--out {out} would overwrite {video.path}; give another directory")
    with waiting_for(out / ".lock", str(out)):
        if annotations.exists() and not (out / "slots.safetensors").exists():
            raise ValueError(f"{annotations} already exists and is not from this command; give another --out")
        with tempfile.TemporaryDirectory(prefix=".segment-", dir=out):
            pass


@contextlib.contextmanager
def _private_folder(out: Path) -> Iterator[Path]:
    """Yield a folder inside ``out`` for this process alone. Those of processes that were killed are removed."""
    with waiting_for(out / ".lock", str(out)):
        for other in out.glob(".segment-*"):
            lock = Lock(other / ".lock")
            with contextlib.suppress(PermissionError):  # another user's
                if lock.take():
                    if lock.exclusive:
                        shutil.rmtree(other)
                    lock.release()
        folder = Path(tempfile.mkdtemp(prefix=".segment-", dir=out))
        alive = Lock(folder / ".lock")
        alive.take()
    try:
        yield folder
    finally:
        with waiting_for(out / ".lock", str(out)):
            alive.release()
            shutil.rmtree(folder)


@contextlib.contextmanager
def _all_or_nothing(out: Path, name: str) -> Iterator[Path]:
    """Yield a folder inside ``out`` whose files move to their places when the block ends well, and vanish when not."""
    with _private_folder(out) as folder:
        try:
            yield folder
        except OSError as error:
            if error.errno == errno.ENOSPC:
                text = f"the disk is full: nothing was written to {out}, what was there before is untouched"
                raise OSError(errno.ENOSPC, text) from error
            raise
        annotations = out / "Annotations" / name
        with waiting_for(out / ".lock", str(out)), StopRequest() as stop:
            # First what marks the annotations as ours: a call after a power cut then repairs everything.
            for file in sorted(FILES, key=lambda name: name != "slots.safetensors"):
                (folder / file).replace(out / file)
            annotations.parent.mkdir(parents=True, exist_ok=True)
            if annotations.exists():
                annotations.rename(folder / "previous")
            (folder / "Annotations" / name).rename(annotations)
    if stop.number:
        raise Interrupted(stop.number)


def _write_slots(path: Path, found: SegmentedVideo) -> None:
    """Slots and attention, named like the fields of Segmentation; the metadata is JSON under "video"."""
    video, segmentation = found.video, found.segmentation
    fields = ("image_slots", "image_attention", "video_slots", "video_attention")
    tensors = {name: getattr(segmentation, name) for name in fields}
    about = {
        "grid": segmentation.grid,
        "source": video.path.name,
        "fps": str(video.fps),
        "size": (video.height, video.width),
    }
    with written_whole(path) as temporary:
        # One entry of metadata, because safetensors writes several in random order: same video, same bytes.
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None},
            temporary,
            {"video": json.dumps(about)},
        )


def _write_pictures(folder: Path, found: SegmentedVideo, alpha: float, advance: Callable[[], None]) -> np.ndarray:
    """Write everything that is made of label maps; returns the share [segments] of the pixels in each segment."""
    video, count = found.video, len(found.segmentation)
    pixels = np.zeros(found.segmentation.num_segments, np.int64)
    chosen = set(np.linspace(0, count - 1, min(PREVIEW_FRAMES, count)).round().astype(int).tolist())
    shape = video.height / (video.width * video.pixel_aspect)  # as it is shown, while label maps are of stored pixels
    size = (max(1, round(PREVIEW_WIDTH * shape)), PREVIEW_WIDTH)
    shown = []
    with (
        VideoWriter(folder / "overlay.mp4", video.fps, (video.height, video.width), video.pixel_aspect) as painted,
        RleWriter(folder / "segments.json") as codes,
    ):
        segments = found.labels_and_areas((video.height, video.width))
        for number, (frame, (labels, areas)) in enumerate(zip(_frames(found), segments, strict=True)):
            write_palette_png(labels + 1, folder / "Annotations" / video.name / f"{number:05d}.png")
            painted.write(overlay(frame, labels, alpha))
            codes.write(video.name, labels)
            pixels += areas
            if number in chosen:
                shown.append((resize(frame, size), resize_labels(labels[None], size)[0]))
            advance()
    frames, maps = (np.stack(images) for images in zip(*shown, strict=True))
    Image.fromarray(mask_grid(frames, maps, width=PREVIEW_WIDTH * len(frames))).save(folder / "preview.png")
    return pixels / pixels.sum()


def _frames(found: SegmentedVideo) -> Iterator[np.ndarray]:
    """The video's frames, and an error if there are no longer as many as were segmented."""
    count = 0
    for count, frame in enumerate(found.video.frames(), start=1):
        if count > len(found.segmentation):
            break
        yield frame
    if count != len(found.segmentation):
        raise ValueError(f"{found.video.path} changed while it was segmented; leave it alone until it is done")


def _print_report(found: SegmentedVideo, out: Path, stage: StageName) -> None:
    assert found.shares is not None
    video = found.video
    table = Table()
    table.add_column("segment", justify="right")
    table.add_column("colour")
    table.add_column("area", justify="right")
    for index, share in enumerate(found.shares):
        colour = "#" + bytes(DISPLAY_PALETTE[index]).hex()
        table.add_row(str(index + 1), f"[{colour}]████[/]", f"{share:.1%}")
    console = Console(soft_wrap=True, highlight=False)
    frames = f"{len(found.segmentation)} frames of {video.height}x{video.width} (height x width)"
    console.print(f"{video.name}: {frames}, {len(found.shares)} segments", markup=False)
    left_out = LeftOut()
    for image in video.others if isinstance(video, FrameFolder) else ():
        left_out.add(image, " not numbered like the frames")
    if left_out.groups:
        console.print(str(left_out), markup=False)
    console.print(table)
    if stage == "image":
        console.print("image stage: each frame by itself, a number means another object in every frame")
    for name in (f"Annotations/{video.name}", *FILES):
        console.print(str(out / name), markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given = sys.argv[1:] if arguments is None else arguments
    options = cli(SegmentOptions, given, prog="python -m interpreter.segment")
    found = segment_video(
        options.clip,
        options.run,
        options.out,
        options.stage,
        options.frame_size,
        options.merge_threshold,
        options.alpha,
        options.seed,
    )
    _print_report(found, options.out, options.stage)
    return 0


if __name__ == "__main__":
    run_command(main)
