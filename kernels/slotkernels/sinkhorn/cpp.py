"""Sinkhorn divergence of small sets on a CPU, in C++ (``csrc/cpu/sinkhorn.cpp``): threads share out the problems."""

import torch
from torch import Tensor



def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    diameter: float | None,
    per_problem: bool,
    p: int,
    blur: float,
    scaling: float,
    debias: bool,
    keep_x: bool,
    keep_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`slotkernels.sinkhorn.reference.sinkhorn`, in float32 whatever the ``precision``."""
    native = torch.ops.slotkernels_native.sinkhorn
    return native(x, y, a, b, diameter, per_problem, p, blur, scaling, debias, keep_x, keep_y)


def sinkhorn_backward(
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    pull_x: Tensor | None,
    pull_y: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """As :func:`slotkernels.sinkhorn.reference.sinkhorn_backward`."""
    return torch.ops.slotkernels_native.sinkhorn_backward(grad_value, grad_f, grad_g, x, y, a, b, pull_x, pull_y)
