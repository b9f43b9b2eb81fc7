"""Entropic transport plans: ours, POT and the textbook in PyTorch, with the same number of iterations."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from slotkernels import sinkhorn_plan
from slotkernels.transport_plan import bytes_moved
from torch import Tensor

from profiling.bench.case import OURS, Benchmark, Case, Function, Outputs, close_to

EPS, ITERATIONS = 0.05, 100
Plan = Callable[[Tensor], Tensor]  # of costs [B, N, M], for uniform weights


def textbook(cost: Tensor) -> Tensor:
    """Cuturi 2013: the scaling of a kernel's rows and columns in turn, for all problems at once."""
    kernel = (cost / -EPS).exp()
    batch, n, m = cost.shape
    u = cost.new_full((batch, n, 1), 1 / n)
    for _ in range(ITERATIONS):
        v = 1 / m / (kernel.mT @ u)
        u = 1 / n / (kernel @ v)
    return u * kernel * v.mT


def by_pot(cost: Tensor, method: str, numpy: bool) -> Tensor:
    """POT solves one problem at a time; with NumPy in float64, else with PyTorch in the dtype of the costs."""
    import ot

    batch, n, m = cost.shape
    costs: Any = cost.double().numpy() if numpy else cost
    a, b = ((torch.full((count,), 1 / count).to(cost) if not numpy else ot.unif(count)) for count in (n, m))
    # The threshold of 0 keeps it from stopping early.
    options: dict[str, Any] = {"method": method, "numItermax": ITERATIONS, "stopThr": 0, "warn": False}
    plans = [ot.bregman.sinkhorn(a, b, costs[i], EPS, **options) for i in range(batch)]
    return torch.stack([torch.as_tensor(plan) for plan in plans])


def pot_variants(*names: str) -> tuple[dict[str, Plan], dict[str, str]]:
    """POT's variants, or the reason why they cannot run."""
    if importlib.util.find_spec("ot") is None:
        return {}, dict.fromkeys(names, "POT not installed")
    every = {
        "POT": partial(by_pot, method="sinkhorn", numpy=True),
        "POT float32": partial(by_pot, method="sinkhorn", numpy=False),
        "POT log": partial(by_pot, method="sinkhorn_log", numpy=False),
    }
    return {name: every[name] for name in names}, {}


def forward(plan: Plan) -> Function:
    """The plan alone."""

    def run(cost: Tensor) -> Outputs:
        return {"plan": plan(cost)}

    return run


def with_gradient(plan: Plan) -> Function:
    """The plan, and the gradient of the costs of the sum of its squares."""

    def run(cost: Tensor) -> Outputs:
        leaf = cost.detach().requires_grad_()
        result = plan(leaf)
        return {"plan": result.detach(), "gradient": torch.autograd.grad(result.square().sum(), leaf)[0]}

    return run


def cases(device: str) -> Iterator[Case]:
    """Small, middle, rectangular and large problems of float32 costs; then float64; then gradients."""
    sizes: tuple[tuple[int, int, int], ...] = ((96, 32, 32), (4, 200, 200), (2, 300, 1000), (1, 864, 864))
    if device == "cuda":
        sizes = ((3456, 32, 32), (96, 196, 196), (96, 864, 864), (1, 864, 864))
    every = [(size, torch.float32, False) for size in sizes]
    every += [(size, torch.float64, False) for size in sizes[1:] if device == "cpu"]
    every += [(size, torch.float32, True) for size in sizes[:2]]
    for (batch, n, m), dtype, gradient in every:

        def inputs(shape: tuple[int, ...] = (batch, n, m), dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            return (torch.rand(shape, device=device, dtype=dtype),)

        names = ["POT float32"] if gradient or dtype == torch.float64 else ["POT", "POT float32"]
        if dtype == torch.float64:
            names = ["POT"]
        elif n == 200:
            names.append("POT log")
        pot, left_out = pot_variants(*names) if device == "cpu" else ({}, {})
        variants: dict[str, Plan] = {
            **pot,
            "textbook": textbook,
            f"{OURS} reference": partial(sinkhorn_plan, eps=EPS, iterations=ITERATIONS, backend="reference"),
            OURS: partial(sinkhorn_plan, eps=EPS, iterations=ITERATIONS),
        }
        kind = with_gradient if gradient else forward
        itemsize = dtype.itemsize
        yield Case(
            shape={"B": batch, "N": n, "M": m} | ({"with": "gradient"} if gradient else {}),
            dtype=dtype,
            inputs=inputs,
            variants={name: kind(plan) for name, plan in variants.items()},
            judge=close_to(kind(textbook), 1e-4),
            bytes=sum(bytes_moved(batch, n, m, itemsize, backward) for backward in (False, True)[: 1 + gradient]),
            # In the absorbed form an iteration is two products of the matrix and a vector.
            flops=batch * n * m * ITERATIONS * 4 * (1 + 2 * gradient),
            left_out=tuple(left_out.items()),
        )


SINKHORN_PLAN = Benchmark(
    "sinkhorn_plan",
    f"entropic transport plans of B problems of N x M costs, {ITERATIONS} iterations",
    {
        "POT": "`ot.bregman.sinkhorn(method='sinkhorn')` with NumPy in float64, one problem after the other",
        "POT float32": "the same with PyTorch tensors in float32",
        "POT log": "`method='sinkhorn_log'` with PyTorch tensors in float32",
        "textbook": "the scaling of kernels (Sinkhorn's algorithm) in PyTorch, all problems at once",
        f"{OURS} reference": "the op in plain PyTorch",
    },
    cases,
)
