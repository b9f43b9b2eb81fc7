"""SOLV's training step without the backbone: this project's model, compared with the published computation.

Both compute gradients of all parameters, including the coordinates of the patches, without dropout.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interpreter.methods.solv.config import SolvModelConfig
from interpreter.methods.solv.model import Merged, Solv
from profiling.bench.case import OURS, Benchmark, Case, Judge, Outputs, close_to
from profiling.bench.published_solv import PublishedSolv

GRID, KEPT, FRAMES, FEATURES = (24, 36), 432, 5, 768  # YouTube-VIS: DINOv2 ViT-B/14 at 336 × 504, half of the tokens
CONFIG = SolvModelConfig(dropout=0.0, learn_grid=True)

Compute = Callable[..., tuple[Tensor, Outputs]]  # of the inputs: what is differentiated, and what is compared


def bind(model: Solv, dropped: Tensor, kept: Tensor, present: Tensor, merges: Tensor) -> Merged:
    """From features to merged slots and their places, as in the forward pass of the model."""
    places = model.places()[kept]
    slots, attention = model.bind(dropped.flatten(0, 1), places.flatten(0, 1))
    slots = model.temporal(slots.unflatten(0, present.shape), present)
    labels = torch.where(merges[:, None], model.labels(slots), torch.arange(slots.shape[1], device=slots.device))
    centre = present.shape[1] // 2
    return model.merged(slots, attention.unflatten(0, present.shape)[:, centre], places[:, centre], labels)


def binding(function: Any) -> Compute:
    """Binding and merging: the product of slots, positions and scales with the last input."""

    def compute(
        dropped: Tensor, _: Tensor, kept: Tensor, present: Tensor, merges: Tensor, grad: Tensor
    ) -> tuple[Tensor, Outputs]:
        merged = function(dropped, kept, present, merges)
        valid = merged.valid.unsqueeze(-1)  # the rest is padding
        found = {name: getattr(merged, name).where(valid, 0) for name in ("slots", "positions", "scales")}
        loss = (torch.cat([*found.values()], -1) * grad).sum()
        return loss, {name: tensor.detach() for name, tensor in found.items()}

    return compute


def whole(function: Any) -> Compute:
    """The whole step: the mean squared error of the features of the frame in the centre."""

    def compute(*inputs: Tensor) -> tuple[Tensor, Outputs]:
        loss, masks = function(*inputs[:-1])[:2]
        return loss, {"loss": loss.detach(), "masks": masks.detach()}

    return compute


def step(compute: Compute, owner: nn.Module, model: Solv, dtype: torch.dtype) -> Callable[..., Outputs]:
    """Forward, and backward to all parameters of ``owner``, whose gradients get the names of those of ``model``."""

    def run(*inputs: Tensor) -> Outputs:
        for parameter in owner.parameters():
            parameter.grad = None
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, outputs = compute(*inputs)
        loss.backward()  # and not autograd.grad, which the counter of operations does not support
        if isinstance(owner, PublishedSolv):
            gradients = owner.gradients_like(model)
        else:
            gradients = {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}
        gradients.pop("decoder.to_alpha.bias", None)  # 0 but for rounding: it is a part of all numbers of a softmax
        return outputs | {f"gradient of {name}": grad for name, grad in gradients.items()}

    return run


def sample_by_sample(run: Callable[..., Outputs], sums: bool) -> Callable[..., Outputs]:
    """The same, one sample at a time, to need less memory; losses are means over samples unless ``sums``."""

    def total(*inputs: Tensor) -> Outputs:
        parts = [run(*part) for part in zip(*(t.split(1) for t in inputs), strict=True)]
        joined = {}
        for name in parts[0]:
            values = [part[name] for part in parts]
            if name != "loss" and not name.startswith("gradient"):
                joined[name] = torch.cat(values)
            else:
                joined[name] = torch.stack(values).sum(0) / (1 if sums else len(parts))
        return joined

    return total


def together(outputs: Outputs) -> Outputs:
    """The same with all gradients as one vector."""
    gradients = [tensor.flatten() for name, tensor in sorted(outputs.items()) if name.startswith("gradient")]
    others = {name: tensor for name, tensor in outputs.items() if not name.startswith("gradient")}
    return others | {"gradient": torch.cat(gradients)}


def judge_of(oracle: Callable[..., Outputs], dtype: torch.dtype) -> Callable[..., Judge]:
    """A judge of each output in float32; of all gradients together in bfloat16."""
    # A hidden number near 0 may have another sign in float64, which changes single gradients, so norms are judged.
    if dtype == torch.float32:
        return close_to(oracle, 1e-3, norm=("gradient",))

    # In bfloat16, a third of the gradient of some small parameters (sums over all tokens) is rounding, in all variants.
    def judge(*inputs: Tensor) -> Judge:
        close = close_to(lambda *exact: together(oracle(*exact)), 5e-2, norm=("gradient",))(*inputs)
        return lambda outputs: close(together(outputs))

    return judge


def cases(only_binding: bool, device: str) -> Iterator[Case]:
    """8 windows in float32 on a CPU, 48 in bfloat16 on a GPU: the batch of the paper."""
    dtype, batch = (torch.bfloat16, 48) if device == "cuda" else (torch.float32, 8)
    torch.manual_seed(0)
    model = Solv(CONFIG, FEATURES, GRID, FRAMES)
    distinct = torch.randn(CONFIG.num_slots - 3, CONFIG.dim)  # three pairs of slots are alike and merge, five are left
    alike = distinct[:3] + 0.05 * torch.randn(3, CONFIG.dim)
    model.slot_attention.initial_slots.data = torch.cat([distinct, alike])
    model.to(device)
    published = PublishedSolv.of(model)
    exact = PublishedSolv.of(model).double()
    forms: dict[str, Any]
    if only_binding:
        forms = {"published": published.bind, OURS: partial(bind, model), "exact": exact.bind}
    else:
        forms = {"published": published, OURS: model, "exact": exact}
    form = binding if only_binding else whole

    def inputs() -> tuple[Tensor, ...]:
        patches = GRID[0] * GRID[1]
        features = torch.randn(batch, FRAMES, patches, FEATURES, device=device)
        kept = torch.rand(batch, FRAMES, patches, device=device).argsort(-1)[..., :KEPT].sort(-1).values
        dropped = features.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, FEATURES))
        present = torch.ones(batch, FRAMES, dtype=torch.bool, device=device)
        present[0, 0] = False
        merges = torch.arange(batch, device=device) % 2 == 0
        grad = torch.randn(batch, CONFIG.num_slots, CONFIG.dim + 4, device=device)
        return dropped.to(dtype), features[:, FRAMES // 2].to(dtype), kept, present, merges, grad

    variants = {
        "published": step(form(forms["published"]), published, model, dtype),
        "published compiled": step(form(torch.compile(forms["published"])), published, model, dtype),
        OURS: step(form(forms[OURS]), model, model, dtype),
        f"{OURS} compiled": step(form(torch.compile(forms[OURS], fullgraph=True)), model, model, dtype),
    }
    oracle = sample_by_sample(step(form(forms["exact"]), exact, model, torch.float64), sums=only_binding)
    yield Case(
        shape={"B": batch, "F": FRAMES, "M'": KEPT, "M": GRID[0] * GRID[1], "N": CONFIG.num_slots, "D": CONFIG.dim}
        | ({"C": FEATURES} if only_binding else {"C": FEATURES, "H": CONFIG.decoder_dim}),
        dtype=dtype,
        inputs=inputs,
        variants=variants,
        judge=judge_of(oracle, dtype),
        bytes=0,
        flops=None,
        waits=("published", "published compiled"),
    )


AGAINST = {
    "published": "as published: keys and values of each slot, projected in each iteration, PyTorch's "
    "`TransformerEncoder`, scikit-learn for each sample, and all slots decoded to C + 1 numbers at every patch",
    "published compiled": "the same under `torch.compile`, except for scikit-learn and the merge",
    f"{OURS} compiled": "the model under `torch.compile(fullgraph=True)`",
}

SOLV_BINDING = Benchmark(
    "solv_binding",
    "SOLV's input map, spatial binding, temporal binding and merging, forward and backward",
    AGAINST,
    partial(cases, True),
)

SOLV_STEP = Benchmark(
    "solv_step",
    "SOLV's training step without the backbone: binding and merging as in `solv_binding`, the decoder with four "
    "hidden layers, and the loss, forward and backward",
    AGAINST,
    partial(cases, False),
)
