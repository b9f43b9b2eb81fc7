"""Segment videos with SMTC."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from slotkernels import match_slots
from torch import Tensor, nn

from interpreter.data import Video
from interpreter.engine.randomness import torch_generator
from interpreter.methods.base import Context, Encoded, Segmenter, with_settings
from interpreter.methods.frames import encode_frames
from interpreter.methods.programs import Input, Program, backbone_program, labels_program
from interpreter.methods.smtc.config import SmtcSettings
from interpreter.methods.smtc.model import Grouped, Smtc
from interpreter.models.autocast import autocast
from interpreter.segmentation import Segmentation


class _Found(nn.Module):
    """Semantics, instances, which of them are valid, and masks [T, M, N·P], from frames and those before them."""

    def __init__(self, model: Smtc, settings: SmtcSettings, grid: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.settings, self.grid = model, settings, grid

    def forward(self, features: Tensor, partners: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        iterations = self.settings.inference_iterations
        found = self.model.student.group(features, partners, noise, self.grid, iterations)
        valid = self.model.valid(found, self.settings.area_threshold, self.settings.similarity_threshold)
        return found.semantics, found.instances, valid, (found.masks.unsqueeze(-1) * found.shares).flatten(2)


class SmtcSegmenter(Segmenter):
    """Computes semantics and instances of each frame, and links the instances over time.

    All frames use the same draw of initial slots, so that an instance keeps its index while the video changes little.
    Each frame is correlated with the one before it, the first one with the second.

    Args:
        context: supplies the frozen backbone, which is used if the model has none.
        model: the trained model.
        settings: see :class:`SmtcSettings`.
        frame_size: (H, W) that frames are resized to. Default: as in training.
    """

    name = "smtc"

    def __init__(
        self, context: Context, model: Smtc, settings: SmtcSettings, frame_size: tuple[int, int] | None = None
    ) -> None:
        encoder = model.student.encoder
        self.backbone = context.backbone if encoder is None else encoder
        self.model, self.settings = model, settings
        self.frame_size = frame_size or context.data.frame_size
        self.precision = context.precision
        self.num_segments = 2 if settings.segments == "union" else 1 + settings.max_tracks

    @torch.no_grad()
    def encode(
        self,
        video: Video,
        seeds: Sequence[int] = (0,),
        advance: Callable[[int], None] = lambda frames: None,
        keep: Callable[[Tensor], None] = lambda features: None,
    ) -> Encoded:
        """See :meth:`Segmenter.encode`."""
        config, branch = self.model.config.model, self.model.student
        shape = (1, config.num_semantics, config.num_instances, branch.dim)
        before: dict[int, Tensor] = {}  # last frame of the chunk before, for each seed

        def find(features: Tensor, seed: int) -> tuple[Tensor, ...]:
            """Semantics and instances of the next t frames, with masks in fp16."""
            first = before.get(seed, features[1:2] if len(features) > 1 else features)
            before[seed] = features[-1:]
            noise = torch.randn(shape, generator=torch_generator(self.device, seed), device=self.device)
            with autocast(self.device, self.precision):
                found = branch.group(
                    features,
                    torch.cat([first, features[:-1]]),
                    noise.expand(len(features), -1, -1, -1),
                    self.grid,
                    self.settings.inference_iterations,
                )
            return found.semantics.float(), found.masks.half(), found.instances.float(), found.shares.half()

        # Masks and shares are multiplied at the end, for the whole video.
        return encode_frames(self, video, seeds, find, advance, keep, elsewhere=False)

    def programs(self) -> list[Program]:
        """See :meth:`Segmenter.programs`; the caller links instances over time."""
        config, branch = self.model.config.model, self.model.student
        features, partners = torch.randn(2, 3, self.grid[0] * self.grid[1], self.backbone.dim, device=self.device)
        noise = torch.randn(3, config.num_semantics, config.num_instances, branch.dim, device=self.device)
        found = Program(
            "model",
            "features of frames to instances of each semantic, and their masks",
            _Found(self.model, self.settings, self.grid),
            {
                "features": Input(features, "T M C", "of the program backbone"),
                "partners": Input(partners, "T M C", "of the frame before each; of the second frame for the first"),
                "noise": Input(noise, "T N P D", "standard normal; the same for all frames of a video"),
            },
            {
                "semantics": "T N D: semantics of each frame",
                "instances": "T N P D: instances of each semantic",
                "valid": "T N P: whether the instance exists; without it, its patches are background",
                "masks": "T M N*P: soft masks of the instances; each row sums to 1",
            },
        )
        backbone = backbone_program(self.backbone, self.frame_size)
        return [backbone, found, labels_program(self.grid, self.frame_size, self.device)]

    @torch.no_grad()
    def segment(self, encoded: Encoded, seed: int = 0, **settings: Any) -> Segmentation:
        """See :meth:`Segmenter.segment`.

        Raises:
            ValueError: for another number of iterations than the video was encoded with.
        """
        chosen = with_settings(self.settings, settings)
        if chosen.inference_iterations != self.settings.inference_iterations:
            raise ValueError(
                "smtc finds its slots while it encodes a video, so their iterations cannot be swept; run the command "
                "once for each --inference-iterations"
            )
        found = Grouped(*encoded.by_seed[seed])
        valid = self.model.valid(found, chosen.area_threshold, chosen.similarity_threshold)  # [T, N, P]
        attention = (found.masks.unsqueeze(-1) * found.shares).flatten(2)  # [T, M, N·P]
        tensors = {"semantics": found.semantics, "slots": found.instances, "valid": valid}
        if chosen.segments == "union":
            segments = valid.flatten(1).long()
        else:
            ids = link_instances(found.instances)
            segments = largest_tracks(attention, valid, ids, chosen.max_tracks)
            tensors["ids"] = torch.where(valid, segments.view_as(valid), -1)
        across = F.one_hot(segments, int(segments.max()) + 1).float()
        return Segmentation(self.grid, attention, across, tensors)


def link_instances(instances: Tensor) -> Tensor:
    """Ids of the instances of each semantic over time, from matches of consecutive frames by cosine similarity.

    >>> instances = torch.eye(3)[None, None].repeat(2, 1, 1, 1)
    >>> instances[1] = instances[1].roll(1, -2)
    >>> link_instances(instances).tolist()
    [[[0, 1, 2]], [[2, 0, 1]]]

    Args:
        instances: [T, N, P, D].

    Returns:
        [T, N, P] int64, a permutation of 0 … P - 1 for each semantic and frame; in the first frame 0 … P - 1.
    """
    frames, semantics, number, _ = instances.shape
    directions = F.normalize(instances.float(), dim=-1)
    matches = match_slots(directions[1:] @ directions[:-1].mT).cpu()  # [T - 1, N, P], the match in the frame before
    ids = torch.arange(number).repeat(frames, semantics, 1)
    for frame in range(1, frames):
        ids[frame] = ids[frame - 1].gather(1, matches[frame - 1])
    return ids.to(instances.device)


def largest_tracks(attention: Tensor, valid: Tensor, ids: Tensor, count: int) -> Tensor:
    """The segment of each instance in each frame: the number of its track, or 0 for the background.

    Args:
        attention: [T, M, N·P], soft masks of the instances.
        valid: [T, N, P] bool, which instances are valid.
        ids: [T, N, P], the result of :func:`link_instances`.
        count: number of tracks that are kept: those with the largest area.

    Returns:
        [T, N·P] int64; tracks are numbered from 1 in the order of their semantics and ids.

    >>> attention = torch.tensor([[[0.7, 0.3]], [[0.2, 0.8]]])  # two frames of a patch; the instances change places
    >>> ids = torch.tensor([[[0, 1]], [[1, 0]]])
    >>> largest_tracks(attention, torch.ones(2, 1, 2, dtype=torch.bool), ids, count=1).tolist()
    [[1, 0], [0, 1]]
    """
    semantics, number = valid.shape[1:]
    tracks = (ids + number * torch.arange(semantics, device=ids.device)[:, None]).flatten(1)  # [T, N·P]
    areas = (attention.float().mean(1) * valid.flatten(1)).double()
    totals = torch.zeros(semantics * number, dtype=torch.float64, device=ids.device)
    totals = totals.index_put((tracks.flatten(),), areas.flatten(), accumulate=True)
    kept = torch.zeros_like(totals, dtype=torch.bool)
    kept[totals.argsort(descending=True, stable=True)[:count]] = True
    kept &= totals > 0
    numbers = kept.cumsum(0) * kept  # number of each track, 0 if it is not kept
    return numbers[tracks] * valid.flatten(1)
