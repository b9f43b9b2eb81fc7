"""The broadcast decoder and the op at its end, compared with the decoder as published."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from slotkernels import mix_slots
from slotkernels.mixing import bytes_moved, flops
from torch import Tensor

from interpreter.models.decoders import BroadcastDecoder
from profiling.bench.case import OURS, Benchmark, Case, Outputs, close_to

# Slots, patch grid, width of slots, width of hidden layers and of features: Slot Contrast on YTVIS-21 and on MOVi-E.
YTVIS = (7, (37, 37), 64, 1024, 768)
MOVI_E = (15, (24, 24), 128, 1024, 768)

Mix = Callable[..., tuple[Tensor, Tensor]]


def textbook(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over slots and the sum of the slots by their masks."""
    masks = (hidden @ weight + bias).float().softmax(1)
    return (masks.to(hidden.dtype).unsqueeze(-1) * hidden).sum(1), masks.mT


def mixing_step(mix: Mix) -> Any:
    """Forward, and backward from both results to the hidden layer and the weight."""

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, grad_mixed: Tensor, grad_masks: Tensor) -> Outputs:
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        mixed, masks = mix(*leaves, bias)
        of_hidden, of_weight = torch.autograd.grad([mixed, masks], leaves, [grad_mixed, grad_masks.to(masks.dtype)])
        results = {"mixed": mixed.detach(), "masks": masks.detach()}
        return results | {"gradient of hidden": of_hidden, "gradient of weight": of_weight}

    return run


def mixing_cases(device: str) -> Iterator[Case]:
    """Hidden layers of 2 frames on a CPU, of 64 on a GPU."""
    dtype, frames = (torch.bfloat16, 64) if device == "cuda" else (torch.float32, 2)
    for slots, (height, width), _, hidden_dim, _ in (YTVIS, MOVI_E):
        sizes = (frames, slots, height * width, hidden_dim)

        def inputs(sizes: tuple[int, int, int, int] = sizes, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            batch, slots, patches, dim = sizes
            hidden = torch.randn(sizes, device=device, dtype=dtype).relu_()
            weight, bias = torch.randn(dim, device=device) / dim**0.5, torch.zeros(1, device=device)
            grad = torch.randn(batch, patches, dim, device=device, dtype=dtype)
            return hidden, weight.to(dtype), bias.to(dtype), grad, torch.randn(batch, patches, slots, device=device)

        yield Case(
            shape=dict(zip("BKMH", sizes, strict=True)),
            dtype=dtype,
            inputs=inputs,
            variants={
                "textbook": mixing_step(textbook),
                "textbook compiled": mixing_step(torch.compile(textbook)),
                OURS: mixing_step(mix_slots),
            },
            judge=close_to(mixing_step(textbook), 1e-4 if dtype == torch.float32 else 2e-2),
            bytes=sum(bytes_moved(*sizes, dtype.itemsize, backward=b) for b in (False, True)),
            flops=sum(flops(*sizes, backward=b) for b in (False, True)),
            rate=torch.float32,
        )


def published(slots: Tensor, positions: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor]:
    """Slots [B, K, D] broadcast to all patches, plus positions [M, D]; an MLP to C + 1 numbers, given as weights and
    biases in turn; softmax of the last number over slots, and the sum of the features by these masks."""
    hidden = slots[:, :, None] + positions  # [B, K, M, D]
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        hidden = F.relu(F.linear(hidden, weight, bias))
    features, alpha = F.linear(hidden, *layers[-2:]).split([layers[-1].numel() - 1, 1], -1)
    masks = alpha.softmax(1)
    return (features * masks).sum(1), masks.squeeze(-1).mT


def gradients(result: Tensor, grad: Tensor, leaves: list[Tensor]) -> Outputs:
    """Gradients of the leaves, by number."""
    for leaf in leaves:
        leaf.grad = None
    result.backward(grad)  # and not autograd.grad, which the counter of operations does not support
    return {f"gradient {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}


def published_step(decode: Any) -> Any:
    """Forward, and backward from the features to slots and all parameters."""

    def run(grad: Tensor, *tensors: Tensor) -> Outputs:
        leaves = [t.detach().requires_grad_() for t in tensors]
        features, masks = decode(*leaves)
        return {"features": features.detach(), "masks": masks.detach()} | gradients(features, grad, leaves)

    return run


def our_step(decoder: BroadcastDecoder, decode: Any) -> Any:
    """The same with the decoder of this project; ``decode`` is the decoder or its compiled form."""
    first = [decoder.positions, *(p for layer in (decoder.first, *decoder.hidden) for p in layer.parameters())]
    of_features, of_alpha = (list(layer.parameters()) for layer in (decoder.to_features, decoder.to_alpha))

    def run(grad: Tensor, slots: Tensor, *tensors: Tensor) -> Outputs:
        for parameter, tensor in zip(first, tensors, strict=False):
            parameter.data = tensor
        for features_part, alpha_part, tensor in zip(of_features, of_alpha, tensors[-2:], strict=True):
            features_part.data, alpha_part.data = tensor[:-1], tensor[-1:]
        leaves = [slots.detach().requires_grad_(), *first, *of_features, *of_alpha]
        features, masks = decode(leaves[0])
        results = {"features": features.detach(), "masks": masks.detach()} | gradients(features, grad, leaves)
        for last in ("weight", "bias"):  # of both parts of the published last layer
            number = len(leaves) - (4 if last == "weight" else 3)
            results[f"gradient {number}"] = torch.cat(
                [results[f"gradient {number}"], results.pop(f"gradient {number + 2}")]
            )
        return results

    return run


def decoder_cases(device: str) -> Iterator[Case]:
    """8 frames in float32 on a CPU, 64 in bfloat16 on a GPU."""
    dtype, frames = (torch.bfloat16, 64) if device == "cuda" else (torch.float32, 8)
    for slots, grid, dim, hidden_dim, features in (YTVIS, MOVI_E) if device == "cuda" else (YTVIS,):
        patches = grid[0] * grid[1]
        widths = (dim, hidden_dim, hidden_dim, hidden_dim, features + 1)

        def inputs(
            slots: tuple[int, int, int] = (frames, slots, dim), patches: int = patches, widths: Any = widths
        ) -> tuple[Tensor, ...]:
            tensors = [torch.randn(slots[0], patches, widths[-1] - 1), torch.randn(slots)]
            tensors.append(torch.randn(patches, slots[2]) * slots[2] ** -0.5)
            for rows, columns in zip(widths[1:], widths[:-1], strict=True):
                tensors += [torch.randn(rows, columns) * (2 / columns) ** 0.5, 0.1 * torch.randn(rows)]
            return tuple(t.to(device, dtype) for t in tensors)

        kept, again = (
            BroadcastDecoder(dim, features, grid, hidden_dim, 3, recompute=recompute).to(device, dtype)
            for recompute in (False, True)
        )
        yield Case(
            shape={"B": frames, "K": slots, "M": patches, "D": dim, "H": hidden_dim, "C": features},
            dtype=dtype,
            inputs=inputs,
            variants={
                "published": published_step(published),
                "published compiled": published_step(torch.compile(published)),
                OURS: our_step(kept, kept),
                f"{OURS} compiled": our_step(kept, torch.compile(kept, fullgraph=True)),
                f"{OURS} recompute": our_step(again, again),
                f"{OURS} recompute compiled": our_step(again, torch.compile(again, fullgraph=True)),
            },
            # A hidden number near 0 may have another sign in float64, which changes single gradients.
            judge=close_to(published_step(published), 1e-3 if dtype == torch.float32 else 0.1, norm=("gradient",)),
            bytes=0,
            flops=None,
        )


MIX_SLOTS = Benchmark(
    "mix_slots",
    "the softmax over slots at every patch and the mixture of their hidden layers, forward and backward",
    {
        "textbook": "the same with PyTorch's operations, which store the product of masks and hidden layers",
        "textbook compiled": "the same under `torch.compile`",
    },
    mixing_cases,
)

BROADCAST_DECODER = Benchmark(
    "broadcast_decoder",
    "the MLP decoder of DINOSAUR, SOLV and Slot Contrast with three hidden layers, forward and backward",
    {
        "published": "slots and positions broadcast to [B, K, M, D], an MLP to C + 1 numbers, softmax, sum over slots",
        "published compiled": "the same under `torch.compile`",
        f"{OURS} compiled": "`BroadcastDecoder` under `torch.compile`",
        f"{OURS} recompute": "`BroadcastDecoder` that computes its hidden layers again in the backward pass, to "
        "save memory",
        f"{OURS} recompute compiled": "the same under `torch.compile`",
    },
    decoder_cases,
)
