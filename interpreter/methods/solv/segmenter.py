"""Segment videos with SOLV."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpreter.data import Video
from interpreter.large import FrameTensors
from interpreter.methods.base import Context, Encoded, Segmenter, with_settings
from interpreter.methods.frames import encode_frames
from interpreter.methods.programs import Input, Program, backbone_program, labels_program
from interpreter.methods.solv.config import SolvSettings
from interpreter.methods.solv.model import Solv
from interpreter.models.autocast import autocast
from interpreter.models.linking import link_frames
from interpreter.segmentation import Segmentation

FRAMES_AT_ONCE = 32


class _Bind(nn.Module):
    """Slots [T, N, D] and attention [T, M, N], from features [T, M, C]."""

    def __init__(self, model: Solv, grid: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.grid = model, grid

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        slots, attention = self.model.bind(self.model.with_positions(features, self.grid), self.model.places(self.grid))
        return slots, attention


class _Decode(nn.Module):
    """Merged slots, which of them exist, and masks [T, M, N], from slots [T, F, N, D] of windows."""

    def __init__(
        self, model: Solv, grid: tuple[int, int], threshold: float | None, number: int | None, merge: bool | None
    ) -> None:
        super().__init__()
        self.model, self.grid, self.threshold, self.number = model, grid, threshold, number
        self.merge = model.config.merge if merge is None else merge

    def forward(self, slots: Tensor, present: Tensor, attention: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bound = self.model.temporal(slots, present)
        labels = self.model.labels(bound, self.threshold, self.number) if self.merge else None
        merged = self.model.merged(bound, attention, self.model.places(self.grid), labels)
        return merged.slots, merged.valid, self.model.decode(merged, self.grid).masks


class SolvSegmenter(Segmenter):
    """Segments each frame as the centre of a window, by the masks of the decoder, and links the slots over time.

    Spatial binding looks at single frames, so it runs once for each frame, not once for each window. Only the slots and
    the attention of each frame are kept.

    Args:
        context: the backbone.
        model: the trained model.
        settings: see :class:`SolvSettings`.
        frame_size: (H, W) that frames are resized to. Default: as in training.
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
        """See :meth:`Segmenter.encode`; nothing is random, so all seeds have the same result."""
        places = self.model.places(self.grid)

        def find(features: Tensor, seed: int) -> tuple[Tensor, Tensor]:
            """Slots [t, N, D] and attention [t, M, N] in fp16, from features [t, M, C]."""
            with autocast(self.device, self.precision):
                slots, attention = self.model.bind(self.model.with_positions(features, self.grid), places)
            return slots.float(), attention.half()

        encoded = encode_frames(self, video, seeds[:1], find, advance, keep)
        slots, attention = encoded.by_seed[seeds[0]]
        return Encoded(encoded.frames, dict.fromkeys(seeds, (self._bind_over_time(slots), attention)))

    def programs(self) -> list[Program]:
        """See :meth:`Segmenter.programs`; the caller makes the windows of frames, and links the slots over time."""
        model, device, (height, width) = self.model, self.device, self.grid
        tokens, frames, number = height * width, model.num_frames, model.config.num_slots
        features = torch.randn(3, tokens, model.feature_dim, device=device)
        slots = torch.randn(3, frames, number, model.config.dim, device=device)
        attention = torch.randn(3, tokens, number, device=device).softmax(-1)
        present = torch.ones(3, frames, dtype=torch.bool, device=device)
        bind = Program(
            "bind",
            "features of frames to slots; each frame by itself",
            _Bind(model, self.grid),
            {"features": Input(features, "T M C", "of the program backbone")},
            {"slots": "T N D: slots", "attention": "T M N: attention of the patches over them"},
        )
        decode = Program(
            "decode",
            "slots of windows around frames to the merged slots and masks of these frames",
            _Decode(model, self.grid, self.settings.merge_threshold, self.settings.num_slots, self.settings.merges),
            {
                "slots": Input(slots, "T F N D", f"of bind, for each frame those of the {frames} frames around it"),
                "present": Input(present, "T F", "which of these frames exist; others may hold anything finite"),
                "attention": Input(attention, "T M N", "of bind, of the frame in the centre"),
            },
            {
                "merged": "T N D: slots after merging; those that were merged into others are zero",
                "valid": "T N: whether the slot exists",
                "masks": "T M N: soft masks; each row over N sums to 1",
            },
        )
        backbone = backbone_program(self.backbone, self.frame_size)
        return [backbone, bind, decode, labels_program(self.grid, self.frame_size, device)]

    def _bind_over_time(self, slots: Tensor) -> Tensor:
        """Slots [T, N, D] after temporal binding, with each frame as the centre of a window."""
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
