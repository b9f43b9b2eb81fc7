"""The segmentation of a video: soft masks at patch resolution, from which label maps of any size are made."""

from dataclasses import dataclass, field

import numpy as np
import torch
from slotkernels import propagate_attention, propagate_labels
from torch import Tensor


@dataclass
class Segmentation:
    """Segments of a video of T frames.

    The soft mask of a patch is its row of ``attention``, or of ``attention @ across`` where slots of a frame are
    combined into segments. So the masks [T, M, S] of all frames never have to exist at once.

    Attributes:
        grid: patch grid (h, w), M = h w.
        attention: [T, M, N] fp16, patches over the slots of their frame; each row over N sums to 1.
        across: [T, N, S], slots over segments, each row over S sums to 1; None if each slot is a segment.
        tensors: what ``segment`` writes to slots.safetensors, by name.
        tied_over_time: whether a segment is the same object in all frames.
    """

    grid: tuple[int, int]
    attention: Tensor
    across: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    tied_over_time: bool = True

    def __len__(self) -> int:
        return len(self.attention)

    @property
    def num_segments(self) -> int:
        """Number of segments S."""
        return (self.attention if self.across is None else self.across).shape[-1]

    def masks(self, frames: slice = slice(None)) -> Tensor:
        """Soft masks at patch resolution, [t, M, S] fp32; each row sums to 1."""
        attention = self.attention[frames].float()
        if self.across is None:
            return attention
        return propagate_attention(attention[None], self.across[frames][None])[0]

    def labels(self, frames: slice = slice(None), size: tuple[int, int] | None = None) -> np.ndarray:
        """Segment of each pixel, uint8 [t, H, W]; ``size`` (H, W), by default the patch grid."""
        attention, across = self._factors(frames)
        return propagate_labels(attention, across, self.grid, size)[0].cpu().numpy()

    def labels_and_areas(
        self, frames: slice = slice(None), size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`labels`, and the number of pixels of each segment, int32 [t, S]."""
        attention, across = self._factors(frames)
        maps = propagate_labels(attention, across, self.grid, size, statistics=True)
        assert maps.areas is not None
        return maps.labels[0].cpu().numpy(), maps.areas[0].cpu().numpy()

    def _factors(self, frames: slice) -> tuple[Tensor, Tensor]:
        """Both factors of the masks, as a batch of one video. A slot that is a segment is that segment: identity."""
        attention, across = self.attention[frames], self.across
        if across is None:
            across = torch.eye(self.num_segments, device=attention.device).expand(len(self), -1, -1)
        return attention[None], across[frames][None]
