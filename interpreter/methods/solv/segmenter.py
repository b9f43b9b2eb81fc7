"""Segmenting videos with SOLV."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interpreter.data import Video
from interpreter.large import FrameTensors
from interpreter.methods.base import Context, Encoded, Segmenter, with_settings
from interpreter.methods.frames import encode_frames
from interpreter.methods.solv.config import SolvSettings
from interpreter.methods.solv.model import Solv
from interpreter.models.autocast import autocast
from interpreter.models.linking import link_frames
from interpreter.segmentation import Segmentation

FRAMES_AT_ONCE = 32


class SolvSegmenter(Segmenter):
    """Segments each frame in the centre of its window with the decoder's masks, and links the slots over time.

    Spatial binding looks at frames one by one, so it is done once for each frame, and not for each of the windows that
    the frame is in. Its slots and attention maps are all that is kept of a frame.

    Args:
        context: the backbone.
        model: the trained model.
        settings: see :class:`SolvSettings`.
        frame_size: (H, W) that frames are resized to. Default: that of the training.
    """

    name = "solv"

    def __init__(
        self,
        context: Context,
        model: Solv,
        settings: SolvSettings,
        frame_size: tuple[int, int] | None = None,
    ) -> None:
        self.backbone, self.model, self.settings = context.backbone, model, settings
        self.frame_size = frame_size or context.data.frame_size
        self.precision, self.num_segments = context.precision, model.config.num_slots

    @torch.no_grad()
    def encode(
        self,
        video: Video,
        seeds: Sequence[int] = (0,),
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Encoded:
        """See :meth:`Segmenter.encode`; nothing is random, so the result is the same for all seeds."""
        places = self.model.places(self.grid)

        def find(features: Tensor, seed: int) -> tuple[Tensor, Tensor]:
            """Slots [t, N, D] and attention [t, M, N] fp16 of features [t, M, C]."""
            with autocast(self.device, self.precision):
                slots, attention = self.model.bind(self.model.with_positions(features, self.grid), places)
            return slots.float(), attention.half()

        encoded = encode_frames(self, video, seeds[:1], find, advance, keep)
        slots, attention = encoded.by_seed[seeds[0]]
        return Encoded(encoded.frames, dict.fromkeys(seeds, (self._bind_over_time(slots), attention)))

    def _bind_over_time(self, slots: Tensor) -> Tensor:
        """Slots [T, N, D] after temporal binding, each frame in the centre of a window."""
        half = self.model.num_frames // 2
        offsets = torch.arange(-half, half + 1, device=slots.device)
        bound = torch.empty_like(slots)
        for first in range(0, len(slots), FRAMES_AT_ONCE):
            centres = torch.arange(first, min(first + FRAMES_AT_ONCE, len(slots)), device=slots.device)
            frames = centres[:, None] + offsets
            present = (frames >= 0) & (frames < len(slots))
            with autocast(self.device, self.precision):
                bound[centres] = self.model.temporal(slots[frames.clamp(0, len(slots) - 1)], present).float()
        return bound

    @torch.no_grad()
    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        """See :meth:`Segmenter.segment`."""
        chosen = with_settings(self.settings, settings)
        merge = self.model.config.merge if chosen.merges is None else chosen.merges
        slots, attention = encoded.by_seed[seed]
        valid, merged_slots = [], torch.empty_like(slots)
        places = self.model.places(self.grid)
        masks = FrameTensors(len(slots), self.device).empty((len(places), slots.shape[1]), attention.dtype, "masks")
        for first in range(0, len(slots), FRAMES_AT_ONCE):
            part = slice(first, min(first + FRAMES_AT_ONCE, len(slots)))
            labels = self.model.labels(slots[part], chosen.merge_threshold, chosen.num_slots) if merge else None
            with autocast(self.device, self.precision):
                merged = self.model.merged(slots[part], attention[part].to(slots), places, labels)
                masks.write(part, self.model.decode(merged, self.grid).masks.half())
            merged_slots[part] = merged.slots
            valid.append(merged.valid)
        if not merge:
            return Segmentation(self.grid, masks.tensor, tensors={"slots": merged_slots})
        ids = link_frames(merged_slots, torch.cat(valid)).to(slots.device)
        across = F.one_hot(ids.clamp_min(0), int(ids.max()) + 1).float()  # [T, N, S]; masks are 0 where an id is -1
        return Segmentation(self.grid, masks.tensor, across, {"slots": merged_slots, "ids": ids})
