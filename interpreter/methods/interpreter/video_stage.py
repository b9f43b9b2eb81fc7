"""Video stage: the image slots of all frames become K video slots (docs/methods/interpreter.md)."""

from typing import NamedTuple

import torch
from slotkernels import SlotAttention, cluster_slots, merge_slots, sinkhorn_divergence
from slotkernels.ranges import annotate
from torch import Tensor, nn

from interpreter.methods.interpreter.config import VideoModelConfig
from interpreter.models.positions import sincos_1d, sincos_2d
from interpreter.models.transformer import TransformerDecoder, TransformerEncoder, init_transformer


class VideoSlots(NamedTuple):
    """Slots and attention of a batch of videos, after merging."""

    slots: Tensor  # [B, K, D], rows that are not valid are zero
    attention: Tensor  # [B, T, N, K], each row over K sums to 1
    valid: Tensor  # [B, K] bool: slots that are left after merging
    unmerged: Tensor  # [B, K, D], the slots before merging


class VideoStage(nn.Module):
    """Transformer encoder, slot attention, merging and a decoder whose loss compares unordered sets.

    Args:
        config: widths, depths and the number of video slots.
        slot_dim: width of the image slots.
        num_frames: length of the clips it is trained on. A longer video is squeezed into the same range of
            time encodings, so that positions never leave what training has seen.
    """

    def __init__(self, config: VideoModelConfig, slot_dim: int, num_frames: int) -> None:
        super().__init__()
        if config.dim % 4:
            raise ValueError(f"--dim must be a multiple of 4 for its position encodings, got {config.dim}")
        self.config, self.num_frames = config, num_frames
        self.embed = nn.Linear(slot_dim, config.dim) if slot_dim != config.dim else nn.Identity()
        self.encoder = TransformerEncoder(config.dim, config.encoder_layers, config.heads, config.recompute)
        self.slot_attention = SlotAttention(
            config.num_slots, config.dim, iterations=config.iterations, implicit=config.implicit
        )
        self.decoder = TransformerDecoder(config.dim, slot_dim, config.decoder_layers, config.heads, config.recompute)
        init_transformer(self.encoder)
        init_transformer(self.decoder)

    def times(self, frames: int, device: torch.device) -> Tensor:
        """Positions in time [T] of a video of ``frames`` frames."""
        step = min(1.0, (self.num_frames - 1) / max(frames - 1, 1))
        return torch.arange(frames, device=device) * step

    def encode_slots(self, image_slots: Tensor) -> Tensor:
        """Self-attention among the image slots [B, T, N, D_image] of a video, with time encodings: [B, T, N, D]."""
        with annotate("encoder"):
            time = sincos_1d(self.times(image_slots.shape[1], image_slots.device), self.config.dim)
            x = self.embed(image_slots) + self.config.time_scale * time[:, None]
            return self.encoder(x.flatten(1, 2)).unflatten(1, image_slots.shape[1:3])

    def group(
        self,
        context: Tensor,
        slots: Tensor | None = None,
        merge_threshold: float | None = None,
        iterations: int | None = None,
    ) -> VideoSlots:
        """Video slots of what :meth:`encode_slots` returned.

        Args:
            context: [B, T, N, D].
            slots: [B, K, D], a draw of the prior.
            merge_threshold: cosine distance below which slots are merged. Default: the configuration's.
            iterations: of slot attention. Default: training's.
        """
        unmerged, attention = self.slot_attention(context.flatten(1, 2), slots, iterations=iterations)
        threshold = self.config.merge_threshold if merge_threshold is None else merge_threshold
        with annotate("merging"):
            labels, _ = cluster_slots(unmerged.detach(), threshold)
            merged, attention, valid = merge_slots(unmerged, attention, labels)
        return VideoSlots(merged, attention.unflatten(1, context.shape[1:3]), valid, unmerged)

    def encode(self, image_slots: Tensor, slots: Tensor | None = None) -> VideoSlots:
        """Video slots of image slots [B, T, N, D_image]; ``slots`` [B, K, D] is a draw of the prior."""
        return self.group(self.encode_slots(image_slots), slots)

    def decode(self, video: VideoSlots, frames: int, count: int) -> Tensor:
        """Reconstruct the image slots [B, T, N, D_image] from the merged video slots."""
        device = video.slots.device
        with annotate("decoder"):
            queries = sincos_2d(self.times(frames, device), torch.arange(count, device=device), self.config.dim)
            return self.decoder(queries, video.slots, video.valid).unflatten(1, (frames, count))

    def forward(self, image_slots: Tensor, slots: Tensor | None = None) -> tuple[Tensor, VideoSlots]:
        """Mean over videos of :meth:`divergence`, and the video slots."""
        target = image_slots.detach().float()
        video = self.encode(target, slots)
        return self.divergence(video, target).mean(), video

    def divergence(self, video: VideoSlots, image_slots: Tensor) -> Tensor:
        """Sinkhorn divergence [B] of the reconstruction from the image slots [B, T, N, D_image], mean over frames."""
        reconstructed = self.decode(video, *image_slots.shape[1:3]).float()
        with annotate("loss"):
            divergence = sinkhorn_divergence(
                reconstructed.flatten(0, 1),
                image_slots.flatten(0, 1),
                blur=self.config.blur,
                scaling=self.config.scaling,
                diameter="batch" if self.config.diameter is None else self.config.diameter,
            )
        return divergence.unflatten(0, image_slots.shape[:2]).mean(1)
