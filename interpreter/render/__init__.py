"""What people look at and other programs read: palette PNGs, overlays, picture grids and curves; MP4 and RLE JSON.

The last two are imported from :mod:`.video` and :mod:`.rle`, since they load PyAV and pycocotools.
"""

from interpreter.render.curves import plot_curves
from interpreter.render.grid import mask_grid
from interpreter.render.overlay import overlay, segment_image
from interpreter.render.palette import DISPLAY_PALETTE, PALETTE, write_palette_png

__all__ = [
    "DISPLAY_PALETTE",
    "PALETTE",
    "mask_grid",
    "overlay",
    "plot_curves",
    "segment_image",
    "write_palette_png",
]
