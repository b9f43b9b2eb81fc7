"""Replace geomloss.SamplesLoss by slotkernels.SamplesLoss: the same call, the same values and gradients.

    python examples/replace_geomloss.py

Moves the points of one cloud onto another along the gradient of the Sinkhorn divergence. If geomloss is installed
(pip install geomloss), also computes a batch with both libraries and prints their difference and their times.
"""

import argparse
import importlib.util
import time

import torch
from slotkernels import SamplesLoss  # instead of: from geomloss import SamplesLoss
from torch import Tensor


def value_and_gradient(loss: torch.nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """The divergence [B], its gradient [B, N, D] with respect to x, and the seconds that both took."""
    x, start = x.clone().requires_grad_(), time.perf_counter()
    value = loss(x, y)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient, time.perf_counter() - start


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
steps = parser.parse_args().steps
torch.manual_seed(0)
loss = SamplesLoss("sinkhorn", p=2, blur=0.05, scaling=0.5)

# A gradient flow: each point moves along its part of the gradient.
points, target = torch.rand(200, 2), torch.rand(200, 2) + 2
for step in range(steps + 1):
    value, gradient, _ = value_and_gradient(loss, points[None], target[None])
    if step % 5 == 0:
        print(f"step {step}: divergence {value.item():.4f}")
    points = points - 0.3 * len(points) * gradient[0]

# A batch of the size that the video stage uses: 96 pairs of sets, each of 32 slots of width 128.
x, y = torch.randn(96, 32, 128), torch.randn(96, 32, 128)
value, gradient, _ = value_and_gradient(loss, x, y)
seconds = min(value_and_gradient(loss, x, y)[2] for _ in range(5))
print(f"slotkernels: mean divergence {value.mean():.4f}, {seconds * 1e3:.1f} ms")
if importlib.util.find_spec("geomloss"):
    import geomloss

    theirs = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.05, scaling=0.5)
    their_value, their_gradient, _ = value_and_gradient(theirs, x, y)
    their_seconds = min(value_and_gradient(theirs, x, y)[2] for _ in range(5))
    print(f"geomloss:    mean divergence {their_value.mean():.4f}, {their_seconds * 1e3:.1f} ms")
    print(f"largest relative difference of the values: {((value - their_value) / their_value).abs().max():.1e}")
    print(f"relative difference of the gradients: {(gradient - their_gradient).norm() / their_gradient.norm():.1e}")
