"""Metrics of video segmentation without labels, and the baselines they are read against: numpy in, floats out."""

from interpreter.metrics.ari import adjusted_rand_index, fg_ari_frame, fg_ari_video
from interpreter.metrics.baselines import (
    grid_segments,
    kmeans_frame_segments,
    kmeans_segments,
    link_segments,
    one_segment,
    spectral_segments,
    upsample_labels,
)
from interpreter.metrics.miou import Matching, frame_miou, video_miou
from interpreter.metrics.protocols import METRICS, PROTOCOLS, Protocol, scoring_size
from interpreter.metrics.score import UnknownIdError, VideoScores, resize_labels, score_video, summarise

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Matching",
    "Protocol",
    "UnknownIdError",
    "VideoScores",
    "adjusted_rand_index",
    "fg_ari_frame",
    "fg_ari_video",
    "frame_miou",
    "grid_segments",
    "kmeans_frame_segments",
    "kmeans_segments",
    "link_segments",
    "one_segment",
    "resize_labels",
    "score_video",
    "scoring_size",
    "spectral_segments",
    "summarise",
    "upsample_labels",
    "video_miou",
]
