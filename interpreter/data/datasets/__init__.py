"""Data sets of videos with or without masks, opened by :func:`open_dataset`."""

from interpreter.data.datasets.annotations import VOID, Annotation
from interpreter.data.datasets.open import VideoDataset, find_sources, open_dataset, split_parts
from interpreter.data.datasets.unopened import UnopenedVideo, UnopenedVideos

__all__ = [
    "VOID",
    "Annotation",
    "UnopenedVideo",
    "UnopenedVideos",
    "VideoDataset",
    "find_sources",
    "open_dataset",
    "split_parts",
]
