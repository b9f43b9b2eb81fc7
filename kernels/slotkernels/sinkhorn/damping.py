"""Unbalanced transport in the Triton kernel: potentials are damped, and the value is not their mean.

Séjourné et al., "Sinkhorn divergences for unbalanced optimal transport" (2019). ``REACH`` is "none" for balanced
transport, for which these functions change nothing; else "potentials" if the results are potentials, or "value" if they
are the terms of the value.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .products import INTERPRETED
from .unbalanced import LARGEST_EXPONENT

LARGEST = tl.constexpr(LARGEST_EXPONENT)


@triton.jit
def _expm1(x):
    """``exp(x) - 1``, accurate for a small x. The interpreter has no ``expm1``, so there Kahan's form computes it."""
    if INTERPRETED:
        power = tl.exp(x)
        inside = (power != 1.0) & (power > 0.0) & (power < float("inf"))
        safe = tl.where(inside, power, 2.0)
        return tl.where(inside, (safe - 1.0) * x / tl.log(safe), tl.where(power == 1.0, x, power - 1.0))
    return libdevice.expm1(x)


@triton.jit
def damped(potential, eps, rho, REACH: tl.constexpr):
    """The potential of unbalanced transport, from the softmin."""
    if REACH != "none":
        potential = potential * (rho / (rho + eps))
    return potential


@triton.jit
def end_of(potential, final, rho, REACH: tl.constexpr):
    """The contribution of a potential of the last step to the results, and the factor of its gradient.

    The factor is not used for balanced transport, where it is 1. The terms of the value,
    ``-(rho + final / 2) (exp(-f / rho) - 1)``, are accurate for any rho.
    """
    slope = potential
    if REACH != "none":
        damping = rho / (rho + final)
        if REACH == "potentials":
            potential, slope = potential * damping, tl.zeros_like(potential) + damping
        else:
            exponent = potential * damping * (-1.0 / rho)
            less = _expm1(tl.where(exponent > LARGEST, LARGEST, exponent))
            potential, slope = -(rho + 0.5 * final) * less, (1.0 + less) * (damping * (1.0 + 0.5 * final / rho))
    return potential, slope
