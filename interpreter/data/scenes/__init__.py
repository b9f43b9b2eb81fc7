"""Generated videos of moving, textured objects with exact masks, written by :func:`generate_scenes`."""

from interpreter.data.scenes.generate import generate_scenes

__all__ = ["generate_scenes"]
