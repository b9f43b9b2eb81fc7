"""SMTC's alignment loss between all ordered pairs of frames of a clip, with targets by transport, against the published
computation: a plan for each pair, and the cross entropy of every pair of tokens, [B, N, M, M].
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, permutations

import torch
import torch.nn.functional as F
from slotkernels import transport_targets
from slotkernels.transport_targets import bytes_moved, flops
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Function, Outputs, close_to

FRAMES, LABELS, DIM = 4, 16, 384  # of a clip; SMTC's semantics; width of ViT-S
EPS, ITERATIONS, TINY = 0.05, 3, 1e-8
PAIRS = list(permutations(range(FRAMES), 2))  # ordered: 12
UNORDERED = list(combinations(range(FRAMES), 2))  # 6

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def published(features: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over samples and ordered pairs of Σ_uv Π[u, v] times the cross entropy of u and v.

    Args:
        features: [B, T, M, C], the teacher's, unit vectors.
        teacher: [B, T, N, M], the teacher's masks, a softmax over N.
        student: [B, T, N, M], the student's.
    """
    loss = features.new_zeros(())
    for i, j in PAIRS:
        with torch.no_grad():
            cost = 1 - features[:, i] @ features[:, j].mT  # [B, M, M]
            kernel = torch.exp(-cost / EPS)
            marginal = features.new_full(kernel.shape[:2], 1 / kernel.shape[1]).unsqueeze(2)
            beta = torch.ones_like(marginal)
            for _ in range(ITERATIONS):
                alpha = marginal / (kernel @ beta)
                beta = marginal / (kernel.mT @ alpha)
            plan = alpha * kernel * beta.mT
        pairs = -teacher[:, j].unsqueeze(2) * (student[:, i] + TINY).log().unsqueeze(3)  # [B, N, M, M]
        loss = loss + (plan.unsqueeze(1) * pairs).sum((1, 2, 3)).mean() / len(PAIRS)
    return loss


def by_targets(features: Tensor, teacher: Tensor, student: Tensor, backend: str = "auto") -> Tensor:
    """The same from labels that the plans transport: 6 pairs in both directions, in one call on a GPU. A CPU solves
    only a few problems at a time, so it gets one call per pair, with views of the frames instead of copies.
    """
    labels = teacher.mT  # [B, T, M, N]
    sums = torch.zeros_like(labels, memory_format=torch.contiguous_format)
    for pairs in [UNORDERED] if features.is_cuda else [[pair] for pair in UNORDERED]:
        first, second = ([pair[side] for pair in pairs] for side in (0, 1))
        x, y, of_x, of_y = (_frames(t, side) for t in (features, labels) for side in (first, second))
        targets = transport_targets(x, y, of_y, of_x, eps=EPS, iterations=ITERATIONS, backend=backend)
        for side, target in zip((first, second), targets, strict=True):
            assert target is not None
            for number, of_frame in zip(side, target.unflatten(0, (len(side), -1)), strict=True):
                sums[:, number] += of_frame
    return -(sums * (student + TINY).log().mT).sum() / (len(PAIRS) * features.shape[0])


def _frames(clips: Tensor, numbers: list[int]) -> Tensor:
    """Frames of these numbers [frames · B, M, …] of [B, T, M, …]: a view of one, a copy of several."""
    parts = [clips[:, number] for number in numbers]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def step(loss: Loss) -> Function:
    """The loss and its gradient with respect to the student's masks."""

    def run(features: Tensor, teacher: Tensor, student: Tensor) -> Outputs:
        leaf = student.detach().requires_grad_()
        value = loss(features, teacher, leaf)
        return {"loss": value.detach(), "gradient": torch.autograd.grad(value, leaf)[0]}

    return run


def make(batch: int, tokens: int, device: str) -> tuple[Tensor, ...]:
    """Features that vary slowly from frame to frame, and masks of both branches."""
    scene = torch.randn(batch, 1, tokens, DIM, device=device)
    features = F.normalize(scene + torch.randn(batch, FRAMES, tokens, DIM, device=device), dim=3)
    masks = (torch.randn(batch, FRAMES, LABELS, tokens, device=device).softmax(2) for _ in range(2))
    return features, *masks


def cases(device: str) -> Iterator[Case]:
    """256 tokens (256² pixels) and 864 (336 x 504): clips of 4 frames, on a GPU as many as in a step of SMTC."""
    for tokens, batch in ((256, 128), (864, 16)) if device == "cuda" else ((256, 4), (864, 1)):
        problems = batch * len(UNORDERED)
        variants: dict[str, Loss] = {
            "published": published,
            "published compiled": torch.compile(published),
            f"{OURS} reference": partial(by_targets, backend="reference"),
            OURS: by_targets,
        }
        if device == "cpu":
            del variants[f"{OURS} reference"]  # the backend that serves a CPU
        sizes = (problems, tokens, tokens, DIM, LABELS)
        yield Case(
            shape={"B": batch, "T": FRAMES, "M": tokens, "N": LABELS, "C": DIM},
            dtype=torch.float32,
            inputs=partial(make, batch, tokens, device),
            variants={name: step(loss) for name, loss in variants.items()},
            judge=close_to(step(by_targets), 1e-4),
            bytes=bytes_moved(*sizes),
            flops=flops(*sizes, iterations=ITERATIONS),
            apart=device == "cuda",
        )


TRANSPORT_TARGETS = Benchmark(
    "transport_targets",
    f"SMTC's alignment loss between the {len(PAIRS)} ordered pairs of frames of a clip of {FRAMES}, with the gradient "
    "of the student's masks",
    {
        "published": "in PyTorch as published: a plan for each ordered pair, the cross entropy of each pair of tokens",
        "published compiled": "the same under `torch.compile`",
        f"{OURS} reference": "the op in plain PyTorch",
    },
    cases,
)
