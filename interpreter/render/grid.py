"""Pictures of masks next to their frames."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from interpreter.render.overlay import overlay, segment_image

GAP = 6
INK, PAPER = (40, 40, 40), (255, 255, 255)
ALPHA = 0.55


def mask_grid(
    frames: np.ndarray,
    labels: np.ndarray | Mapping[str, np.ndarray],
    *,
    truth: np.ndarray | None = None,
    void: int = 255,
    background: int | None = None,
    width: int = 1600,
) -> np.ndarray:
    """Draw a grid: a column for each frame; rows for the input, each segmentation painted over it, and the truth.

    Args:
        frames: uint8 [n, H, W, 3], RGB.
        labels: integer [n, H, W] ids in 0..255, or several of these arrays, by the title of their row.
        truth: integer [n, H, W] true object ids, 0 = background (shown black), ``void`` in light grey.
        void: id in ``truth`` of pixels that were not annotated.
        background: id in ``labels`` of pixels that are not painted.
        width: width of the picture in pixels. Frames are scaled to fill it.

    Returns:
        uint8 [height, width, 3], for ``PIL.Image.fromarray(...).save(...)``.

    Raises:
        ValueError: if labels or truth do not have the number and size of the frames.
    """
    rows = {"input": frames}
    for title, maps in (labels if isinstance(labels, Mapping) else {"segments": labels}).items():
        _check(title, maps, frames)
        painted = [overlay(frame, m, ALPHA, background=background) for frame, m in zip(frames, maps, strict=True)]
        rows[title] = np.stack(painted)
    if truth is not None:
        _check("truth", truth, frames)
        rows["ground truth"] = np.stack([segment_image(m, background=0, void=void) for m in truth])

    count, height, original = frames.shape[:3]
    text = max(12, width // 64)
    margin = round(1.8 * text)
    cell = (width - margin - GAP * count) // count
    cell_height = max(1, round(cell * height / original))
    longest = max(ImageFont.load_default(size=text).getlength(title) for title in rows)
    font = ImageFont.load_default(size=max(8, text * min(1, 0.96 * cell_height / longest)))
    image = Image.new("RGB", (width, GAP + len(rows) * (cell_height + GAP)), PAPER)
    for row, (title, pictures) in enumerate(rows.items()):
        top = GAP + row * (cell_height + GAP)
        image.paste(_upright_title(title, font, (margin, cell_height)), (0, top))
        for column, picture in enumerate(pictures):
            scaled = Image.fromarray(picture).resize((cell, cell_height), Image.Resampling.LANCZOS)
            image.paste(scaled, (margin + column * (cell + GAP), top))
    return np.asarray(image)


def _upright_title(
    title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, size: tuple[int, int]
) -> Image.Image:
    """The title of a row, rotated to read upwards and centred in ``size`` (width, height)."""
    strip = Image.new("RGB", (size[1], size[0]), PAPER)
    ImageDraw.Draw(strip).text((size[1] / 2, size[0] / 2), title, font=font, fill=INK, anchor="mm")
    return strip.transpose(Image.Transpose.ROTATE_90)


def _check(title: str, maps: np.ndarray, frames: np.ndarray) -> None:
    if maps.shape != frames.shape[:3]:
        raise ValueError(f"{title} {maps.shape} must be [n, H, W] like the frames {frames.shape}")
