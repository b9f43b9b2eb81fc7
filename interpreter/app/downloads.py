"""Downloads of a tab: palette PNGs, RLE, the segments without their background, an overlay."""

import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import av
import numpy as np

from interpreter.app.corrections import Corrected
from interpreter.data import Video
from interpreter.files import written_whole
from interpreter.render import overlay, write_palette_png
from interpreter.render.rle import RleWriter
from interpreter.render.video import VideoWriter
from interpreter.segmentation import SegmentedVideo

Format = Literal["png", "rle", "cutout", "overlay"]
FORMATS: tuple[str, ...] = get_args(Format)
VIDEO_ID = 1  # the same as `segment` uses for a clip


class Painted(NamedTuple):
    """A frame and its segments."""

    frame: np.ndarray  # [H, W, 3] uint8 RGB
    ids: np.ndarray  # [H, W] uint8, the number of the segment of each pixel; 0 where it is hidden


def painted(video: Video, segments: Corrected) -> Iterator[Painted]:
    """Every frame at the video's own size, with the label map that ``interpreter.segment`` makes of these masks."""
    numbers = np.array([0 if id in segments.hidden else id for id in segments.ids], np.uint8)
    for frame, (labels, _) in SegmentedVideo(video, segments.segmentation).frames_with_maps():
        yield Painted(frame, numbers[labels])


def write_download(
    format: Format, folder: Path, video: Video, segments: Corrected, opacity: float, advance: Callable[[], None]
) -> Path:
    """Write one file.

    Args:
        format: "png": a ZIP with Annotations/NAME/00000.png … as ``interpreter.segment`` writes them, and names.txt if
            there are names. "rle": JSON like segments.json of ``interpreter.segment``; named segments have a "name".
            "cutout": a lossless MP4 with alpha (RGBA, codec PNG), transparent where segments are hidden. "overlay": an
            MP4 (H.264) with tinted segments.
        folder: where to write.
        video: the clip.
        segments: the segments to write; hidden ones are left out.
        opacity: of the overlay's tint, 0 to 1.
        advance: called after each frame.

    Returns:
        The file.
    """
    frames = painted(video, segments)
    if format == "png":
        return _write_pngs(folder / f"{video.name}-masks.zip", frames, video, segments, advance)
    if format == "rle":
        return _write_rle(folder / f"{video.name}-segments.json", frames, segments, advance)
    if format == "cutout":
        return _write_cutout(folder / f"{video.name}-cutout.mp4", frames, video, advance)
    return _write_overlay(folder / f"{video.name}-overlay.mp4", frames, video, opacity, advance)


def _write_pngs(
    path: Path, frames: Iterator[Painted], video: Video, segments: Corrected, advance: Callable[[], None]
) -> Path:
    picture = path.with_name(".frame.png")
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:  # PNGs are already compressed
        for number, (_, ids) in enumerate(frames):
            write_palette_png(ids, picture)
            archive.write(picture, f"Annotations/{video.name}/{number:05d}.png")
            advance()
        if names := _shown_names(segments):
            archive.writestr("names.txt", "".join(f"{id} {text}\n" for id, text in sorted(names.items())))
    picture.unlink()
    return path


def _shown_names(segments: Corrected) -> dict[int, str]:
    return {id: text for id, text in segments.names.items() if id in segments.ids and id not in segments.hidden}


def _write_rle(path: Path, frames: Iterator[Painted], segments: Corrected, advance: Callable[[], None]) -> Path:
    with RleWriter(path, hidden=0, names=_shown_names(segments)) as codes:
        for _, ids in frames:
            codes.write(VIDEO_ID, ids)
            advance()
    return path


def _write_overlay(
    path: Path, frames: Iterator[Painted], video: Video, opacity: float, advance: Callable[[], None]
) -> Path:
    with VideoWriter(path, video.fps, (video.height, video.width), video.pixel_aspect) as writer:
        for frame, ids in frames:
            # Colours are counted from 0. Hidden pixels have the last colour, and no tint.
            writer.write(overlay(frame, ids - np.uint8(1), opacity, background=255))
            advance()
    return path


def _write_cutout(path: Path, frames: Iterator[Painted], video: Video, advance: Callable[[], None]) -> Path:
    """RGBA frames. H.264 has no alpha, so each frame is a lossless PNG. FFmpeg converts the file to other formats."""
    with written_whole(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("png", rate=video.fps)
        stream.height, stream.width, stream.pix_fmt = video.height, video.width, "rgba"
        stream.options = {"compression_level": "3", "pred": "up"}  # much faster than the default
        stream.codec_context.sample_aspect_ratio = video.pixel_aspect
        for number, (frame, ids) in enumerate(frames):
            rgba = np.dstack([frame, np.where(ids > 0, 255, 0).astype(np.uint8)])
            rgba[ids == 0] = 0
            picture = av.VideoFrame.from_ndarray(rgba, format="rgba")
            picture.pts, picture.time_base = number, 1 / Fraction(video.fps)
            container.mux(stream.encode(picture))
            advance()
        container.mux(stream.encode(None))
    return path
