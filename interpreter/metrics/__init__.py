"""Metrics of video segmentation without labels, and the baselines to compare with: numpy in, floats out."""

from interpreter.metrics.baselines import (
    grid_segments,
    kmeans_frame_segments,
    kmeans_segments,
    one_segment,
    spectral_segments,
)
from interpreter.metrics.label_maps import resize_labels, upsample_labels
from interpreter.metrics.protocols import METRICS, PROTOCOLS, Protocol, scoring_size
from interpreter.metrics.score import UnknownIdError, VideoScores, score_video, summarise

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Protocol",
    "UnknownIdError",
    "VideoScores",
    "grid_segments",
    "kmeans_frame_segments",
    "kmeans_segments",
    "one_segment",
    "resize_labels",
    "score_video",
    "scoring_size",
    "spectral_segments",
    "summarise",
    "upsample_labels",
]
