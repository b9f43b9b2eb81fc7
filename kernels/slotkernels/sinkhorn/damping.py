"""What unbalanced transport changes in the Triton kernel: potentials are damped, and the value is no longer their mean.

Séjourné et al., "Sinkhorn divergences for unbalanced optimal transport" (2019). ``REACH`` is "none" for balanced
transport, which nothing here changes; else it says whether the results are "potentials" or the terms of the "value".
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .products import INTERPRETED
from .unbalanced import LARGEST_EXPONENT

LARGEST = tl.constexpr(LARGEST_EXPONENT)


@triton.jit
def _expm1(x):
    """``exp(x) - 1`` without losing the digits of a small x; Kahan's form in the interpreter, which has no other."""
    if INTERPRETED:
        power = tl.exp(x)
        inside = (power != 1.0) & (power > 0.0) & (power < float("inf"))
        safe = tl.where(inside, power, 2.0)
        return tl.where(inside, (safe - 1.0) * x / tl.log(safe), tl.where(power == 1.0, x, power - 1.0))
    return libdevice.expm1(x)


@triton.jit
def damped(potential, eps, rho, REACH: tl.constexpr):
    """The potential of unbalanced transport from that of balanced transport."""
    if REACH != "none":
        potential = potential * (rho / (rho + eps))
    return potential


@triton.jit
def end_of(potential, final, rho, REACH: tl.constexpr):
    """What a potential of the last step adds to the results, and the factor of its gradient (unused if it is 1).

    The value's terms ``-(rho + final / 2) (exp(-f / rho) - 1)`` keep their digits however large rho is.
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
