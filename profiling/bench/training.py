"""Training steps of both stages: forward, backward and optimiser on prepared inputs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from slotkernels import use_backend
from slotkernels.slot_attention import SlotAttention, SlotAttentionOutput
from slotkernels.slot_attention.reference import textbook_slot_attention
from torch import Tensor

from interpreter.engine.cuda_graph import EAGER_STEPS
from interpreter.engine.randomness import repeatable
from interpreter.engine.step import TrainingStep
from interpreter.methods.interpreter import video_stage
from interpreter.methods.interpreter.config import Preset, StageName
from profiling.bench.case import OURS, Benchmark, Case, Function, Outputs, close_to
from profiling.bench.merging import one_by_one
from profiling.bench.sinkhorn import geomloss_variants
from profiling.common.setups import Setup, setup

Make = Callable[[], Setup]  # with weights that are the same at each call

MODES: dict[str, dict[str, Any]] = {OURS: {}, f"{OURS} compiled": {"compiled": True}}
CAPTURED = {
    f"{OURS} captured": {"captured": True},
    f"{OURS} compiled and captured": {"compiled": True, "captured": True},
}


def printed(module: SlotAttention) -> None:
    """Make a module compute algorithm 1 as printed, with gradients through all iterations."""

    def forward(inputs: Tensor, slots: Tensor) -> SlotAttentionOutput:
        return SlotAttentionOutput(*textbook_slot_attention(module, inputs, slots, implicit="none"))

    module.forward = forward  # type: ignore[method-assign, assignment]


def libraries(device: torch.device) -> AbstractContextManager[Any]:
    """GeomLoss and scikit-learn in place of the project's ops."""

    def divergence(x: Tensor, y: Tensor, blur: float, scaling: float, diameter: Any) -> Tensor:
        import geomloss

        start = None if diameter == "batch" else diameter
        loss = geomloss.SamplesLoss("sinkhorn", blur=blur, scaling=scaling, diameter=start, backend="tensorized")
        return loss(x.float(), y.float())

    def cluster(slots: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        labels = one_by_one(slots.float())["labels"].to(device)
        return labels, labels.amax(1) + 1

    return mock.patch.multiple(video_stage, sinkhorn_divergence=divergence, cluster_slots=cluster)


def taken(make: Make, device: torch.device, kind: str = OURS, **options: Any) -> Function:
    """A function that takes one training step; its first call builds the model and compiles."""

    def around() -> AbstractContextManager[Any]:
        if kind == "textbook":
            return libraries(device)
        return use_backend("reference") if kind.endswith("reference") else nullcontext()

    @cache
    def step() -> TrainingStep:
        task = make().task
        if kind == "textbook":
            attention = task.model.get_submodule("slot_attention")
            assert isinstance(attention, SlotAttention)
            printed(attention)
        taker = TrainingStep(task, task.optim, device, **options)
        taker.start(0, {})
        return taker

    def run(*batch: Tensor) -> Outputs:
        with around():
            first = step.cache_info().currsize == 0
            step().run(batch)
            sums = step().sums  # of the first step, then of several; only the first is compared
            # The textbook differentiates through all iterations, so the norm of its gradients is not compared.
            checked = ("loss", "effective_slots", "attention_entropy", *(["grad_norm"] if kind != "textbook" else []))
            outputs = {name: sums[name].clone() for name in checked}
            if first:
                for _ in range(EAGER_STEPS + 1 if options.get("captured") else 0):
                    step().run(batch)
        return outputs

    return run


def cases(stage: StageName, device_name: str) -> Iterator[Case]:
    """The step of one stage: the demo's on a CPU, the paper's on a GPU."""
    device = torch.device(device_name)
    repeatable(device)
    preset: Preset = "ytvis19" if device.type == "cuda" else "demo"
    stage_setup = setup(stage, preset, device)
    precision, batch_size = stage_setup.task.optim.precision, stage_setup.task.optim.batch_size

    def make() -> Setup:
        return setup(stage, preset, device)

    def exact() -> Setup:
        """In float32 the paper's batch does not fit into 80 GB at once."""
        return setup(stage, preset, device, precision="fp32", micro_batch=max(1, batch_size // 4))

    variants: dict[str, Function] = {}
    left_out = {} if stage == "image" else geomloss_variants("tensorized")[1]
    if left_out:
        left_out = {"textbook": left_out["GeomLoss"]}
    else:
        variants["textbook"] = taken(make, device, "textbook")
    variants[f"{OURS} reference"] = taken(make, device, f"{OURS} reference")
    modes = MODES | CAPTURED if device.type == "cuda" else MODES
    variants |= {name: taken(make, device, **options) for name, options in modes.items()}

    def oracle(*batch: Tensor) -> Outputs:
        return taken(exact, device, f"{OURS} reference")(*(t.float() for t in batch))

    yield Case(
        shape={name: list(shape) for name, shape in zip(("inputs", "initial slots"), stage_setup.shapes, strict=True)},
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        inputs=stage_setup.inputs,
        variants=variants,
        judge=close_to(oracle, 0.03),
        bytes=0,
        flops=None,
        waits=tuple(variants),  # captured ones hold a graph of their own
        left_out=tuple(left_out.items()),
        apart=device.type == "cuda",
    )


def _training(stage: StageName, what: str, textbook: str) -> Benchmark:
    return Benchmark(
        f"train_{stage}",
        f"one step of the {stage} stage, forward, backward and AdamW: {what}",
        {
            "textbook": textbook,
            f"{OURS} reference": "the ops in plain PyTorch",
            f"{OURS} compiled": "`--compile`: forward and backward under `torch.compile(fullgraph=True)`",
            f"{OURS} captured": "the step as one CUDA graph",
            f"{OURS} compiled and captured": "both",
        },
        partial(cases, stage),
    )


TRAIN_IMAGE = _training(
    "image",
    "features of single frames are there",
    "the same model with algorithm 1 of Locatello et al. and gradients through all iterations",
)
TRAIN_VIDEO = _training(
    "video",
    "image slots of clips are there",
    "the same model with algorithm 1 of Locatello et al., gradients through all iterations, GeomLoss (tensorized) and "
    "a loop over scikit-learn",
)
