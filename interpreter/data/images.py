"""Reading single images: any mode to RGB, antialiased resizing, a cheap look for truncated files."""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

# The last bytes of a complete file. A cut file lacks them, so looking here spares decoding every frame of a data set.
_TRAILERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


# What Pillow lets through besides OSError, SyntaxError and ValueError when bytes are wrong. The last is an image that
# declares more than 179 million pixels: a few bytes that would fill the memory.
_DAMAGE = (
    *(EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error),
    Image.DecompressionBombError,
)


def natural_key(path: Path | str) -> tuple[tuple[int, int | str], ...]:
    """Sort key under which ``frame2`` comes before ``frame10``."""
    parts = re.split(r"(\d+)", str(path))
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts if part)


def list_images(folder: Path) -> list[Path]:
    """The images directly in ``folder``, in natural order; hidden files are left out."""
    images = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return sorted(images, key=lambda p: natural_key(p.name))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB: EXIF orientation is applied, alpha is dropped, 16 bits are scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow would clip to 255 instead of scaling
        wide = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.rint(wide / 257), 0, 255).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open an image with Pillow; whatever is wrong with it is one of three exceptions.

    Raises:
        OSError, SyntaxError, ValueError: if the file is damaged, no image, or declares an absurd size.
    """
    try:
        with Image.open(path) as image:
            yield image
    except _DAMAGE as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def read_rgb(path: Path) -> np.ndarray:
    """Decode one image file to uint8 [H, W, 3] RGB.

    Raises:
        OSError, SyntaxError, ValueError: from Pillow, if the file is damaged or no image.
    """
    with opened(path) as image:
        return np.array(to_rgb(image))


def probe_size(path: Path) -> tuple[int, int]:
    """Check that an image is complete, and return its (height, width) after EXIF orientation.

    A JPEG or PNG with its end marker in place is trusted; every other file is decoded.

    Raises:
        OSError, SyntaxError, ValueError: from Pillow, if the file is damaged or no image.
    """
    with opened(path) as image:
        trailer = _TRAILERS.get(image.format or "")
        if trailer is None or not _ends_with(path, trailer):
            image.load()
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # orientations 5 to 8 swap the axes
            width, height = height, width
    return height, width


def _ends_with(path: Path, trailer: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - len(trailer)))
        return file.read() == trailer


def resize(frame: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize uint8 [H, W, 3] to ``size`` = (height, width) with Pillow's antialiased bilinear filter.

    The one way frames are resized everywhere: a triangle filter whose support grows with the reduction, in fixed
    point, so the result is the same on every machine. ``None`` or the frame's own size returns it unchanged.
    """
    if size is None or frame.shape[:2] == tuple(size):
        return frame
    height, width = size
    return np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
