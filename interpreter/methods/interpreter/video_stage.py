"""Video stage: the slots of all steps of a video become K video slots (docs/methods/interpreter_video_stage.md).

The steps of level 2 are frames with their image slots. The steps of level 3 are windows with their video slots, and so
on.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from slotkernels import SlotAttention, cluster_slots, merge_slots, sinkhorn_divergence
from slotkernels.ranges import annotate
from torch import Tensor, nn

from interpreter.methods.interpreter.config import VideoModelConfig
from interpreter.models.gate import SlotGate, restrict_attention
from interpreter.models.positions import sincos_1d, sincos_2d
from interpreter.models.transformer import TransformerDecoder, TransformerEncoder, init_transformer


class VideoSlots(NamedTuple):
    """Slots and attention of a batch of videos, after merging and the gate."""

    slots: Tensor  # [B, K, D]; slots that were merged into others are zero
    attention: Tensor  # [B, T, N, K], each row over K sums to 1
    valid: Tensor  # [B, K] bool, slots that are left after merging and that the gate keeps
    unmerged: Tensor  # [B, K, D], slots before merging
    keep: Tensor | None = None  # [B, K], 1 for valid slots, else 0, with the gradient of the gate; None without one
    sparsity: Tensor | None = None  # [B], mean probability that a slot is kept


class VideoStage(nn.Module):
    """Transformer encoder, slot attention, merging, and a decoder that reconstructs the inputs.

    The inputs describe the image slots of all frames: they are the slots, or the means of the tokens of each slot.
    Decoders:

    - transformer: queries for the time and the index of each slot attend to each other and to the video slots. The
      loss is a Sinkhorn divergence, which compares sets: the order of the inputs of a frame does not matter.
    - masks: each input is ``Â @ (W s + b)``, the mean of linear functions of the video slots s, weighted by its
      attention Â. The loss is the mean squared error, which only sharp attention makes small.

    Inputs may have masses [B, T, N], at least 0, in any unit: the share that each input stands for. A mass is the
    weight of an input in the loss of its step; all steps have the same weight. An input of mass 0 is padding, and a
    step with padding only is padding too. Padding does not affect the result. Every sample needs a step without it.

    With a gate (``--gate``), slots are dropped after merging. The other slots share the attention, and the decoder
    does not read the dropped ones.

    Args:
        config: widths, depths, the decoder and the number of video slots.
        input_dim: width of the inputs.
        num_frames: length of the training clips. The time encodings of a longer video are scaled to the same range,
            so that no position is outside the range of training.
    """

    def __init__(self, config: VideoModelConfig, input_dim: int, num_frames: int) -> None:
        super().__init__()
        if config.dim % 4:
            raise ValueError(f"--dim must be a multiple of 4 for its position encodings, got {config.dim}")
        self.config, self.num_frames = config, num_frames
        self.embed = nn.Linear(input_dim, config.dim) if input_dim != config.dim else nn.Identity()
        self.encoder = TransformerEncoder(config.dim, config.encoder_layers, config.heads, config.recompute)
        self.slot_attention = SlotAttention(
            config.num_slots, config.dim, iterations=config.iterations, implicit=config.implicit
        )
        self.decoder: nn.Module
        if config.decoder == "masks":
            self.decoder = nn.Linear(config.dim, input_dim)
        else:
            self.decoder = TransformerDecoder(
                config.dim, input_dim, config.decoder_layers, config.heads, config.recompute
            )
        init_transformer(self.encoder)
        if config.decoder == "transformer":
            init_transformer(self.decoder)
        self.gate = SlotGate(config.dim) if config.gate else None

    def times(self, frames: int, device: torch.device) -> Tensor:
        """Positions in time [T] of a video of ``frames`` frames."""
        if isinstance(frames, torch.SymInt):  # any number, in an exported program
            places = torch.arange(frames, device=device)
            return places * ((self.num_frames - 1) / places[-1].clamp_min(1).double()).clamp_max(1.0).float()
        step = min(1.0, (self.num_frames - 1) / max(frames - 1, 1))
        return torch.arange(frames, device=device) * step

    def encode_slots(self, inputs: Tensor, masses: Tensor | None = None) -> Tensor:
        """Encode the inputs [B, T, N, D_input] of a video by self-attention, with time encodings: [B, T, N, D]."""
        with annotate("encoder"):
            time = sincos_1d(self.times(inputs.shape[1], inputs.device), self.config.dim)
            x = self.embed(_without_padding(inputs, masses)) + self.config.time_scale * time[:, None]
            return self.encoder(x.flatten(1, 2), _exists(masses)).unflatten(1, inputs.shape[1:3])

    def group(
        self,
        context: Tensor,
        slots: Tensor | None = None,
        merge_threshold: float | None = None,
        iterations: int | None = None,
        sharpness: float = 1.0,
        masses: Tensor | None = None,
        gate_noise: Tensor | None = None,
    ) -> VideoSlots:
        """Group encoded inputs into video slots.

        Args:
            context: [B, T, N, D], the result of :meth:`encode_slots`.
            slots: [B, K, D], initial slots.
            merge_threshold: cosine distance below which slots are merged. Default: as in the configuration.
            iterations: iterations of slot attention. Default: as in training.
            sharpness: factor of the logits of slot attention.
            masses: [B, T, N], masses of the inputs; inputs of mass 0 are ignored.
            gate_noise: [B, K], standard normal noise for the decisions of the gate. Default: no noise.
        """
        tokens, exists = context.flatten(1, 2), _exists(masses)
        unmerged, attention = self.slot_attention(tokens, slots, exists, iterations=iterations, sharpness=sharpness)
        threshold = self.config.merge_threshold if merge_threshold is None else merge_threshold
        with annotate("merging"):
            labels, _ = cluster_slots(unmerged.detach(), threshold)
            merged, attention, valid = merge_slots(unmerged, attention, labels)
        keep = sparsity = None
        if self.gate is not None:
            kept = self.gate(merged, valid, gate_noise)
            sparsity = kept.probability.sum(1) / valid.sum(1)
            keep, valid = kept.keep, kept.mask
            attention = restrict_attention(attention, keep)
        return VideoSlots(merged, attention.unflatten(1, context.shape[1:3]), valid, unmerged, keep, sparsity)

    def encode(
        self,
        inputs: Tensor,
        slots: Tensor | None = None,
        masses: Tensor | None = None,
        gate_noise: Tensor | None = None,
    ) -> VideoSlots:
        """Video slots of inputs [B, T, N, D_input], from initial slots [B, K, D]."""
        return self.group(self.encode_slots(inputs, masses), slots, masses=masses, gate_noise=gate_noise)

    def decode(self, video: VideoSlots, frames: int, count: int, masses: Tensor | None = None) -> Tensor:
        """Reconstruct the inputs [B, T, N, D_input] from the merged video slots."""
        device = video.slots.device
        with annotate("decoder"):
            if self.config.decoder == "masks":
                return video.attention @ self.decoder(video.slots)[:, None]
            queries = sincos_2d(self.times(frames, device), torch.arange(count, device=device), self.config.dim)
            present = None if masses is None else (masses > 0).any(2).repeat_interleave(count, 1)
            queries = queries.to(video.slots.dtype)
            return self.decoder(queries, video.slots, video.valid, present, video.keep).unflatten(1, (frames, count))

    def forward(
        self,
        inputs: Tensor,
        slots: Tensor | None = None,
        masses: Tensor | None = None,
        gate_noise: Tensor | None = None,
    ) -> tuple[Tensor, VideoSlots]:
        """Mean over videos of :meth:`error` and of the penalty of the gate, and the video slots."""
        target = inputs.detach()
        target = target.to(torch.promote_types(target.dtype, torch.float32))
        video = self.encode(target, slots, masses, gate_noise)
        loss = self.error(video, target, masses).mean()
        return loss if video.sparsity is None else loss + self.config.gate * video.sparsity.mean(), video

    def error(self, video: VideoSlots, inputs: Tensor, masses: Tensor | None = None) -> Tensor:
        """Error [B] of the reconstruction of the inputs [B, T, N, D_input], mean over the steps.

        A Sinkhorn divergence, or with the decoder ``masks`` the mean squared error.
        """
        frames, count = inputs.shape[1:3]
        reconstructed = self.decode(video, frames, count, masses).to(inputs.dtype)
        with annotate("loss"):
            if masses is not None:
                return self._weighted_error(reconstructed, _without_padding(inputs, masses), masses)
            if self.config.decoder == "masks":
                return F.mse_loss(reconstructed, inputs, reduction="none").mean((1, 2, 3))
            divergence = sinkhorn_divergence(
                reconstructed.flatten(0, 1),
                inputs.flatten(0, 1),
                blur=self.config.blur,
                scaling=self.config.scaling,
                diameter="batch" if self.config.diameter is None else self.config.diameter,
            )
        return divergence.unflatten(0, inputs.shape[:2]).mean(1)

    def _weighted_error(self, reconstructed: Tensor, inputs: Tensor, masses: Tensor) -> Tensor:
        """:meth:`error` of inputs with masses, which are the weights of the points of a step in a Sinkhorn divergence.

        The annealing starts at the diameter of each step. With one box around the batch, as without masses, the loss of
        a clip would depend on the other clips and on the padding.
        """
        totals = masses.sum(2, keepdim=True)
        present = totals[..., 0] > 0
        weights = (masses / totals).masked_fill(~present.unsqueeze(2), 1 / masses.shape[2])
        if self.config.decoder == "masks":
            error = ((reconstructed - inputs).square().mean(3) * weights).sum(2)
        else:
            error = sinkhorn_divergence(
                reconstructed.flatten(0, 1),
                inputs.flatten(0, 1),
                None,
                weights.flatten(0, 1),
                blur=self.config.blur,
                scaling=self.config.scaling,
                diameter="problem" if self.config.diameter is None else self.config.diameter,
            ).unflatten(0, inputs.shape[:2])
        return error.masked_fill(~present, 0.0).sum(1) / present.sum(1)


def _without_padding(inputs: Tensor, masses: Tensor | None) -> Tensor:
    """Inputs [B, T, N, D_input] with zeros for padding: a NaN in masked padding would return as 0 · NaN."""
    return inputs if masses is None else inputs.masked_fill((masses == 0).unsqueeze(3), 0.0)


def _exists(masses: Tensor | None) -> Tensor | None:
    """Which inputs with masses [B, T, N] are not padding, [B, T·N]."""
    return None if masses is None else (masses > 0).flatten(1)
