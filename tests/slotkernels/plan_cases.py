"""Transport problems, and their plans from unrolled iterations in PyTorch."""

import torch
from slotkernels import sinkhorn_plan

from .oracles import assert_matches_oracle


def problem(batch, n, m, dtype=torch.float64, grad=True, device="cpu"):
    """Costs [B, N, M] from 0 to 1, weights a [B, N] and b [B, M]."""
    cost = torch.rand(batch, n, m, dtype=torch.float64, device=device).to(dtype)
    weights = [torch.rand(batch, count, dtype=torch.float64, device=device) + 0.1 for count in (n, m)]
    a, b = ((w / w.sum(1, keepdim=True)).to(dtype) for w in weights)
    return [t.requires_grad_(grad) for t in (cost, a, b)]


def unrolled(cost, a, b, eps, iterations):
    """The definition in PyTorch, for its gradients."""
    cost, log_a, log_b = cost / eps, a.log().unsqueeze(2), b.log().unsqueeze(1)
    f = torch.zeros_like(log_a)
    for _ in range(iterations):
        g = -(log_a + f - cost).logsumexp(1, keepdim=True)
        f = -(log_b + g - cost).logsumexp(2, keepdim=True)
    return (log_a + log_b + f + g - cost).exp()


def assert_equals_unrolled(inputs, eps, iterations, tolerance):
    """The plan and its gradients, against those of unrolled iterations in float64."""
    return assert_matches_oracle(
        lambda **t: [sinkhorn_plan(**t, eps=eps, iterations=iterations)],
        lambda **t: [unrolled(**t, eps=eps, iterations=iterations)],
        dict(zip(("cost", "a", "b"), inputs, strict=True)),
        ["plan"],
        tolerance,
    )
