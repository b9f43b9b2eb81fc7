"""Random problems for the tests of the Sinkhorn divergence, and their comparison with GeomLoss."""

import geomloss
import torch

from .oracles import assert_matches_oracle


def points(batch, n, m, dim=3, dtype=torch.float64, grad=True):
    x = torch.randn(batch, n, dim, dtype=torch.float64)
    y = 1.5 * torch.randn(batch, m, dim, dtype=torch.float64) + 0.5
    return [t.to(dtype).requires_grad_(grad) for t in (x, y)]


def weights(batch, count, grad=True):
    w = torch.rand(batch, count, dtype=torch.float64) + 0.1
    return (w / w.sum(1, keepdim=True)).requires_grad_(grad)


def tensorized(**options):
    return geomloss.SamplesLoss("sinkhorn", backend="tensorized", **{"blur": 0.05, "scaling": 0.5, **options})


def assert_same_loss(loss, oracle, *tensors, tolerance=1e-9):
    """Equal values and gradients of two losses of (x, y) or (a, x, b, y)."""
    return _assert_same(lambda *t: [loss(*t)], lambda *t: [oracle(*t)], tensors, ["value"], tolerance)


def assert_same_potentials(potentials, oracle, *tensors, tolerance=1e-9):
    """Equal potentials and gradients, of the same arguments."""
    return _assert_same(potentials, oracle, tensors, ["f", "g"], tolerance)


def _assert_same(function, oracle, tensors, outputs, tolerance):
    names = ("x", "y") if len(tensors) == 2 else ("a", "x", "b", "y")
    inputs = dict(zip(names, tensors, strict=True))
    return assert_matches_oracle(
        lambda **t: function(*t.values()), lambda **t: oracle(*t.values()), inputs, outputs, tolerance
    )
