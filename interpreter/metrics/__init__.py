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
from interpreter.metrics.davis import region_similarity, region_similarity_multi
from interpreter.metrics.miou import frame_miou, video_miou
from interpreter.metrics.summary import PER_OBJECT, PROTOCOLS, evaluate_video, summarise

__all__ = [
    "PER_OBJECT",
    "PROTOCOLS",
    "adjusted_rand_index",
    "evaluate_video",
    "fg_ari_frame",
    "fg_ari_video",
    "frame_miou",
    "grid_segments",
    "kmeans_frame_segments",
    "kmeans_segments",
    "kmeans_segments",
    "link_segments",
    "one_segment",
    "region_similarity",
    "region_similarity_multi",
    "spectral_segments",
    "summarise",
    "upsample_labels",
    "video_miou",
]
