"""Kernel norms between weighted point sets: GeomLoss's losses "gaussian", "laplacian", "energy" and "hausdorff".

With a kernel k the loss is half the squared norm of the difference of the two measures::

    1/2 sum_ij a_i a_j k(x_i, x_j)  +  1/2 sum_ij b_i b_j k(y_i, y_j)  -  sum_ij a_i b_j k(x_i, y_j)

A kernel returns a PyTorch tensor [B, N, M], or a ``LazyTensor`` of KeOps, whose sums are compiled loops without a
matrix.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._backends import without_autocast
from .._checks import check_that
from .keops_autograd import after_stream, compile_first
from .reference import NEAREST, squared_distances

# Called as kernel(x [B, N, D], y [B, M, D], blur=, use_keops=, ranges=None); a Tensor [B, N, M], or a LazyTensor.
Kernel = Callable[..., Any]


def kernel_norm(
    x: Tensor,  # [B, N, D]
    y: Tensor,  # [B, M, D]
    a: Tensor,  # [B, N]
    b: Tensor,  # [B, M]
    kernel: Kernel,
    blur: float,
    use_keops: bool,
    potentials: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss [B], or the potentials [B, N] and [B, M]: sums of the kernel with the own points minus the other points.

    Gradients are GeomLoss's. For k(x, x) it doubles the derivative of the first argument instead of adding those of
    both arguments; for a symmetric kernel this is the exact gradient of the loss. The potentials have the same doubled
    derivative, and no gradient with respect to the weights of their own set.
    """

    def matrix(x: Tensor, y: Tensor, *weights: Tensor) -> Any:
        if use_keops:
            x, y = after_stream(x), after_stream(y)
            if kernel in KERNELS.values():
                arguments = (x, y, *(w.unsqueeze(-1) for w in weights))
                compile_first(f"the kernel {kernel.__name__}", lambda *t: _compile(kernel, *t), *arguments)
        values = kernel(x, y, blur=blur, use_keops=use_keops, ranges=None)
        if not isinstance(values, Tensor):
            return values
        expected = [len(x), x.shape[1], y.shape[1]]
        shape = list(values.shape)
        check_that(shape == expected, f"SamplesLoss: the kernel returned {shape}, expected [B, N, M] = {expected}")
        return values.to(a.dtype)

    with without_autocast(x.device):
        a_x = _sum(matrix(_twice(x), x.detach(), a.detach()), a.detach())
        b_y = _sum(matrix(_twice(y), y.detach(), b.detach()), b.detach())
        if not potentials:
            b_x = _sum(matrix(x, y, b), b)
            return 0.5 * ((_twice(a) * a_x).sum(1) + (_twice(b) * b_y).sum(1)) - (a * b_x).sum(1)
        cross = matrix(x, y, b, a)
        transposed = cross.mT if isinstance(cross, Tensor) else cross.t()
        return a_x - _sum(cross, b), b_y - _sum(transposed, a)


def _sum(matrix: Any, weights: Tensor) -> Tensor:
    """``sum_j k(x_i, y_j) w_j`` [B, N]."""
    if isinstance(matrix, Tensor):
        return (matrix @ weights.unsqueeze(-1)).squeeze(-1)
    return after_stream((matrix @ after_stream(weights.unsqueeze(-1))).squeeze(-1))


def _compile(kernel: Kernel, x: Tensor, y: Tensor, b: Tensor, *a: Tensor) -> Tensor:
    """The reductions of one call, on single points: the one over y and, if there are weights of x, that over x."""
    matrix = kernel(x, y, blur=1.0, use_keops=True)
    sums = [matrix @ b, *(matrix.t() @ weights for weights in a)]
    return sum(sums[1:], sums[0])


def _twice(tensor: Tensor) -> Tensor:
    """The same values with twice the gradient."""
    return tensor + (tensor - tensor.detach())


def _squared_distances(x: Tensor, y: Tensor, use_keops: bool) -> Any:
    if use_keops:
        from pykeops.torch import LazyTensor

        return ((LazyTensor(x.unsqueeze(2)) - LazyTensor(y.unsqueeze(1))) ** 2).sum(-1)
    return squared_distances(x, y)


def _distances(x: Tensor, y: Tensor, use_keops: bool) -> Any:
    squared = _squared_distances(x, y, use_keops)
    # As in the Sinkhorn divergence, distances are flat below 1e-4.
    return ((squared - NEAREST).relu() + NEAREST).sqrt() if use_keops else squared.clamp_min(NEAREST).sqrt()


def gaussian(x: Tensor, y: Tensor, blur: float = 0.05, use_keops: bool = False, ranges: None = None) -> Any:
    """``exp(-|x - y|² / (2 blur²))``."""
    return (-_squared_distances(x / blur, y / blur, use_keops) / 2).exp()


def laplacian(x: Tensor, y: Tensor, blur: float = 0.05, use_keops: bool = False, ranges: None = None) -> Any:
    """``exp(-|x - y| / blur)``."""
    return (-_distances(x / blur, y / blur, use_keops)).exp()


def energy(x: Tensor, y: Tensor, blur: float = 0.05, use_keops: bool = False, ranges: None = None) -> Any:
    """``-|x - y|``; the loss is half the energy distance."""
    return -_distances(x, y, use_keops)


KERNELS: dict[str, Kernel] = {"gaussian": gaussian, "laplacian": laplacian, "energy": energy}
