"""Colours of label maps and of lines in plots."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image

from interpreter.files import written_whole


def _davis_palette() -> np.ndarray:
    """Spread the bits of the index: 0, 3, 6 become the highest of red, 1, 4, 7 those of green, 2, 5 those of blue."""
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for channel in range(3):
        for level in range(3):
            bit = (index >> (3 * level + channel)) & 1
            palette[:, channel] |= (bit << (7 - level)).astype(np.uint8)
    return palette


def _display_palette() -> np.ndarray:
    """Okabe and Ito's eight colours, then hues at steps of the golden ratio with three levels of lightness."""
    okabe_ito = ["e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7", "8c8c8c"]
    colours = [tuple(bytes.fromhex(colour)) for colour in okabe_ito]
    for i in range(len(colours), 256):
        red, green, blue = colorsys.hls_to_rgb(i * 0.618034 % 1, (0.38, 0.55, 0.72)[i % 3], 0.65)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(colours, np.uint8)


PALETTE: np.ndarray = _davis_palette()
"""uint8 [256, 3], the palette of PASCAL VOC and DAVIS; index 0 is black."""

DISPLAY_PALETTE: np.ndarray = _display_palette()
"""uint8 [256, 3] for pictures: all entries are bright, and colour-blind people can distinguish the first eight."""

# Okabe and Ito's colours in a different order, without yellow, which is too pale for lines on white.
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


def write_palette_png(labels: np.ndarray, path: str | Path) -> None:
    """Write a label map in the format of DAVIS: an 8-bit palette PNG whose pixel values are the ids.

    Id 0 is black, and tools for DAVIS read it as background. Add 1 to all ids if 0 is a segment.

    Args:
        labels: uint8 [H, W].
        path: path of the file. Missing folders are created. The file appears when it is complete.

    Raises:
        ValueError: for any other type or number of dimensions.
        OSError: if it cannot be written.
    """
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise ValueError(f"labels must be uint8 [H, W], got {labels.dtype} {labels.shape}")
    image = Image.fromarray(np.ascontiguousarray(labels))
    image.putpalette(PALETTE.tobytes())
    with written_whole(Path(path)) as temporary:
        image.save(temporary, format="PNG")
