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
from interpreter.methods.interpreter.config import Preset, StageName, VideoModelConfig
from profiling.bench.case import OURS, Benchmark, Case, Function, Outputs, close_to
from profiling.bench.merging import one_by_one
from profiling.bench.sinkhorn import geomloss_variants
from profiling.bench.textbook_transformer import use_textbook_transformers
from profiling.common.setups import Setup, setup

Make = Callable[[], Setup]  # with weights that are the same at each call

MODES: dict[str, dict[str, Any]] = {OURS: {}, f"{OURS} compiled": {"compiled": True}}
CAPTURED = {
    f"{OURS} captured": {"captured": True},
    f"{OURS} compiled and captured": {"compiled": True, "captured": True},
}


def printed(module: SlotAttention) -> None:
    """Make a module compute algorithm 1 as printed, with gradients through all iterations."""

    def forward(inputs: Tensor, slots: Tensor, iterations: None = None, sharpness: float = 1.0) -> SlotAttentionOutput:
        assert (iterations, sharpness) == (None, 1.0), "training takes neither"
        return SlotAttentionOutput(*textbook_slot_attention(module, inputs, slots, implicit="none"))

    module.forward = forward  # type: ignore[method-assign, assignment]


def libraries(device: torch.device, diameter: float | None) -> AbstractContextManager[Any]:
    """GeomLoss and scikit-learn instead of the project's ops; GeomLoss starts from ``diameter`` if you give one."""

    def divergence(x: Tensor, y: Tensor, blur: float, scaling: float, **_: Any) -> Tensor:
        import geomloss

        loss = geomloss.SamplesLoss("sinkhorn", blur=blur, scaling=scaling, diameter=diameter, backend="tensorized")
        return loss(x.float(), y.float())

    def cluster(slots: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        labels = clustered(slots.float(), threshold)
        return labels, labels.amax(1) + 1

    return mock.patch.multiple(video_stage, sinkhorn_divergence=divergence, cluster_slots=cluster)


@torch.library.custom_op("profiling::cluster_one_by_one", mutates_args=())
def clustered(slots: Tensor, threshold: float) -> Tensor:
    """Labels [B, K] of scikit-learn, as an op that a compiled graph calls."""
    return one_by_one(slots, threshold)["labels"].to(slots.device)


@clustered.register_fake
def _(slots: Tensor, threshold: float) -> Tensor:
    return slots.new_empty(slots.shape[:2], dtype=torch.int64)


def box(points: Tensor) -> float:
    """Diagonal of the box around all points [..., D], where GeomLoss starts."""
    points = points.flatten(0, -2)
    return (points.amax(0) - points.amin(0)).norm().item()


def taken(make: Make, device: torch.device, kind: str = OURS, **options: Any) -> Function:
    """A function that takes one training step; its first call builds the model and compiles."""
    textbook, diameter = kind == "textbook", None

    def around() -> AbstractContextManager[Any]:
        if textbook:
            return libraries(device, diameter)
        return use_backend("reference") if kind.endswith("reference") else nullcontext()

    @cache
    def step() -> TrainingStep:
        task = make().task
        if textbook:
            attention = task.model.get_submodule("slot_attention")
            assert isinstance(attention, SlotAttention)
            printed(attention)
            use_textbook_transformers(task.model)
        taker = TrainingStep(task, task.optim, device, **options)
        taker.start(0, {})
        return taker

    def run(*batch: Tensor) -> Outputs:
        nonlocal diameter
        first = step.cache_info().currsize == 0
        if first and textbook and options.get("compiled"):
            diameter = box(batch[0])  # computing it would end the graph, because the number of steps depends on it
        with around():
            step().run(batch)
            sums = step().sums  # of the first step, then of several; only the first is compared
            # The textbook differentiates through all iterations, so the norm of its gradients is not compared.
            checked = ("loss", "effective_slots", "attention_entropy", *(["grad_norm"] if not textbook else []))
            outputs = {name: sums[name].clone() for name in checked}
            if first:
                for _ in range(EAGER_STEPS + 1 if options.get("captured") else 0):
                    step().run(batch)
        return outputs

    return run


def cases(stage: StageName, device_name: str) -> Iterator[Case]:
    """A step at the paper's sizes on a GPU, at the demo's sizes on a CPU. A CPU also gets the demo's own video stage,
    which has no transformer."""
    if device_name == "cuda":
        yield case(stage, device_name, "ytvis19")
    elif stage == "image":
        yield case(stage, device_name, "demo")
    else:
        yield case(stage, device_name, "demo", VideoModelConfig())
        yield case(stage, device_name, "demo")


def case(stage: StageName, device_name: str, preset: Preset, video_model: VideoModelConfig | None = None) -> Case:
    """The step of one stage at a preset's sizes, the video stage with another model if one is given."""
    device = torch.device(device_name)
    repeatable(device)
    make = partial(setup, stage, preset, device, video_model=video_model)
    stage_setup = make()
    model, optim = stage_setup.task.model, stage_setup.task.optim

    def exact() -> Setup:
        """In float32 the paper's batch does not fit into 80 GB at once."""
        return make(precision="fp32", micro_batch=max(1, optim.batch_size // 4))

    variants: dict[str, Function] = {}
    transports = isinstance(model, video_stage.VideoStage) and model.config.decoder == "transformer"
    left_out = geomloss_variants("tensorized")[1] if transports else {}
    if left_out:
        left_out = dict.fromkeys(("textbook", "textbook compiled"), left_out["GeomLoss"])
    else:
        variants["textbook"] = taken(make, device, "textbook")
        variants["textbook compiled"] = taken(make, device, "textbook", compiled=True)
    variants[f"{OURS} reference"] = taken(make, device, f"{OURS} reference")
    modes = MODES | CAPTURED if device.type == "cuda" else MODES
    variants |= {name: taken(make, device, **options) for name, options in modes.items()}

    def oracle(*batch: Tensor) -> Outputs:
        return taken(exact, device, f"{OURS} reference")(*(t.float() for t in batch))

    shape: dict[str, Any] = dict(zip(("inputs", "initial slots"), map(list, stage_setup.shapes), strict=True))
    if stage == "video":
        shape["decoder"] = model.config.decoder  # type: ignore[union-attr]
    return Case(
        shape=shape,
        dtype=torch.bfloat16 if optim.precision == "bf16" else torch.float32,
        inputs=stage_setup.inputs,
        variants=variants,
        judge=close_to(oracle, 0.03),
        bytes=0,
        flops=None,
        waits=tuple(variants),  # captured variants keep their own graph
        left_out=tuple(left_out.items()),
        apart=device.type == "cuda",
    )


def _training(stage: StageName, what: str, textbook: str, compiled: str) -> Benchmark:
    return Benchmark(
        f"train_{stage}",
        f"one step of the {stage} stage: forward, backward and AdamW. {what}",
        {
            "textbook": textbook,
            "textbook compiled": compiled,
            f"{OURS} reference": "the ops in plain PyTorch",
            f"{OURS} compiled": "`--compile`: forward and backward under `torch.compile(fullgraph=True)`",
            f"{OURS} captured": "the step as one CUDA graph",
            f"{OURS} compiled and captured": "with `--compile`, and the step as one CUDA graph",
        },
        partial(cases, stage),
    )


TRAIN_IMAGE = _training(
    "image",
    "The features of the frames are computed beforehand",
    "the same model with algorithm 1 of Locatello et al., gradients through all iterations, and transformers that "
    "share no work among samples",
    "the same under `torch.compile(fullgraph=True)`",
)
TRAIN_VIDEO = _training(
    "video",
    "The image slots of the clips are computed beforehand",
    "the same model with algorithm 1 of Locatello et al., gradients through all iterations, transformers that share no "
    "work among samples, GeomLoss (tensorized) and a loop over scikit-learn",
    "the same under `torch.compile(fullgraph=True)`. GeomLoss gets the diameter of the first batch, so that its "
    "number of steps is fixed. The graph calls scikit-learn, which is not compiled",
)
