"""The video stage with weighted image slots: an experiment of profiling/association.py, slower than the usual one."""

import torch
import torch.nn.functional as F
from slotkernels import SamplesLoss, SlotAttention
from torch import Tensor

from interpreter.methods.interpreter.config import VideoModelConfig
from interpreter.methods.interpreter.video_stage import VideoSlots, VideoStage


class WeightedVideoStage(VideoStage):
    """A video stage that weighs each image slot by a power of its mass, in slot attention and in the loss.

    Each video slot takes the weighted mean of the image slots that it won. The loss is the weighted mean of squared
    errors, or the Sinkhorn divergence of the reconstructed points, which all weigh the same, and the weighted inputs of
    a frame. The inputs [B, T, N, D_input + 1] have the mass of each image slot as their last channel.

    Args:
        config: as of :class:`VideoStage`, with ``merge_threshold=0``.
        input_dim: width of the inputs, without the mass.
        num_frames: length of the clips it is trained on.
        power: of the masses; with 0 it computes what :class:`VideoStage` does.
    """

    def __init__(self, config: VideoModelConfig, input_dim: int, num_frames: int, power: float) -> None:
        super().__init__(config, input_dim, num_frames)
        if config.merge_threshold:
            raise ValueError(f"merge_threshold must be 0 here, got {config.merge_threshold}")
        self.power = power

    def weights(self, masses: Tensor) -> Tensor:
        """Weights [B, T, N] of image slots of such masses [B, T, N]; those of a frame sum to 1."""
        weights = masses.float() ** self.power
        return weights / weights.sum(-1, keepdim=True)

    def encode_slots(self, inputs: Tensor, masses: None = None) -> Tensor:  # type: ignore[override]
        """See :meth:`VideoStage.encode_slots`; the masses stay the last channel: [B, T, N, D + 1]."""
        return torch.cat([super().encode_slots(inputs[..., :-1]).float(), inputs[..., -1:]], -1)

    def group(  # type: ignore[override]
        self,
        context: Tensor,
        slots: Tensor | None = None,
        merge_threshold: float | None = None,
        iterations: int | None = None,
        sharpness: float = 1.0,
        masses: None = None,
        gate_noise: None = None,
    ) -> VideoSlots:
        """See :meth:`VideoStage.group`; nothing is merged."""
        tokens, weights = context[..., :-1].flatten(1, 2), self.weights(context[..., -1]).flatten(1)
        slots = self.slot_attention.sample_slots(len(tokens)) if slots is None else slots
        iterations = self.slot_attention.iterations if iterations is None else iterations
        slots, attention = weighted_slot_attention(self.slot_attention, tokens, weights, slots, iterations, sharpness)
        valid = torch.ones(slots.shape[:2], dtype=torch.bool)
        return VideoSlots(slots, attention.unflatten(1, context.shape[1:3]), valid, slots)

    def error(self, video: VideoSlots, inputs: Tensor, masses: None = None) -> Tensor:  # type: ignore[override]
        """See :meth:`VideoStage.error`."""
        target, weights = inputs[..., :-1], self.weights(inputs[..., -1])
        reconstructed = self.decode(video, *target.shape[1:3]).float()
        if self.config.decoder == "masks":
            errors = F.mse_loss(reconstructed, target, reduction="none").mean(-1)  # [B, T, N]
            return (errors * weights).sum(-1).mean(1)
        loss = SamplesLoss(blur=self.config.blur, scaling=self.config.scaling)
        points = [t.flatten(0, 1) for t in (torch.full_like(weights, 1 / weights.shape[-1]), reconstructed)]
        return loss(*points, weights.flatten(0, 1), target.flatten(0, 1)).unflatten(0, weights.shape[:2]).mean(1)


def weighted_slot_attention(
    module: SlotAttention, tokens: Tensor, weights: Tensor, slots: Tensor, iterations: int, sharpness: float
) -> tuple[Tensor, Tensor]:
    """Slots [B, K, D] and attention [B, M, K] of tokens [B, M, D] that count as much as their weights [B, M] say.

    The gradient goes through the last iteration and straight through to the initial slots, as with
    ``SlotAttention(implicit="bilevel")``.
    """
    tokens = module.norm_inputs(tokens)
    k, v = module.to_k(tokens), module.to_v(tokens)

    def step(slots: Tensor) -> tuple[Tensor, Tensor]:
        q = module.to_q(module.norm_slots(slots))
        attention = (sharpness * module.scale * (k @ q.mT).float()).softmax(-1)
        shares = attention * weights[..., None]
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1e-8)
        updates = shares.mT.to(v.dtype) @ v
        slots = module.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots + module.mlp(module.norm_mlp(slots)), attention

    initial = slots
    with torch.no_grad():
        for _ in range(iterations - 1):
            slots, _ = step(slots)
    return step(slots.detach() + (initial - initial.detach()))
