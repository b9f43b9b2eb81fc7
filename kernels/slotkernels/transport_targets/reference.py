"""Transport of labels in plain PyTorch, for CPUs and for tests of the kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import accumulate_dtype
from .op import TRANSPORT_TARGETS, Arguments, Targets

# Numbers of kernel matrices in memory at a time (one matrix at least), for the caches of a CPU and memory of a GPU.
CHUNK = {"cpu": 2**16, "cuda": 2**26}
RESCALE_EVERY = 8  # iterations: factors may grow by M·L an iteration, and float32 ends at 2^128
REACH = 60.0  # range of the logarithms of factors: sums are divided by exp(-60) at least


@TRANSPORT_TARGETS.composite
def composite_transport_targets(arguments: Arguments) -> Targets:
    """The textbook form in the log domain: potentials f = log α and g = log β; each update is a log-sum-exp."""
    x, y, y_values, x_values, a, b = _tensors(*arguments[:6])
    iterations = arguments.iterations
    log_kernel = (x @ y.mT - 1) / arguments.eps  # [B, M, L]

    def carried(log_kernel: Tensor, a: Tensor, b: Tensor, values: Tensor) -> Tensor:
        g = torch.zeros_like(b).unsqueeze(1)  # [B, 1, L]
        for _ in range(iterations):
            f = a.log().unsqueeze(2) - torch.logsumexp(log_kernel + g, 2, keepdim=True)  # [B, M, 1]
            g = b.log().unsqueeze(1) - torch.logsumexp(log_kernel + f, 1, keepdim=True)
        return (f + log_kernel + g).exp() @ values  # [B, M, N]

    of_x = carried(log_kernel, a, b, y_values)
    return Targets(of_x, of_x.new_empty(0) if x_values is None else carried(log_kernel.mT, b, a, x_values))


def transport_targets(arguments: Arguments) -> Targets:
    """The same with products of matrices and vectors instead of log-sum-exps, a few problems at a time.

    The kernel matrix is scaled so that no float32 number overflows or underflows, for any eps: see
    docs/ops/transport_targets_kernels.md.
    """
    x, y, y_values, x_values, a, b, eps, iterations = arguments
    (batch, m, _), (length, labels), dtype = x.shape, y_values.shape[1:], accumulate_dtype(x.dtype)
    of_x = x.new_empty(batch, m, labels, dtype=dtype)
    of_y = x.new_empty((0,) if x_values is None else (batch, length, labels), dtype=dtype)
    size = max(1, CHUNK.get(x.device.type, CHUNK["cuda"]) // (m * length))
    for first in range(0, batch, size):
        part = slice(first, first + size)
        values, *weights = (None if t is None else t[part] for t in (x_values, a, b))
        chunk = _tensors(x[part], y[part], y_values[part], values, *weights)
        scores = torch.baddbmm(chunk.x.new_zeros(1, 1, 1), chunk.x, chunk.y.mT, beta=0, alpha=1 / eps)  # [b, M, L]
        if chunk.x_values is None:
            of_x[part] = _carried(scores, chunk.a, chunk.b, chunk.y_values, iterations)
            continue
        rows = scores.amax(2, keepdim=True)
        if _shares(rows, iterations):
            of_x[part], of_y[part] = _carried_both_ways(scores, rows, chunk, chunk.x_values, iterations)
        else:
            of_y[part] = _carried(scores.mT, chunk.b, chunk.a, chunk.x_values, iterations)
            of_x[part] = _carried(scores, chunk.a, chunk.b, chunk.y_values, iterations)
    return Targets(of_x, of_y)


class _Tensors(NamedTuple):
    """The arguments in the precision of the arithmetic, with uniform weights instead of None."""

    x: Tensor  # [B, M, C]
    y: Tensor  # [B, L, C]
    y_values: Tensor  # [B, L, N]
    x_values: Tensor | None  # [B, M, N]
    a: Tensor  # [B, M]
    b: Tensor  # [B, L]


def _tensors(
    x: Tensor, y: Tensor, y_values: Tensor, x_values: Tensor | None, a: Tensor | None, b: Tensor | None
) -> _Tensors:
    dtype = accumulate_dtype(x.dtype)

    def uniform(points: Tensor) -> Tensor:
        return points.new_full((), 1 / points.shape[1], dtype=dtype).expand(points.shape[:2])

    values = None if x_values is None else x_values.to(dtype)
    weights = (uniform(t) if w is None else w.to(dtype) for t, w in ((x, a), (y, b)))
    return _Tensors(x.to(dtype), y.to(dtype), y_values.to(dtype), values, *weights)


def _shares(rows: Tensor, iterations: int) -> bool:
    """Whether both directions can use one scaled kernel matrix, from the largest score of each row [b, M, 1].

    Only on a CPU: the host reads the values, so a GPU would have to wait.
    """
    if rows.device.type != "cpu" or iterations > RESCALE_EVERY:
        return False
    return not bool((rows.amax(1) - rows.amin(1) > REACH).any())


def _carried_both_ways(
    scores: Tensor, rows: Tensor, chunk: _Tensors, x_values: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """``of_x`` [b, M, N] and ``of_y`` [b, L, N] from one matrix, which overwrites the scores."""
    a, b = chunk.a.unsqueeze(2), chunk.b.unsqueeze(2)  # [b, M, 1], [b, L, 1]
    kernel = scores.sub_(rows)
    columns = kernel.amax(1, keepdim=True)  # [b, 1, L]
    kernel = kernel.sub_(columns).exp_()
    # The direction to x starts with β = 1 for y; the direction to y with 1 for x, up to a factor that cancels.
    y_side, x_side = columns.mT.exp(), (rows - rows.amax(1, keepdim=True)).exp()
    transposed = kernel.mT
    for _ in range(iterations):  # bmm: matmul would expand its arguments first, which takes as long as a small product
        x_alpha = a / torch.bmm(kernel, y_side)
        y_side = b / torch.bmm(transposed, x_alpha)
        y_alpha = b / torch.bmm(transposed, x_side)
        x_side = a / torch.bmm(kernel, y_alpha)
    of_x = torch.bmm(kernel, y_side * chunk.y_values).mul_(x_alpha)
    return of_x, torch.bmm(transposed, x_side * x_values).mul_(y_alpha)


def _carried(scores: Tensor, a: Tensor, b: Tensor, values: Tensor, iterations: int) -> Tensor:
    """Π ``values`` [b, M, N], with the plan Π of the kernel matrix exp(``scores``) [b, M, L]."""
    a, b = a.unsqueeze(2), b.unsqueeze(2)  # [b, M, 1], [b, L, 1]
    rows = scores.amax(2, keepdim=True)  # [b, M, 1]
    kernel = scores - rows
    columns = kernel.amax(1, keepdim=True)  # [b, 1, L]
    kernel = kernel.sub_(columns).exp_()  # now the largest number of every row and of every column is 1
    beta = columns.mT.exp()  # [b, L, 1]: the published β = 1
    alpha = a / (kernel @ beta)
    beta = b / (kernel.mT @ alpha)
    for iteration in range(1, iterations):
        if iteration % RESCALE_EVERY == 0:
            rows, columns = rows - alpha.log(), columns - beta.log().mT
            kernel, beta = torch.sub(scores, rows, out=kernel).sub_(columns).exp_(), torch.ones_like(beta)
        alpha = a / (kernel @ beta)
        beta = b / (kernel.mT @ alpha)
    return alpha * (kernel @ (beta * values))
