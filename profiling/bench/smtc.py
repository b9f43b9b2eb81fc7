"""SMTC's training step without the backbones: this project's model, compared with the published computation.

A step is forward, backward, AdamW and the teacher's moving average. The features imitate clips whose frames show the
same few objects, so that some semantics are large enough for instances to count.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interpreter.methods.smtc import SmtcStage
from interpreter.methods.smtc.config import PRESETS
from interpreter.methods.smtc.model import Smtc
from profiling.bench.case import OURS, Benchmark, Case, Outputs, close_to
from profiling.bench.published_smtc import PublishedSmtc

GRID, FRAMES, FEATURES = (16, 16), 4, 384  # ViT-S/16 at 256 × 256
CONFIG = PRESETS["ytvos"]
OBJECTS = 4
SHARPNESS = 3.0  # factor of the initial queries
PARTS = ("semantic", "overlap", "instance")
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}

Compute = Callable[..., Any]  # of the inputs: the loss, its parts, and more
Owner = Smtc | PublishedSmtc


def clips(batch: int, device: str) -> tuple[Tensor, ...]:
    """Features of student and teacher, partners and noise: patches show one of a clip's objects each, and differ a bit
    between the views."""
    patches = GRID[0] * GRID[1]
    objects = torch.randn(batch, OBJECTS, FEATURES, device=device)
    shown = torch.randint(OBJECTS, (batch, FRAMES, patches), device=device)
    of_patches = objects[torch.arange(batch, device=device)[:, None, None], shown]
    views = (of_patches + 0.3 * torch.randn_like(of_patches) for _ in range(2))
    partners = torch.arange(FRAMES, device=device).roll(1).expand(batch, -1).contiguous()
    numbers = 2 * FRAMES * CONFIG.model.num_semantics * CONFIG.model.num_instances * FEATURES
    return *views, partners, torch.randn(batch, numbers, device=device)


def published(model: Any, student: Tensor, teacher: Tensor, partners: Tensor, noise: Tensor) -> Any:
    """The published computation of the same inputs."""
    shape = (len(noise), FRAMES, CONFIG.model.num_semantics, CONFIG.model.num_instances, FEATURES)
    return model(student, teacher, partners, *(part.reshape(shape) for part in noise.chunk(2, 1)))


def gradients(compute: Compute, owner: Owner, dtype: torch.dtype) -> Callable[..., Outputs]:
    """Forward and backward: the losses, and all gradients of the student as one vector."""

    def run(*inputs: Tensor) -> Outputs:
        for parameter in owner.student.parameters():
            parameter.grad = None
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, parts = compute(*inputs)[:2]
        loss.backward()  # and not autograd.grad, which the counter of operations does not support
        outputs = {"loss": loss.detach()} | {name: parts[name].detach() for name in PARTS}
        named = sorted(owner.student.named_parameters())
        found = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named]  # instances give σ none
        return outputs | {"gradient": torch.cat([grad.flatten() for grad in found])}

    return run


def step(compute: Compute, owner: Owner, dtype: torch.dtype) -> Callable[..., Outputs]:
    """A training step. It changes the weights, so only the results of the first call belong to the initial weights."""
    both_ways, weights = gradients(compute, owner, dtype), list(owner.student.parameters())
    optimiser = torch.optim.AdamW(
        weights, CONFIG.optim.peak_lr, weight_decay=CONFIG.optim.weight_decay, capturable=weights[0].is_cuda
    )

    def run(*inputs: Tensor) -> Outputs:
        outputs = both_ways(*inputs)
        optimiser.step()
        owner.update_teacher()
        return outputs

    return run


def cases(device: str) -> Iterator[Case]:
    """4 clips in float32 on a CPU, 32 in bfloat16 on a GPU: the batch of a GPU in the public code."""
    dtype, batch = (torch.bfloat16, 32) if device == "cuda" else (torch.float32, 4)
    torch.manual_seed(0)
    model = Smtc(CONFIG, FEATURES, GRID).to(device)
    with torch.no_grad():  # as after some training: the teacher has other weights, and semantics differ
        model.student.slot_attention.to_q.weight.mul_(SHARPNESS)
        for own, student in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            own.copy_(student + 0.05 * student.std() * torch.randn_like(student))

    def ours(compiled: bool) -> Callable[..., Outputs]:
        owner = copy.deepcopy(model)
        loss = partial(SmtcStage().loss, owner)
        return step(torch.compile(loss, fullgraph=True) if compiled else loss, owner, dtype)

    def theirs(compiled: bool) -> Callable[..., Outputs]:
        owner = PublishedSmtc.of(model)
        return step(partial(published, torch.compile(owner) if compiled else owner), owner, dtype)

    exact = PublishedSmtc.of(model).double()
    config = CONFIG.model
    yield Case(
        shape={"B": batch, "T": FRAMES, "M": GRID[0] * GRID[1], "C": FEATURES, "D": FEATURES}
        | {"N": config.num_semantics, "P": config.num_instances},
        dtype=dtype,
        inputs=partial(clips, batch, device),
        variants={
            "published": theirs(compiled=False),
            "published compiled": theirs(compiled=True),
            OURS: ours(compiled=False),
            f"{OURS} compiled": ours(compiled=True),
        },
        # A token or an instance at a threshold may be on its other side in float64, so the norm of gradients is judged.
        judge=close_to(gradients(partial(published, exact), exact, torch.float64), TOLERANCES[dtype], ("gradient",)),
        bytes=0,
        flops=None,
        waits=("published", "published compiled"),
    )


SMTC_STEP = Benchmark(
    "smtc_step",
    "SMTC's training step without the backbones: forward, backward, AdamW and the teacher's moving average",
    {
        "published": "as published: correlation maps [M, M], slot attention written out, a kernel and a transport plan "
        "[M, M] and a loss [N, M, M] for each of 12 ordered pairs of frames, SciPy's assignment for each semantic",
        "published compiled": "the same under `torch.compile`, except for SciPy",
        f"{OURS} compiled": "the model and its losses under `torch.compile(fullgraph=True)`",
    },
    cases,
)
