"""Reads single images (frames and masks): turned upright, checked, as RGB or as the stored numbers."""

import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

# The last bytes of a complete file. Checking them finds truncated files without decoding every frame of a data set.
_TRAILERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}

# Further exceptions that Pillow raises for damaged bytes, besides OSError, SyntaxError and ValueError. The last one is
# for an image that declares more than 179 million pixels, which would fill the memory.
_DAMAGE = (
    *(EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
# Files that Windows, macOS and network drives add to folders; names are compared in lower case.
_SYSTEM = frozenset({"__macosx", "thumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin", "lost+found"})
_SYSTEM |= {"system volume information"}
# Formats in which a file can hold several pictures. JPEG is not listed: the pictures that phones append to it are not
# frames.
_ANIMATED = frozenset({"PNG", "WEBP", "GIF", "AVIF"})
_LOSSY = frozenset({"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"})
# Gray levels that Pillow scales to 0..255, by the layout of the stored pixels.
_SPREAD = {"L;2": 85, "L;4": 17}
# Layouts of 16 bits a channel of which Pillow keeps the upper 8, so that all numbers below 256 would become 0.
_HALVED = frozenset({"RGB;16B", "LA;16B", "RGBA;16B"})


class UnsuitableError(ValueError):
    """The image is intact but of an unsuitable kind; the message says what to do."""


class TooDeepError(UnsuitableError):
    """The image stores numbers of which Pillow reads only some bits."""


def natural_key(path: Path | str) -> tuple[tuple[tuple[int, int | str], ...], str]:
    """Sort key under which ``frame2`` comes before ``frame10``; equal numbers (1, 01) are ordered by their text."""
    text = normal(str(path))
    parts = re.split(r"(\d+)", text)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts if part), text


def normal(name: str) -> str:
    """A name in Unicode NFC: é becomes one character. macOS stores it as two, an index from another system as one.

    >>> normal("cafe\u0301") == "caf\u00e9"
    True
    """
    return unicodedata.normalize("NFC", name)


def hidden(name: str) -> bool:
    """Whether a file or folder is always ignored: its name begins with a dot, or the system created it.

    >>> [hidden(name) for name in ("._00000.png", "Thumbs.db", "00000.png")]
    [True, True, False]
    """
    return name.startswith(".") or name.lower() in _SYSTEM


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; links that lead in a circle are not."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_regular(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file or a link to one; links that lead in a circle are not."""
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def list_images(folder: Path) -> list[Path]:
    """The images directly in ``folder``, in natural order; hidden files are left out, links that lead nowhere are not.

    Raises:
        OSError: if there is no such folder, or it cannot be read.
    """
    with os.scandir(folder) as entries:
        images = [
            folder / entry.name
            for entry in entries
            if not hidden(entry.name)
            and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
            and (is_regular(entry) or (entry.is_symlink() and not is_folder(entry)))
        ]
    return sorted(images, key=lambda path: natural_key(path.name))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to 8-bit RGB: alpha is dropped, 16 bits are scaled to 8."""
    if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow would clip to 255 instead of scaling
        wide = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.rint(wide / 257), 0, 255).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a frame or mask with Pillow. Every fault raises one of three exceptions.

    Raises:
        OSError, SyntaxError, ValueError: if the file is damaged, not an image, animated, or declares too many pixels.
    """
    try:
        with Image.open(path) as image:
            pictures = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
            if pictures > 1:
                raise UnsuitableError(
                    f"animated, {pictures} pictures where one is expected; save each as a separate file, or all of "
                    "them as a video file"
                )
            yield image
    except _DAMAGE as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; the mode stays as it is."""
    return ImageOps.exif_transpose(image)


def read_rgb(path: Path) -> np.ndarray:
    """Decode one image file, upright, to uint8 [H, W, 3] RGB.

    Raises:
        OSError, SyntaxError, ValueError: from `opened`, if the file is damaged or not a single picture.
    """
    with opened(path) as image:
        return np.array(to_rgb(upright(image)))


def read_numbers(path: Path) -> np.ndarray:
    """Decode one image file to its stored numbers (gray values or palette indices), turned upright.

    Args:
        path: a gray image of 1, 2, 4, 8, 16 or 32 bits, a palette image, or a colour image that is gray in each pixel
            (red = green = blue). An alpha channel must be opaque everywhere.

    Returns:
        [H, W] of an unsigned or signed integer type.

    Raises:
        OSError, SyntaxError, ValueError: from `opened`.
        UnsuitableError: for colours, transparent pixels, and formats whose compression changes numbers.
        TooDeepError: for colours, and gray with alpha, of 16 bits a channel.
    """
    with opened(path) as image:
        if image.format in _LOSSY:
            raise UnsuitableError(f"{image.format}, whose compression changes object ids; save it as a palette PNG")
        tiles = getattr(image, "tile", ())
        layout = str(tiles[0].args) if tiles else ""
        if layout in _HALVED:
            raise TooDeepError(
                f"16 bits a channel ({layout.partition(';')[0]}), of which the lower 8 would be lost; save it as a "
                "palette PNG, or as gray of 8 or 16 bits"
            )
        spread = _SPREAD.get(layout, 1)
        pixels = np.array(upright(image))
        mode = image.mode
    if pixels.ndim == 3:
        if mode in ("LA", "PA", "RGBA", "RGBa", "La") and (pixels[..., -1] != 255).any():
            raise UnsuitableError(f"transparent pixels ({mode}) instead of object ids; save it as a palette PNG")
        colours = pixels[..., : -1 if mode.endswith(("A", "a")) else None]
        if mode not in ("LA", "PA", "La", "RGB", "RGBA", "RGBa") or (colours != colours[..., :1]).any():
            raise UnsuitableError(f"colours ({mode}) instead of object ids; save it as a palette PNG")
        pixels = colours[..., 0]
    if pixels.dtype.kind == "f":
        raise UnsuitableError(f"fractions ({mode}) instead of object ids; save it as a palette PNG")
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    return pixels if spread == 1 else pixels // np.uint8(spread)


def probe_size(path: Path) -> tuple[int, int]:
    """Check that an image is complete, and return its (height, width) after it is turned upright.

    A JPEG or PNG is complete if it ends with its end marker; every other file is decoded.

    Raises:
        OSError, SyntaxError, ValueError: from `opened`, if the file is damaged or not a single picture.
    """
    with opened(path) as image:
        trailer = _TRAILERS.get(image.format or "")
        if trailer is None or not _ends_with(path, trailer):
            image.load()
        width, height = image.size
        if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # these swap the axes
            width, height = height, width
    return height, width


def _ends_with(path: Path, trailer: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - len(trailer)))
        return file.read() == trailer


def resize(frame: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Resize uint8 [H, W, 3] to ``size`` = (height, width) with Pillow's antialiased bilinear filter.

    All code of this package resizes frames with this function: a triangle filter whose support grows with the
    reduction, in fixed point, so the result is the same on every machine. ``None`` or the frame's own size returns it
    unchanged.

    >>> resize(np.zeros((64, 96, 3), np.uint8), (32, 48)).shape
    (32, 48, 3)
    """
    if size is None or frame.shape[:2] == tuple(size):
        return frame
    height, width = size
    return np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
