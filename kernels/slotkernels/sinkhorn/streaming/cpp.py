"""Streaming Sinkhorn on a CPU, in C++ (``csrc/cpu/streaming.cpp``): tiles of pairs that stay in registers.

As in ``blocks.py``, both updates of two sets share their exponentials ``K_ij = exp((f_i + g_j - C_ij) / eps)``.
Products of points are float32, after each set is centred on its own mean. All else in an exponent is exact: terms that
belong to one point are float64; their whole part (to the base 2) enters the exponent, and the rest becomes a factor of
the point's weight. An exponent then has an error of about ``2^-24 |x| |y| / eps``.

``blocks.py`` computes a step instead, with float64 products, if the error exceeds ``LARGEST_ERROR`` or a sum leaves the
range of float32. This takes longer. With ``reach`` it also happens if points have no partner within several times the
reach, because a sum is near ``exp(-f_i / rho)``.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Problem
from . import annealing, blocks
from .blocks import LOG2E
from .pair import centre, log_weights, out_of_range
from .problem import StreamingBackwardArguments, StreamingSolution

PANEL, BLOCK = 64, 192  # columns that are stored together, and points to which a set is padded: csrc/cpu/streaming.h
LARGEST_ERROR = 1e-3  # of an exponent
LARGEST_TERM = 2**22  # float32 sums of two whole numbers up to this are exact
NONE = -1e9  # exponent of points without weight and of padding, whose exponentials are 0


def sinkhorn_streaming(problem: Problem) -> StreamingSolution:
    """Anneal, visiting all pairs at each step."""
    return annealing.solve(Pair, problem)


def sinkhorn_streaming_backward(arguments: StreamingBackwardArguments) -> tuple[Tensor, Tensor]:
    """Gradients of x and y through the last update."""
    return annealing.gradients(Pair, arguments)


class _Set:
    """One set of points, in the layouts of the kernels."""

    def __init__(self, points: Tensor, weights: Tensor | None, origin: Tensor) -> None:
        batch, self.count, dim = points.shape
        self.missing = -self.count % BLOCK
        self.log_weights = log_weights(weights, points)
        self.rows = F.pad((points.double() - origin).float(), (0, -dim % 16, 0, self.missing))
        panels = self.rows[:, :, :dim].reshape(batch, self.rows.shape[1] // PANEL, PANEL, dim)
        self.panels = panels.transpose(2, 3).contiguous()
        self.points = self.rows[:, : self.count, :dim].double()  # as the kernels see them

    def pad(self, numbers: Tensor, value: float = 0.0) -> Tensor:
        return F.pad(numbers.float(), (0, self.missing), value=value)

    def longest(self, origin: Tensor) -> Tensor:
        """[B, 1] greatest distance from an origin."""
        return (self.points - origin).square().sum(2).amax(1, keepdim=True).sqrt()


class Pair:
    """See :class:`slotkernels.sinkhorn.streaming.pair.Pair`."""

    def __init__(self, x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, p: int) -> None:
        self.arguments, self.p = (x, y, a, b, p), p
        centres = (centre(x, a), centre(x, a) if y is None else centre(y, b))
        if p == 2:  # products of points round less near the origin
            self.x = self.y = _Set(x, a, centres[0])
            if y is not None:
                self.y = _Set(y, b, centres[1])
            # C_ij = own_x_i + own_y_j - x_i·y_j, with x relative to its centre and y to its own
            offset = centres[0] - centres[1]
            self.shifted = self.x.points + offset
            self.own_x = 0.5 * self.shifted.square().sum(2)
            self.own_y = 0.5 * ((self.y.points - offset).square().sum(2) - offset.square().sum(2))
            origin = torch.zeros_like(offset)
            self.longest = self.x.longest(origin) * self.y.longest(origin)
        else:  # differences of points round less than the points would if they were moved
            origin = torch.zeros_like(centres[0])
            self.x = self.y = _Set(x, a, origin)
            if y is not None:
                self.y = _Set(y, b, origin)
            self.own_x = self.own_y = origin[..., 0]
            self.longest = self.x.longest(centres[0]) + self.y.longest(centres[0])

    @cached_property
    def blocks(self) -> blocks.Pair:
        """The PyTorch backend, for steps that float32 products cannot compute."""
        return blocks.Pair(*self.arguments)

    def softmin(self, eps: float | Tensor, f: Tensor, g: Tensor | None = None) -> Tensor:
        """See :class:`slotkernels.sinkhorn.streaming.pair.Pair`."""
        terms = _Terms(self, eps, f, f if g is None else g)
        if terms.err:
            return self.blocks.softmin(eps, f, g)
        x, y = self.x, self.y
        a = (x.log_weights + terms.r_rest / LOG2E).exp()
        b = (y.log_weights + terms.s_rest / LOG2E).exp()
        sums = torch.ops.slotkernels_native.streaming_sums(
            x.rows, y.panels, x.pad(terms.r, NONE), y.pad(terms.s, NONE), x.pad(a), y.pad(b), terms.scale,
            x.count, y.count, self.p, g is None,
        )  # fmt: skip
        rows, columns = sums
        if g is None:
            return f - terms.eps * self._logs(rows + columns, terms.r_rest, x, y, terms.eps, f, f)
        logs = (
            self._logs(rows, terms.r_rest, x, y, terms.eps, f, g),
            self._logs(columns, terms.s_rest, y, x, terms.eps, g, f),
        )
        return torch.cat((f, g), 1) - terms.eps * torch.cat(logs, 1)

    def gradient(self, eps: float, f: Tensor, g: Tensor) -> Tensor:
        """See :class:`slotkernels.sinkhorn.streaming.pair.Pair`."""
        terms = _Terms(self, eps, f, g + eps * self.y.log_weights)  # exponents of the plan, which cannot overflow
        if terms.err:
            return self.blocks.gradient(eps, f, g)
        x, y = self.x, self.y
        totals, pulls = torch.ops.slotkernels_native.streaming_slopes(
            x.rows, y.rows, y.panels, x.pad(terms.r, NONE), y.pad(terms.s, NONE), y.pad(terms.s_rest.exp2()),
            terms.scale, x.count, y.count, self.p,
        )  # fmt: skip
        slopes = (self.shifted * totals.unsqueeze(2)).sub_(pulls) if self.p == 2 else pulls
        return slopes.mul_(terms.r_rest.exp2().unsqueeze(2))

    def _logs(self, sums: Tensor, rest: Tensor, x: "_Set", y: "_Set", eps: Tensor, f: Tensor, g: Tensor) -> Tensor:
        """Logarithms [B, N] of the sums over y. Those out of range are computed again as log-sum-exps."""
        logs = sums.log() + rest / LOG2E
        bad = out_of_range(sums.float())
        if bad.any():
            ours = (self.blocks.x, self.blocks.y) if x is self.x else (self.blocks.y, self.blocks.x)
            self.blocks.replace_logs(logs, bad, *ours, y.log_weights, eps, f, g)
        return logs


class _Terms:
    """The exponents ``(f_i + g_j - C_ij) log2(e) / eps`` at one temperature, in parts.

    The whole part of each point's term is ``r`` or ``s``; the kernels get the rest as a factor of its weight.
    """

    def __init__(self, pair: Pair, eps: float | Tensor, f: Tensor, g: Tensor) -> None:
        number = LOG2E / eps if isinstance(eps, Tensor) else f.new_full((len(f), 1), LOG2E / eps)
        scale = number.float().double()  # exactly what the kernel multiplies by, and the temperature that belongs to it
        self.scale, self.eps = scale.squeeze(1).float(), LOG2E / scale
        r, s = (f - pair.own_x) * scale, ((g - pair.own_y) * scale).clamp_min(NONE)  # without weight: minus infinity
        self.r, self.s = r.round(), s.round()
        self.r_rest, self.s_rest = r - self.r, s - self.s
        rounding = scale.squeeze(1) * pair.longest.squeeze(1) * 2.0**-24
        whole = torch.maximum(self.r.abs().amax(1), self.s.abs().masked_fill(self.s == NONE, 0.0).amax(1))
        # Numbers that are not finite fail both comparisons; blocks.py turns them into NaN.
        self.err = not bool(((rounding < LARGEST_ERROR) & (whole < LARGEST_TERM)).all())
