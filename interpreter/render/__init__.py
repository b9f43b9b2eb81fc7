"""Output for people and other programs: palette PNGs, overlays, picture grids, curves, MP4 and RLE JSON.

Import MP4 and RLE JSON from :mod:`interpreter.render.video` and :mod:`interpreter.render.rle`. These modules load PyAV
and pycocotools, which the other modules do not need.
"""

from typing import Literal

from interpreter.render.curves import plot_curves
from interpreter.render.grid import mask_grid
from interpreter.render.overlay import overlay, segment_image
from interpreter.render.palette import DISPLAY_PALETTE, PALETTE, write_palette_png

__all__ = [
    "DISPLAY_PALETTE",
    "PALETTE",
    "Format",
    "mask_grid",
    "overlay",
    "plot_curves",
    "segment_image",
    "write_palette_png",
]

Format = Literal["coco", "youtube-vis", "label-studio"]
"""Data sets for other programs, and the names of their folders (:mod:`interpreter.render.formats`)."""
