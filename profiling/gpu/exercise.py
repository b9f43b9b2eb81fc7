"""Launch every kernel once, forward and backward, at small odd sizes, for compute-sanitizer.

compute-sanitizer --tool memcheck python -m profiling.gpu.exercise
python -m profiling.gpu.exercise --device cpu --only merging
"""

import argparse
from collections.abc import Callable

import torch
from slotkernels import (
    SlotAttention,
    cluster_slots,
    guided_labels,
    inverted_attention,
    match_slots,
    merge_slots,
    mix_slots,
    propagate_labels,
    sinkhorn_divergence,
    sinkhorn_plan,
    transport_targets,
)
from slotkernels.invariant_slot_attention.module import InvariantSlotAttention
from torch import Tensor

from profiling.bench.merging import THRESHOLD, correlated


def _inverted(device: str) -> None:
    for dtype, (slots, tokens, dim) in ((torch.bfloat16, (7, 75, 48)), (torch.float32, (33, 40, 130))):
        q, k = (torch.randn(2, n, dim, device=device, dtype=dtype, requires_grad=True) for n in (slots, tokens))
        inverted_attention(q, k)[0].float().square().sum().backward()


def _modules(device: str) -> None:
    tokens = torch.randn(2, 75, 48, device=device)
    SlotAttention(5, 48).to(device)(tokens).slots.sum().backward()
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 15), torch.linspace(-1, 1, 5)).to(device)
    for encoder_norm in (False, True):
        module = InvariantSlotAttention(5, 48, encoder_norm=encoder_norm).to(device)
        for places in (grid, grid.clone().requires_grad_()):
            module(tokens, places).slots.sum().backward()


def _sinkhorn(device: str) -> None:
    for n, m, dim in ((5, 9, 33), (33, 40, 64)):
        x, y = (torch.randn(3, count, dim, device=device, requires_grad=True) for count in (n, m))
        sinkhorn_divergence(x, y).sum().backward()


def _labels(device: str) -> None:
    image, video = (torch.rand(1, 3, *sides, device=device).softmax(-1) for sides in ((35, 7), (7, 5)))
    propagate_labels(image, video, (5, 7), (33, 50))
    guide = torch.randint(0, 256, (1, 3, 33, 50, 3), device=device, dtype=torch.uint8)
    guided_labels(image, video, (5, 7), guide, confidence=True, statistics=True)


def _merging(device: str) -> None:
    slots = correlated(5, 20, 40).to(device)
    labels, _ = cluster_slots(slots, THRESHOLD)
    attention: Tensor = torch.rand(5, 11, 20, device=device)
    merge_slots(slots, attention, labels)


def _matching(device: str) -> None:
    for count in (1, 3, 5):
        match_slots(torch.randn(7, count, count, device=device))


def _mixing(device: str) -> None:
    hidden = torch.randn(3, 5, 11, 40, device=device, requires_grad=True)
    valid = torch.arange(5, device=device) < torch.tensor([[5], [3], [0]], device=device)
    for mask in (None, valid):
        mixed, masks = mix_slots(hidden, torch.randn(40, device=device), torch.zeros(1, device=device), mask)
        (mixed.square().sum() + masks.square().sum()).backward()


def _transport(device: str) -> None:
    for m, length, dtype in ((35, 70, torch.bfloat16), (70, 300, torch.float32)):
        x, y = (torch.randn(3, n, 40, device=device, dtype=dtype) / 40**0.5 for n in (m, length))
        x_values, y_values = (torch.rand(3, n, 5, device=device) for n in (m, length))
        weights = torch.rand(3, m, device=device).softmax(1)
        transport_targets(x, y, y_values, x_values, a=weights)
        transport_targets(x, y, y_values)
        cost = (1 - x @ y.mT).requires_grad_()
        sinkhorn_plan(cost, weights.to(dtype), eps=0.1, iterations=5).square().sum().backward()
        sinkhorn_plan(20 * cost.detach(), eps=0.01, iterations=5)  # columns take passes of their own


OPS: dict[str, Callable[[str], None]] = {
    "inverted": _inverted,
    "modules": _modules,
    "sinkhorn": _sinkhorn,
    "labels": _labels,
    "merging": _merging,
    "matching": _matching,
    "mixing": _mixing,
    "transport": _transport,
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", nargs="*", default=list(OPS), choices=list(OPS))
    options = parser.parse_args()
    torch.manual_seed(0)
    for name in options.only:
        OPS[name](options.device)
        if options.device == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: launched", flush=True)


if __name__ == "__main__":
    main()
