"""What people look at and other programs read: palette PNGs, overlays, MP4, RLE JSON, picture grids, curves."""

from interpreter.render.curves import plot_curves
from interpreter.render.grid import mask_grid
from interpreter.render.overlay import overlay, segment_image
from interpreter.render.palette import DISPLAY_PALETTE, PALETTE, write_palette_png
from interpreter.render.rle import RleWriter, rle_json
from interpreter.render.video import VideoWriter

__all__ = [
    "DISPLAY_PALETTE",
    "PALETTE",
    "RleWriter",
    "VideoWriter",
    "mask_grid",
    "overlay",
    "plot_curves",
    "rle_json",
    "segment_image",
    "write_palette_png",
]
