"""Streaming Sinkhorn in plain PyTorch, in blocks of pairs that stay in the cache: the oracle of streaming backends.

Both updates of two sets, and both halves of the symmetric problem of one set, share their exponentials. With
``K_ij = exp((f_i + g_j - C_ij) / eps)``, ``S_i = sum_j b_j K_ij`` and ``T_j = sum_i a_i K_ij``, the new potentials are
``f - eps log S`` and ``g - eps log T``. This needs half the exponentials of two log-sum-exps. The present potentials
normally keep K in range; rows that leave the range are computed again as log-sum-exps.

Exponents are one float64 matrix product with two extra columns, ``[x / eps, r, 1] [y, 1, s]ᵀ``. So their rounding error
is below that of float32 in any dimension. Exponentials are float32 (float64 for float64 points) and to the base 2: on a
CPU, exp2 takes a third of the time of exp.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..._checks import accumulate_dtype
from ..problem import Problem
from ..reference import NEAREST
from . import annealing
from .pair import centre, log_weights, out_of_range
from .problem import StreamingBackwardArguments, StreamingSolution

LOG2E = math.log2(math.e)
# Pairs per block: for each CPU thread (3 MB with float64 products), and on an accelerator.
BLOCK = {"cpu": 2**18, "accelerator": 2**24}


def sinkhorn_streaming(problem: Problem) -> StreamingSolution:
    """Anneal, visiting all pairs at each step."""
    return annealing.solve(Pair, problem)


def sinkhorn_streaming_backward(arguments: StreamingBackwardArguments) -> tuple[Tensor, Tensor]:
    """Gradients of x and y through the last update."""
    return annealing.gradients(Pair, arguments)


class Pair:
    """See :class:`slotkernels.sinkhorn.streaming.pair.Pair`."""

    def __init__(self, x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, p: int) -> None:
        self.p, self.dtype = p, accumulate_dtype(x.dtype)
        self.same = y is None
        origin = centre(x, a)
        self.x, self.log_a = x.double() - origin, log_weights(a, x)
        self.y, self.log_b = (self.x, self.log_a) if y is None else (y.double() - origin, log_weights(b, y))

    def softmin(self, eps: float | Tensor, f: Tensor, g: Tensor | None = None) -> Tensor:
        """See :class:`slotkernels.sinkhorn.streaming.pair.Pair`."""
        g = f if g is None else g
        # Row vectors: a batch of matrices times column vectors is slow on a CPU (14 times at 4 x 864 x 864).
        a, b = (logs.exp().to(self.dtype).unsqueeze(1) for logs in (self.log_a, self.log_b))
        rows, columns = torch.zeros_like(a), torch.zeros_like(b)
        for k, i, j, exponents, _ in self._blocks(self.x, self.y, eps, f, g, half=self.same):
            kernel = exponents.exp2_()
            rows[k, :, i].baddbmm_(b[k, :, j], kernel.mT)
            if not self.same:
                columns[k, :, j].baddbmm_(a[k, :, i], kernel)
            elif i != j:
                rows[k, :, j].baddbmm_(a[k, :, i], kernel)
        logs = [self._logs(rows, self.x, self.y, self.log_b, eps, f, g)]
        if self.same:
            return f - eps * logs[0]
        logs.append(self._logs(columns, self.y, self.x, self.log_a, eps, g, f))
        return torch.cat((f, g), 1) - eps * torch.cat(logs, 1)

    def gradient(self, eps: float, f: Tensor, g: Tensor) -> Tensor:
        """See :class:`slotkernels.sinkhorn.streaming.pair.Pair`."""
        targets = torch.cat((self.y, torch.ones_like(self.y[:, :, :1])), 2)
        sums = self.x.new_zeros(*self.x.shape[:2], targets.shape[2])
        for k, i, j, exponents, costs in self._blocks(self.x, self.y, eps, f, g + eps * self.log_b):
            plan = exponents.exp2_().double()
            if self.p == 1:
                flat = costs < NEAREST**0.5 * (1 + 1e-6) * LOG2E / eps
                plan = plan.div_(costs).masked_fill_(flat, 0.0).mul_(LOG2E / eps)
            sums[k, i].baddbmm_(plan, targets[k, j])
        return self.x * sums[:, :, -1:] - sums[:, :, :-1]

    def _logs(
        self, sums: Tensor, x: Tensor, y: Tensor, log_b: Tensor, eps: float | Tensor, f: Tensor, g: Tensor
    ) -> Tensor:
        """Logarithms [B, N] of sums [B, 1, N]; those out of range are computed again as log-sum-exps."""
        logs = sums.squeeze(1).double().log_()
        self.replace_logs(logs, out_of_range(sums).squeeze(1), x, y, log_b, eps, f, g)
        return logs

    def replace_logs(
        self, logs: Tensor, bad: Tensor, x: Tensor, y: Tensor, log_b: Tensor, eps: float | Tensor, f: Tensor, g: Tensor
    ) -> None:
        """Compute the logarithms [B, N] selected by the mask ``bad`` as log-sum-exps, and write them to ``logs``."""
        g = g + eps * log_b
        for k in bad.any(1).nonzero().squeeze(1).tolist():
            one, rows = slice(k, k + 1), bad[k]
            again = torch.full_like(logs[one, rows], -math.inf)
            temperature = eps[one] if isinstance(eps, Tensor) else eps
            for _, i, _, exponents, _ in self._blocks(x[one, rows], y[one], temperature, f[one, rows], g[one]):
                again[:, i] = again[:, i].logaddexp(exponents.div_(LOG2E).logsumexp(2).double())
            logs[one, rows] = again

    def _blocks(
        self, x: Tensor, y: Tensor, eps: float | Tensor, f: Tensor, g: Tensor, half: bool = False
    ) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
        """Yields problems, rows, columns, their exponents ``(f_i + g_j - C_ij) log2(e) / eps``, and their costs.

        Exponents and costs are buffers that the next block overwrites. The costs ``C_ij log2(e) / eps`` are float64 and
        meaningful for p = 1 only.
        """
        scale = (LOG2E / eps if isinstance(eps, Tensor) else x.new_full((1, 1), LOG2E / eps)).unsqueeze(2)
        xx, yy = (points.square().sum(2, keepdim=True) for points in (x, y))
        f, g = f.unsqueeze(2) * scale, g.unsqueeze(2) * scale
        one, other = torch.ones_like(f), torch.ones_like(g)
        if self.p == 2:
            left = torch.cat((x * scale, f - 0.5 * scale * xx, one), 2)
            right = torch.cat((y, other, g - 0.5 * scale * yy), 2)
        else:
            left = torch.cat((x * -2, xx, one), 2) * scale.square()
            right = torch.cat((y, other, yy), 2)
        nearest = (NEAREST * scale.square()).expand(len(f), 1, 1)
        sizes = (len(f), f.shape[1], g.shape[1])
        block = _block_shape(*sizes, f.device)
        products, sums = (f.new_empty(math.prod(block)) for _ in range(2))
        exponents = sums.to(self.dtype)
        for k, i, j in _tiles(sizes, block, half):
            size = (k.stop - k.start, i.stop - i.start, j.stop - j.start)
            product, total, exponent = (t[: math.prod(size)].view(size) for t in (products, sums, exponents))
            torch.bmm(left[k, i], right[k, j].mT, out=product)
            if self.p == 1:
                torch.maximum(product, nearest[k], out=product).sqrt_()
                torch.add(f[k, i], g[k, j].mT, out=total).sub_(product)
            yield k, i, j, exponent.copy_(product if self.p == 2 else total), product


def budget(device: torch.device) -> int:
    """Pairs per block."""
    return BLOCK["cpu"] * torch.get_num_threads() if device.type == "cpu" else BLOCK["accelerator"]


def _block_shape(batch: int, n: int, m: int, device: torch.device) -> tuple[int, int, int]:
    """Problems, rows and columns of a block: nearly square, with several problems if they are small."""
    pairs = budget(device)
    height = min(n, max(math.isqrt(pairs), pairs // m))
    width = min(m, max(math.isqrt(pairs), pairs // n))
    return min(batch, max(1, pairs // (height * width))), height, width


def _tiles(
    sizes: tuple[int, int, int], block: tuple[int, int, int], half: bool
) -> Iterator[tuple[slice, slice, slice]]:
    """Slices that cover all pairs of all problems; ``half`` leaves out the blocks below the diagonal."""

    def parts(axis: int, start: int = 0) -> list[slice]:
        steps = range(start, sizes[axis], max(1, block[axis]))
        return [slice(first, min(sizes[axis], first + block[axis])) for first in steps]

    for k in parts(0):
        for i in parts(1):
            for j in parts(2, i.start if half else 0):
                yield k, i, j
