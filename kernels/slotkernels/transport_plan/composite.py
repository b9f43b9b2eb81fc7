"""Updates of a transport plan made of operations that PyTorch differentiates in every mode."""

import torch
from torch import Tensor

from .problem import Problem, Solution
from .reference import LOG2E, iterate


def composite_plan(problem: Problem) -> Solution:
    """As :func:`slotkernels.transport_plan.reference.sinkhorn_plan`, without the history."""
    return iterate(CompositeUpdates, problem._replace(keep=False))


class CompositeUpdates:
    """Updates of a plan's potentials, with the methods of :class:`slotkernels.transport_plan.reference.LogDomain`."""

    def __init__(self, cost: Tensor, a: Tensor, b: Tensor, eps: float) -> None:
        self.exponents, self.a, self.b = cost * (-LOG2E / eps), a, b

    def columns(self, f: Tensor) -> Tensor:
        """Potentials of the columns [B, 1, M] from those of the rows."""
        return self._update(self.a, f, 1)

    def rows(self, g: Tensor) -> Tensor:
        """Potentials of the rows [B, N, 1] from those of the columns."""
        return self._update(self.b, g, 2)

    def plan(self, g: Tensor) -> Tensor:
        """The plan after an update of the rows, normalised by its own sums."""
        terms, _, lone = self._terms(self.b, g, 2)
        return terms * (self.a / terms.sum(2, keepdim=True).masked_fill(lone, 1)).to(terms.dtype)

    def _update(self, weights: Tensor, potential: Tensor, dim: int) -> Tensor:
        terms, highest, lone = self._terms(weights, potential, dim)
        sums = terms.sum(dim, keepdim=True).double().masked_fill(lone, 1)
        return -(highest.double() + sums.log2()).masked_fill(lone, 0)

    def _terms(self, weights: Tensor, potential: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """``weights * 2^(potential - C / unit - highest)``, ``highest``, and a mask of points without allowed pairs.

        Derivatives do not use the logarithm of a weight, because that of 0 has none.
        """
        exponents = potential.to(self.exponents.dtype) + self.exponents
        highest = (exponents + weights.log2().to(exponents.dtype)).detach().amax(dim, keepdim=True)
        lone = highest == -torch.inf
        highest = highest.masked_fill(lone, 0)
        powers = (exponents - highest).clamp_max(100).exp2()  # clamped are points without weight
        return weights.to(powers.dtype) * powers, highest, lone
