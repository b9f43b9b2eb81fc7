"""Losses of SMTC (Qian et al. 2023): masks and instances of a clip's frames have to agree with those of a teacher."""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from slotkernels import match_slots, transport_targets
from torch import Tensor

from interpreter.models.gather import sum_over_ranks, world_size

Marginals = Literal["uniform", "norm"]
Distance = Literal["cosine", "l2"]
EPS = 1e-8  # of probabilities under a logarithm or a norm
SMALLEST_SQUARE = 1e-12  # of a distance: a square root has no gradient at 0


def frame_pairs(frames: int) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) of different frames, i < j.

    >>> list(frame_pairs(3))
    [(0, 1), (0, 2), (1, 2)]
    """
    return ((i, j) for i in range(frames) for j in range(i + 1, frames))


@torch.no_grad()
def aligned_masks(
    masks: Tensor,  # [B, T, M, N]
    features: Tensor,  # [B, T, M, C]
    eps: float = 0.05,
    iterations: int = 3,
    marginals: Marginals = "uniform",
) -> Tensor:
    """Carry the masks of all other frames of a clip to each frame, by optimal transport between their patches.

    For frames i and j, Π_ij is the entropic transport plan for the cosine distance of their features. Frame i gets
    ``Σ_j Π_ij masks_j``. Each plan sums to 1, so the result sums to T - 1 over patches and slots.

    Args:
        masks: the teacher's masks; each row over N sums to 1.
        features: features of the teacher's encoder; this function normalises them.
        eps: temperature of the plans.
        iterations: number of iterations of Sinkhorn's algorithm; the last one ends with the patches of frame j.
        marginals: weights of the patches. "uniform": all equal, as in the paper; "norm": the sum of the absolute values
            of a patch's normalised features, as in the public code.

    Returns:
        [B, T, M, N], without a gradient.

    Example:
        Two patches change places between two frames, and their masks move with them:

        >>> features, masks = torch.eye(2), torch.eye(2)
        >>> clip = torch.stack([features, features.flip(0)])[None], torch.stack([masks, masks.flip(0)])[None]
        >>> (2 * aligned_masks(clip[1], clip[0])).round().tolist()
        [[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]]
    """
    frames = masks.shape[1]
    with torch.autocast(masks.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        directions = F.normalize(features.to(dtype), dim=-1)
        masks = masks.to(dtype)
        weights = None
        if marginals == "norm":
            magnitudes = directions.abs().sum(-1)  # [B, T, M]
            weights = magnitudes / magnitudes.sum(-1, keepdim=True)
        # A GPU solves the problems of all pairs at once. A CPU solves a few at a time, which needs no copies of the
        # frames.
        together = list(frame_pairs(frames))
        calls = [together] if masks.device.type == "cuda" else [[pair] for pair in together]
        sums = torch.zeros(masks.shape, dtype=dtype, device=masks.device)
        for pairs in calls:
            first, second = zip(*pairs, strict=True)
            carried = transport_targets(
                _frames(directions, first),
                _frames(directions, second),
                _frames(masks, second),
                _frames(masks, first),
                eps=eps,
                iterations=iterations,
                a=None if weights is None else _frames(weights, first),
                b=None if weights is None else _frames(weights, second),
            )
            for numbers, targets in zip((first, second), carried, strict=True):
                assert targets is not None
                for number, target in zip(numbers, targets.unflatten(0, (len(pairs), -1)), strict=True):
                    sums[:, number] += target
        return sums


def _frames(clips: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """The frames with these numbers, [pairs·B, M, ...], out of [B, T, M, ...]. One frame is a view, several a copy."""
    # Not indexed by a tensor, which would be copied from the host at each step.
    parts = [clips[:, number] for number in numbers]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def semantic_alignment(masks: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of masks with the teacher's masks of the other frames, carried to this one (SMTC, equation 9).

    Args:
        masks: [B, T, M, N], each row over N sums to 1.
        targets: [B, T, M, N], the result of :func:`aligned_masks`.

    Returns:
        The mean over samples and ordered pairs of frames, a scalar.

    Example:
        >>> masks = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(1, 2, 2, 2)  # two equal frames
        >>> abs(semantic_alignment(masks, masks / 2)) < 1e-6
        tensor(True)
    """
    samples, frames = masks.shape[:2]
    # As published, a small number is added before the logarithm; a probability of 1 then has a loss of -1e-8.
    return -(targets * (masks.to(targets.dtype) + EPS).log()).sum() / (samples * frames * (frames - 1))


def mask_regulariser(masks: Tensor) -> Tensor:
    """Mean cosine similarity of the masks of different slots (SMTC, equation 10): low if they share no patch.

    Args:
        masks: [..., M, N], at least 0.

    Returns:
        A scalar from 0 to 1; 0 for a single slot.

    Example:
        >>> mask_regulariser(torch.eye(3)[None]) < 1e-6, mask_regulariser(torch.full((1, 4, 3), 1 / 3))
        (tensor(True), tensor(1.))
    """
    slots = masks.shape[-1]
    with torch.autocast(masks.device.type, enabled=False):
        directions = F.normalize(masks + EPS, dim=-2)
        similarity = directions.mT @ directions  # [..., N, N]
        others = ~torch.eye(slots, dtype=torch.bool, device=masks.device)
        return (similarity * others).sum((-2, -1)).mean() / max(1, slots * (slots - 1))


@torch.no_grad()
def valid_instances(
    masks: Tensor,  # [..., M, N]
    semantics: Tensor,  # [..., N, D]
    instances: Tensor,  # [..., N, P, D]
    mask_threshold: float,
    area_threshold: float,
    similarity_threshold: float,
) -> Tensor:
    """Mask of the valid instances (SMTC, equation 11).

    An instance is valid if its semantic covers enough of the frame and their slots are similar enough.

    Args:
        masks: probability of each semantic at each patch.
        semantics: slots of the semantics.
        instances: slots of the instances.
        mask_threshold: τ. A patch belongs to a semantic if its probability is above this.
        area_threshold: τ1. A semantic has to cover more than this share of the patches.
        similarity_threshold: τ2. The cosine similarity of an instance and its semantic has to be above this.

    Returns:
        [..., N, P] bool.

    Example:
        >>> masks = torch.tensor([[0.9, 0.1], [0.8, 0.2]])  # the first semantic has both patches
        >>> semantics = torch.eye(2)
        >>> valid_instances(masks, semantics, semantics.expand(2, 2, 2), 0.5, 0.2, 0.5).tolist()
        [[True, False], [False, False]]
    """
    area = (masks > mask_threshold).float().mean(-2)  # [..., N]
    similarity = F.cosine_similarity(semantics.unsqueeze(-2).float(), instances.float(), dim=-1)
    return (area > area_threshold).unsqueeze(-1) & (similarity > similarity_threshold)


def instance_consistency(
    instances: Tensor,  # [B, T, N, P, D]
    teacher: Tensor,  # [B, T, N, P, D]
    valid: Tensor,  # [B, T, N, P] bool
    teacher_valid: Tensor,  # [B, T, N, P] bool
    margin: float = 0.5,
    distance: Distance = "cosine",
    same_frame: bool = False,
) -> Tensor:
    """Loss of instances across frames (SMTC, equation 12).

    It pulls each valid instance towards its counterpart in the teacher's other frames, and pushes it away from the
    other instances there. Counterparts are matched one to one within a semantic, by cosine similarity.

    Args:
        instances: vectors of the student's instances; this function normalises them.
        teacher: vectors of the teacher's instances, likewise.
        valid: mask from :func:`valid_instances`. Invalid instances do not count.
        teacher_valid: the teacher's mask. Instances are not pulled towards an invalid counterpart.
        margin: other instances are penalised if they are nearer than this. With the distance "cosine" it is a
            similarity, above which they are penalised; with "l2" a distance, below which they are.
        distance: "cosine" as in the public code, or "l2" as in the paper, both of normalised vectors.
        same_frame: count the teacher's view of the same frame as another frame, as in the public code.

    Returns:
        A scalar: the sum over valid instances of all pairs of frames, divided by their number in all processes of a
        job, times the number of processes. Its average over the processes is the mean, and so is that of the gradients.

    Example:
        >>> slots = torch.eye(2).expand(1, 2, 1, 2, 2)  # one semantic of two orthogonal instances, in two equal frames
        >>> there = torch.ones(1, 2, 1, 2, dtype=torch.bool)
        >>> instance_consistency(slots, slots, there, there).item()
        -1.0
    """
    frames, number = instances.shape[1], instances.shape[3]
    with torch.autocast(instances.device.type, enabled=False):
        dtype = torch.promote_types(instances.dtype, torch.float32)
        instances, teacher = (F.normalize(t.to(dtype), dim=-1) for t in (instances, teacher.detach()))
        ours, theirs = instances.movedim(2, 1).flatten(2, 3), teacher.movedim(2, 1).flatten(2, 3)  # [B, N, T·P, D]
        cosine = (ours @ theirs.mT).unflatten(2, (frames, number)).unflatten(4, (frames, number))
        cosine = cosine.movedim(4, 3).movedim(1, 3)  # [B, T, T, N, P, P]: frames and instances, ours before theirs
        matched = F.one_hot(match_slots(cosine.detach()), number).bool()
        if distance == "cosine":
            near, far = -cosine, F.relu(cosine - margin)
        else:
            apart = (2 - 2 * cosine).clamp_min(SMALLEST_SQUARE).sqrt()
            near, far = apart, F.relu(margin - apart)
        counterpart_valid = (matched & teacher_valid[:, None, :, :, None]).any(-1)  # [B, T, T, N, P]
        near = (near * matched).sum(-1) * counterpart_valid
        far = (far * ~matched).sum(-1) / max(1, number - 1)
        counted = valid[:, :, None].expand_as(near)
        if not same_frame:
            counted = counted & ~torch.eye(frames, dtype=torch.bool, device=valid.device)[:, :, None, None]
        count = sum_over_ranks(counted.sum()).clamp_min(1).to(dtype)
        return ((near + far) * counted).sum() * (world_size() / count)
