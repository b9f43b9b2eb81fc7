"""Clustering of the tokens of a whole video. Needs no training and no run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interpreter.configs import BackboneConfig, option
from interpreter.data import Video
from interpreter.engine.precision import in_precision, resolve_precision
from interpreter.methods.base import Encoded, Method, Segmenter, with_settings
from interpreter.methods.frames import encode_frames
from interpreter.models.backbones import Backbone, load_backbone
from interpreter.models.token_masks import token_masks
from interpreter.segmentation import Segmentation

FRAME_SIZE = (420, 420)  # as in the preset clips: neither landscape nor portrait is squeezed much; 30 patches of 14
GROUPS = 12  # of tokens, before they are merged


@dataclass(frozen=True)
class ClusterSettings:
    """Settings of the method ``cluster``."""

    num_segments: int = option(8, at_least=1)
    """Number of segments."""
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("facebook/dinov2-small"))
    """The frozen feature extractor. Use a ViT: with the features of a CNN, segments follow textures."""

    def __post_init__(self) -> None:
        """Accept ``backbone="efficientnet-lite0"`` from Python."""
        if isinstance(self.backbone, str):
            object.__setattr__(self, "backbone", BackboneConfig(self.backbone))
        elif not isinstance(self.backbone, BackboneConfig):
            raise ValueError(
                f'backbone={self.backbone!r}: give a name, such as "efficientnet-lite0", or a BackboneConfig'
            )


class ClusterSegmenter(Segmenter):
    """Segments a video by clustering its tokens.

    Args:
        backbone: frozen feature extractor.
        settings: see :class:`ClusterSettings`.
        precision: precision of the backbone, "fp32" or "bf16".
        frame_size: (H, W) that frames are resized to.
    """

    name = "clusters of tokens"

    def __init__(
        self, backbone: Backbone, settings: ClusterSettings, precision: str, frame_size: tuple[int, int]
    ) -> None:
        self.backbone, self.settings, self.precision, self.frame_size = backbone, settings, precision, frame_size
        self.num_segments = settings.num_segments

    @torch.no_grad()
    def encode(
        self,
        video: Video,
        seeds: Sequence[int] = (0,),
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Encoded:
        """See :meth:`Segmenter.encode`; keeps the tokens [T, M, C] in fp16, the same for all seeds."""
        encoded = encode_frames(self, video, (0,), lambda features, seed: (features.half(),), advance, keep)
        return Encoded(encoded.frames, dict.fromkeys(seeds, encoded.by_seed[0]))

    @torch.no_grad()
    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        """See :meth:`Segmenter.segment`; the seed chooses the starts of k-means."""
        chosen = with_settings(self.settings, settings)
        (tokens,) = encoded.by_seed[seed]
        groups = max(GROUPS, chosen.num_segments)
        masks = token_masks(tokens, self.grid, groups, chosen.num_segments, seed=seed, device=self.device)
        return Segmentation(self.grid, masks, None, {"token_masks": masks})


def open_clusters(device: torch.device, settings: Any, frame_size: tuple[int, int] | None) -> ClusterSegmenter:
    """Create a segmenter with the backbone of the settings."""
    precision = resolve_precision("auto", device)
    backbone = in_precision(load_backbone(settings.backbone), precision).to(device)
    height, width = (max(1, round(side / backbone.patch)) * backbone.patch for side in FRAME_SIZE)
    return ClusterSegmenter(backbone, settings, precision, frame_size or (height, width))


CLUSTER = Method(
    name="cluster",
    summary="groups similar patches of a video (k-means of the tokens of a ViT); needs no training",
    citation="the baseline of docs/results/overview.md, refined (docs/methods/cluster.md)",
    stages=(),
    settings=ClusterSettings,
    open=open_clusters,
)
