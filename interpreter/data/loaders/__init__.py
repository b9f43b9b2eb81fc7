"""Loaders: pixels of requested frames, decoded ahead in the background by one of three engines."""

from interpreter.data.loaders.base import Loader, LoaderError, Request
from interpreter.data.loaders.open import choose_loader, dali_obstacle, open_loader

__all__ = ["Loader", "LoaderError", "Request", "choose_loader", "dali_obstacle", "open_loader"]
