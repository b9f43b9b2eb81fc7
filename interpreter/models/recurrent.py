"""Recurrent slot attention over the frames of a clip: the slots of a frame start from those of the frame before."""

from typing import Literal, NamedTuple

import torch
from slotkernels import SlotAttention
from slotkernels.ranges import annotate
from slotkernels.slot_attention import VIDEOSAUR
from torch import Tensor, nn

from interpreter.models.transformer import Block, init_attention

GruState = Literal["normalised", "slots"]
LogitScale = Literal["corrected", "published"]


class ClipSlots(NamedTuple):
    """What recurrent slot attention returns."""

    slots: Tensor  # [B, T, K, D], of each frame
    following: Tensor  # [B, K, D], where the slots of the frame after the last one start


class RecurrentSlotAttention(nn.Module):
    """Slot attention in each frame. Its initial slots are predicted from the frame before by a transformer block.

    With tokens x and initial slots S_0 (SAVi, Kipf et al. 2022; VideoSAUR and Slot Contrast)::

        slots[0]     = SA(S_0, x[0])                           # first_iterations
        slots[t + 1] = SA(predictor(slots[t]), x[t + 1])       # later_iterations

    Gradients flow through all frames, backwards in time.

    Args:
        dim: width D of slots and tokens.
        first_iterations: number of iterations of slot attention in the first frame.
        later_iterations: number of iterations in each later frame.
        use_mlp: add an MLP after the GRU of slot attention.
        gru_state: the state of the GRU, see ``slotkernels.slot_attention.Conventions``.
        heads: number of heads of the predictor.
        logit_scale: scale of the logits of the predictor's attention, with heads of width d. "corrected":
            ``q·k / sqrt(d)``; "published": ``q·k · sqrt(d)``, as in the public code of VideoSAUR and Slot Contrast.
        implicit: which iterations of a frame carry gradients, see :class:`slotkernels.SlotAttention`; "none": all.

    Example::

        grouping = RecurrentSlotAttention(64)
        slots, following = grouping(torch.randn(2, 4, 196, 64), torch.randn(2, 7, 64))  # [2, 4, 7, 64] and [2, 7, 64]
    """

    def __init__(
        self,
        dim: int,
        first_iterations: int = 3,
        later_iterations: int = 2,
        use_mlp: bool = True,
        gru_state: GruState = "normalised",
        heads: int = 4,
        logit_scale: LogitScale = "corrected",
        implicit: str = "none",
    ) -> None:
        super().__init__()
        self.first_iterations, self.later_iterations = first_iterations, later_iterations
        conventions = VIDEOSAUR._replace(use_mlp=use_mlp, gru_state=gru_state)
        # A call has as many slots as its initial slots.
        self.slot_attention = SlotAttention(1, dim, implicit=implicit, conventions=conventions, prior=False)
        self.predictor = Block(dim, heads, activation=nn.ReLU, sharpness=sharpness_of(logit_scale, dim, heads))
        init_attention(self.predictor)

    def forward(
        self,
        tokens: Tensor,  # [B, T, M, D], not normalised
        slots: Tensor,  # [B, K, D]: initial slots, or ``following`` of the frames before
        first: bool = True,  # whether the first of these frames is the first of the video
    ) -> ClipSlots:
        """Slots of each frame. To pass a long video in parts, pass ``following`` of one part as slots of the next."""
        found: list[Tensor] = []
        with annotate("slot attention"):
            prepared = self.slot_attention.prepare(
                tokens.flatten(0, 1), num_slots=slots.shape[1], iterations=self.later_iterations
            )
        for frame in prepared.split(tokens.shape[1]):
            iterations = self.first_iterations if first and not found else self.later_iterations
            with annotate("slot attention"):
                found.append(self.slot_attention(frame, slots, iterations=iterations).slots)
            with annotate("predictor"):
                slots = self.predictor(found[-1])
        return ClipSlots(torch.stack(found, 1), slots)


def sharpness_of(logit_scale: LogitScale, dim: int, heads: int) -> float:
    """Factor of an attention's usual logits, ``q·k / sqrt(d)`` with heads of width d."""
    return dim // heads if logit_scale == "published" else 1.0
