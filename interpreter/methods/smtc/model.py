"""The model of SMTC: correlation, slot attention for semantics and for instances, student and teacher."""

import copy
import math
from typing import NamedTuple

import torch
from slotkernels import SlotAttention
from slotkernels.slot_attention import Conventions
from torch import Tensor, nn

from interpreter.methods.smtc.config import SmtcModelConfig, SmtcTraining
from interpreter.models.alignment import (
    aligned_masks,
    instance_consistency,
    mask_regulariser,
    semantic_alignment,
    valid_instances,
)
from interpreter.models.backbones import Backbone
from interpreter.models.backbones.depth import depth_factors
from interpreter.models.correspondence import CorrelationEmbedding


class Grouped(NamedTuple):
    """Slots and masks of R frames."""

    semantics: Tensor  # [R, N, D]
    masks: Tensor  # [R, M, N] fp32, probability of each semantic; each row sums to 1
    instances: Tensor  # [R, N, P, D]
    shares: Tensor  # [R, M, N, P] fp32, share of each instance in its semantic; each row over P sums to 1


class SmtcBranch(nn.Module):
    """The model of the student or of the teacher (SMTC, sections 3.1 to 3.3).

    Args:
        config: numbers of slots, and widths.
        feature_dim: width C of the features.
        grid: patch grid (h, w) of the training, M = h·w. Other grids are possible when videos are segmented.
        encoder: the backbone, if it is trained or frames are augmented; None if the inputs are features.

    Raises:
        ValueError: if the width of the slots does not fit the features.
    """

    def __init__(
        self, config: SmtcModelConfig, feature_dim: int, grid: tuple[int, int], encoder: Backbone | None = None
    ) -> None:
        super().__init__()
        dim = config.dim or feature_dim
        if dim != feature_dim and not config.project_features:
            raise ValueError(
                f"--dim {dim} differs from the width {feature_dim} of the features, to which the correlation is added; "
                "use --project-features, or leave --dim out"
            )
        self.config, self.dim, self.grid, self.encoder = config, dim, grid, encoder
        if config.project_features:
            self.to_features = nn.Linear(feature_dim, dim)
        self.correlation = CorrelationEmbedding(feature_dim, dim, grid)
        self.slot_attention = SlotAttention(
            config.num_semantics,
            dim,
            iterations=config.iterations,
            hidden_dim=dim,
            implicit=config.implicit,
            update=config.update,
            conventions=Conventions(qkv_bias=True),
            prior=False,
        )
        self.mu = nn.Parameter(torch.randn(config.num_semantics, dim))
        bound = math.sqrt(6 / ((config.num_semantics + 1) * dim))  # Xavier of a tensor [1, N, 1, D], as published
        self.log_sigma = nn.Parameter(torch.empty(config.num_semantics, dim).uniform_(-bound, bound))
        self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def draw(self, noise: Tensor) -> Tensor:
        """Initial slots [R, N, P, D] of the instances, from standard normal noise of that shape."""
        slots = self.mu[:, None] + self.log_sigma.exp()[:, None] * noise
        if self.config.sampling_gradient == "reparameterised":
            return slots
        # A gradient of zeros, not None: so weight decay applies to the deviations, as in the public code.
        return slots.detach() + 0 * self.log_sigma[:, None]

    def group(
        self,
        features: Tensor,  # [R, M, C]
        partners: Tensor,  # [R, M, C], features of another frame of the same video
        noise: Tensor,  # [R, N, P, D] standard normal
        grid: tuple[int, int] | None = None,
        iterations: int | None = None,
    ) -> Grouped:
        """Semantics of each frame, then instances of each semantic among the patches that belong to it.

        Args:
            features: features of the frames.
            partners: features of another frame of the same video for each of them.
            noise: noise from which the initial slots of the instances are drawn.
            grid: patch grid of these frames. Default: as in training.
            iterations: iterations of slot attention. Default: as in training.
        """
        number = self.config.num_semantics
        tokens = self.to_features(features) if self.config.project_features else features
        tokens = tokens + self.correlation(features, partners, grid)
        rows, attend = tokens.shape[0], self.slot_attention
        iterations = iterations or attend.iterations
        prepared = attend.prepare(tokens, num_slots=number * (1 + noise.shape[2]), iterations=iterations)
        initial = self.mu.expand(rows, -1, -1)
        semantics, masks = attend(prepared, initial, iterations=iterations)
        if self.config.mask_on == "logits":
            belongs = self._logits(tokens, initial, iterations) > self.config.mask_threshold
        else:
            belongs = masks > self.config.mask_threshold
        start = self.draw(noise).flatten(1, 2)
        instances, shares = attend(prepared.masked(belongs.mT), start, iterations=iterations, groups=number)
        by_semantic = (number, noise.shape[2])
        return Grouped(semantics, masks, instances.unflatten(1, by_semantic), shares.unflatten(2, by_semantic))

    @torch.no_grad()
    def _logits(self, tokens: Tensor, slots: Tensor, iterations: int) -> Tensor:
        """Logits [R, M, N] of the semantics in the last iteration."""
        attend = self.slot_attention
        if iterations > 1:
            slots = attend(tokens, slots, iterations=iterations - 1).slots
        queries, keys = attend.to_q(attend.norm_slots(slots)), attend.to_k(attend.norm_inputs(tokens))
        return keys @ queries.mT * attend.scale


class Smtc(nn.Module):
    """Student and teacher.

    Args:
        config: options of the training.
        feature_dim: width C of the features.
        grid: patch grid (h, w) of the training.
        encoder: the student's backbone, see :class:`SmtcBranch`; the teacher gets a copy.

    Raises:
        ValueError: see :class:`SmtcBranch`.
    """

    def __init__(
        self, config: SmtcTraining, feature_dim: int, grid: tuple[int, int], encoder: Backbone | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.student = SmtcBranch(config.model, feature_dim, grid, encoder)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    @property
    def depth_size(self) -> int:
        """How many random numbers stochastic depth needs for each frame."""
        encoder = self.student.encoder
        trained = encoder is not None and any(parameter.requires_grad for parameter in encoder.parameters())
        return 2 * encoder.num_blocks if encoder is not None and trained and self.config.drop_path else 0

    @property
    def noise_size(self) -> int:
        """How many random numbers a step needs for each clip: for instances (student, teacher) and stochastic depth."""
        model = self.config.model
        instances = model.num_semantics * model.num_instances * self.student.dim
        return self.config.num_frames * (2 * instances + self.depth_size)

    def forward(
        self,
        student: Tensor,  # [B, T, M, C] features, or uint8 [B, T, H, W, 3] frames if there is an encoder
        teacher: Tensor,  # the same, in the view of the teacher
        partners: Tensor,  # [B, T] int64, the frame that each frame is correlated with
        noise: Tensor,  # [B, noise_size] standard normal
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss, its parts as numbers to log, and the masks [B·T, M, N] of the student."""
        clip, loss = student.shape[:2], self.config.loss
        model = self.config.model
        drawn = clip[1] * model.num_semantics * model.num_instances * self.student.dim
        ours, theirs, depth = noise.split([drawn, drawn, noise.shape[1] - 2 * drawn], 1)
        shape = (-1, model.num_semantics, model.num_instances, self.student.dim)
        found, _ = self._group(self.student, student, partners, ours.reshape(shape), depth)
        with torch.no_grad():
            target, features = self._group(self.teacher, teacher, partners, theirs.reshape(shape), None)
            targets = aligned_masks(
                target.masks.unflatten(0, clip), features, loss.transport_eps, loss.transport_iterations, loss.marginals
            )
            valid, teacher_valid = (self.valid(g).unflatten(0, clip) for g in (found, target))
            theirs_projected = self.teacher.head(target.instances).unflatten(0, clip)
        semantic = semantic_alignment(found.masks.unflatten(0, clip), targets)
        overlap = mask_regulariser(found.masks)
        instance = instance_consistency(
            self.student.head(found.instances).unflatten(0, clip),
            theirs_projected,
            valid,
            teacher_valid,
            loss.margin,
            loss.instance_distance,
            loss.same_frame,
        )
        total = loss.semantic_weight * semantic + loss.regulariser_weight * overlap + loss.instance_weight * instance
        numbers = {"semantic": semantic, "overlap": overlap, "instance": instance, "valid": valid.float().mean()}
        return total, {name: value.detach() for name, value in numbers.items()}, found.masks

    def _group(
        self, branch: SmtcBranch, view: Tensor, partners: Tensor, noise: Tensor, depth: Tensor | None
    ) -> tuple[Grouped, Tensor]:
        """Slots and masks of all frames, and the features [B, T, M, C]."""
        features = view
        if branch.encoder is not None:
            factors = None
            if depth is not None and self.depth_size:
                factors = depth_factors(depth.reshape(-1, self.depth_size), self.config.drop_path)
            features = branch.encoder.encode(view.flatten(0, 1), factors).unflatten(0, view.shape[:2])
        # A product with zeros and ones: the gradient of an index would need a sort on a GPU.
        chosen = (partners.unsqueeze(-1) == torch.arange(features.shape[1], device=partners.device)).to(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            others = (chosen @ features.flatten(2)).view_as(features)
        return branch.group(features.flatten(0, 1), others.flatten(0, 1), noise), features

    def valid(
        self, grouped: Grouped, area_threshold: float | None = None, similarity_threshold: float | None = None
    ) -> Tensor:
        """Which instances are valid, [R, N, P] bool. Default thresholds: as in training."""
        loss = self.config.loss
        return valid_instances(
            grouped.masks,
            grouped.semantics,
            grouped.instances,
            self.config.model.mask_threshold,
            loss.area_threshold if area_threshold is None else area_threshold,
            loss.similarity_threshold if similarity_threshold is None else similarity_threshold,
        )

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Move the weights of the teacher towards those of the student; weights that are not trained do not change."""
        pairs = [
            (theirs, ours.detach())
            for (name, ours), theirs in zip(self.student.named_parameters(), self.teacher.parameters(), strict=True)
            if ours.requires_grad and (self.config.teacher.ema_encoder or not name.startswith("encoder."))
        ]
        teacher, student = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(teacher, student, 1 - self.config.teacher.momentum)
