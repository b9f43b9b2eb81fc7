"""Small Sinkhorn problems, on every device that runs Triton kernels, for the tests of these kernels."""

import os

import pytest
import torch
from slotkernels.sinkhorn import SINKHORN
from slotkernels.sinkhorn.problem import Problem

on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
interpreted = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
)
devices = pytest.mark.parametrize("device", [interpreted, on_gpu])
DIAMETERS = [(None, False), (None, True), (3.0, False)]  # of the batch, of each problem, a number


def points(shape, dtype=torch.float32, device="cpu"):
    """Two sets of points whose distances are near 2 for every D."""
    batch, n, m, dim = shape
    x, y = torch.randn(batch, n, dim), 0.7 * torch.randn(batch, m, dim) + 0.3
    return [(1.4 * t / dim**0.5).to(device, dtype).requires_grad_() for t in (x, y)]


def weights(shape, device="cpu"):
    a, b = (torch.rand(shape[0], count) + 0.1 for count in shape[1:3])
    return [(w / w.sum(1, keepdim=True)).to(device) for w in (a, b)]


def solve(x, y, a=None, b=None, diameter=(3.0, False), p=2, debias=True, blur=0.3, scaling=0.5, reach=None,
          potentials=False, precision="tf32x3", backend="triton"):  # fmt: skip
    """Value and both potentials; with reach, the value and its terms or, with ``potentials``, the potentials alone."""
    settings = p, blur, scaling, reach, debias, potentials, x.requires_grad, y.requires_grad, precision
    results = SINKHORN.apply(Problem(x, y, a, b, *diameter, *settings), backend)[:3]
    return results[1:] if potentials else results


def double(*tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def error(actual, expected, floor=1e-3):
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(floor)).item()
