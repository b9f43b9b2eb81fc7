"""Sinkhorn divergence in plain PyTorch: the oracle of every other backend.

The four transport problems x→y, y→x, x→x and y→y are one tensor of costs. Columns come first, [L, 4, B, L]: a
log-sum-exp over columns then reduces the leading dimension, which vectorises whatever the size of the sets. The
smaller set is padded to L points of weight zero (log-weight -inf), which changes nothing.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .._checks import accumulate_dtype
from .._derivatives import is_batched

# A diameter beyond this many times the blur is cut to it where the schedule's length must not depend on the data.
LONGEST_RATIO = 1e8
# Below this many times the blur two sets are one point (GeomLoss divides by zero there).
SHORTEST_RATIO = 1e-3
# Squared distance below which the cost |x - y| is flat (p = 1), as in GeomLoss.
NEAREST = 1e-8
# Stands for the logarithm of 0: a number, but far below minus any cost over its temperature (GeomLoss has -1e5).
NO_WEIGHT = -1e30


def bounding_box(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, per_problem: bool) -> tuple[Tensor, Tensor]:
    """Lowest and highest coordinates of the points that have weight: [D] for the batch, or [B, D]."""
    dims = (1,) if per_problem else (0, 1)

    def end(most: float) -> list[Tensor]:
        sets = ((x, a), (y, b))
        return [t if w is None else t.masked_fill(~(w > 0).unsqueeze(2), most) for t, w in sets]

    low = torch.minimum(*(t.amin(dims) for t in end(math.inf)))
    high = torch.maximum(*(t.amax(dims) for t in end(-math.inf)))
    wide = accumulate_dtype(x.dtype)  # half types would round their difference
    return low.to(wide), high.to(wide)


def bounding_diameter(
    x: Tensor, y: Tensor, per_problem: bool, a: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """Diagonal of that box: a scalar for the batch, or [B]; an upper bound on all distances."""
    low, high = bounding_box(x, y, a, b, per_problem)
    return torch.linalg.vector_norm(high - low, dim=-1)


def epsilon_schedule(
    diameter: float | Tensor, p: int, blur: float, scaling: float
) -> Iterator[tuple[float | Tensor, Tensor | None]]:
    """Temperatures ``[d^p, d^p, (d s)^p, …, blur^p]``, each with the mask [B, 1] of the problems that take the step.

    A number, or a 0-dimensional tensor on the CPU, gives floats and no masks. Problems with their own diameters [B]
    take different numbers of steps. On an accelerator the loop has the longest schedule's length, so that the host
    never waits, and so it has where a trace or ``torch.vmap`` hides the numbers. A diameter that is not finite starts
    with NaN, which no later step mends: the result is NaN.
    """
    stop, step = p * math.log(blur), p * math.log(scaling)
    readable = False
    if isinstance(diameter, Tensor):
        readable = diameter.device.type == "cpu" and not is_compiling() and not is_batched(diameter)
        if readable and diameter.dim() == 0:
            diameter = diameter.item()
    if not isinstance(diameter, Tensor):  # one schedule for all
        if not math.isfinite(diameter):
            yield math.nan, None
            return
        start = p * math.log(max(diameter, SHORTEST_RATIO * blur))
        yield math.exp(start), None
        for i in range(math.ceil((stop - start) / step)):
            yield math.exp(start + i * step), None
        yield blur**p, None
        return

    diameter = diameter.double().reshape(-1, 1)
    starts = p * diameter.nan_to_num(blur).clamp(SHORTEST_RATIO * blur, LONGEST_RATIO * blur).log()
    lengths = ((stop - starts) / step).ceil().clamp_min(0)
    # masked_fill here and below: torch.where would copy its number from the CPU, which no CUDA graph can hold.
    yield starts.exp().masked_fill(~diameter.isfinite(), math.nan), torch.ones_like(lengths, dtype=torch.bool)
    if readable:
        longest = int(lengths.max()) if lengths.numel() else 0
    else:
        longest = math.ceil(p * math.log(LONGEST_RATIO) / -step)
    for i in range(longest + 1):
        yield (starts + i * step).exp().masked_fill(lengths <= i, blur**p), lengths >= i


def _pad(points: Tensor, length: int) -> Tensor:
    points = points.to(accumulate_dtype(points.dtype))
    missing = length - points.shape[1]
    return F.pad(points, (0, 0, 0, missing)) if missing else points


def _log_weights(weights: Tensor | None, points: Tensor, length: int) -> Tensor:
    """[L, B] log-weights, that of padding -inf."""
    batch, count = points.shape[:2]
    dtype = accumulate_dtype(points.dtype)
    if weights is None:
        logs = torch.full((count, batch), -math.log(count), dtype=dtype, device=points.device)
    else:
        weights = weights.to(dtype).t()
        logs = weights.log().masked_fill(~(weights > 0), NO_WEIGHT)
    return F.pad(logs, (0, 0, 0, length - count), value=-math.inf) if length > count else logs


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[B, N, M], as |x|² - 2 x·y + |y|²; exactly zero between a point and itself, where rounding would show."""
    xx = torch.linalg.vector_norm(x, dim=-1).square()
    yy = xx if y is x else torch.linalg.vector_norm(y, dim=-1).square()
    squared = torch.baddbmm(xx.unsqueeze(2) + yy.unsqueeze(1), x, y.transpose(1, 2), alpha=-2).clamp_min_(0)
    if y is x:
        squared.diagonal(dim1=1, dim2=2).zero_()
    return squared


def _to_costs(squared: Tensor, p: int) -> Tensor:
    return squared.mul_(0.5) if p == 2 else squared.clamp_min_(NEAREST).sqrt_()


def _all_costs(x: Tensor, y: Tensor, p: int, debias: bool) -> Tensor:
    """[L, 4, B, L] costs of all problems, columns first (2 problems without debiasing), of equally long sets."""
    cross = _squared_distances(x, y)
    blocks = [cross.transpose(1, 2), cross]  # [B, column, row]
    if debias:
        blocks += [_squared_distances(x, x), _squared_distances(y, y)]
    return _to_costs(torch.stack([block.transpose(0, 1) for block in blocks], 1), p)


def _softmin(eps: float | Tensor, costs: Tensor, h: Tensor) -> Tensor:
    """``-eps log sum_j exp(h_j - C_ij / eps)``: costs [L, 4, B, L], h [L, 4, B] over columns -> [4, B, L] over rows."""
    if isinstance(eps, Tensor):
        logits = torch.addcmul(h.unsqueeze(-1), costs, (-1 / eps).to(costs.dtype))
        eps = eps.to(costs.dtype)
    else:
        logits = torch.add(h.unsqueeze(-1), costs, alpha=-1 / eps)
    highest = logits.amax(0)
    # exp(-80) is nothing beside the 1 of the highest, and exp is 10x slower on a CPU where it underflows.
    return logits.sub_(highest).clamp_min_(-80).exp_().sum(0).log_().add_(highest).mul_(-eps)


def _columns(logs: Tensor, potentials: Tensor, eps: float | Tensor) -> Tensor:
    """Log-weights plus partner potentials over eps: [L, 4, B]."""
    eps = eps.to(potentials.dtype) if isinstance(eps, Tensor) else eps
    # x→y and y→x read each other's potential, x→x and y→y their own. A list as index would be copied from the CPU.
    scaled = torch.cat((potentials[:2].flip(0), potentials[2:])) / eps
    return logs + scaled.permute(2, 0, 1)


def _stack_logs(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, length: int, debias: bool) -> Tensor:
    a_log, b_log = _log_weights(a, x, length), _log_weights(b, y, length)
    return torch.stack((b_log, a_log, a_log, b_log) if debias else (b_log, a_log), 1)


def anneal(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    diameter: float | None,
    per_problem: bool,
    p: int,
    blur: float,
    scaling: float,
    debias: bool,
) -> tuple[Tensor, Tensor]:
    """Costs [L, 4, B, L] of all problems, and log-weights plus potentials over eps [L, 4, B] before the last update."""
    length = max(x.shape[1], y.shape[1])
    logs = _stack_logs(x, y, a, b, length, debias)
    costs = _all_costs(_pad(x, length), _pad(y, length), p, debias)
    potentials: Tensor | None = None
    start = bounding_diameter(x, y, per_problem, a, b) if diameter is None else diameter
    for eps, active in epsilon_schedule(start, p, blur, scaling):
        if potentials is None:
            potentials = _softmin(eps, costs, logs)
        updates = _softmin(eps, costs, _columns(logs, potentials, eps)).add_(potentials).mul_(0.5)
        potentials = updates if active is None else torch.where(active, updates, potentials)
    assert potentials is not None
    return costs, _columns(logs, potentials, blur**p)


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    diameter: float | None,
    per_problem: bool,
    p: int,
    blur: float,
    scaling: float,
    debias: bool,
    keep_x: bool,
    keep_y: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Value [B], potentials on x [B, N] and on y [B, M], and the rows that pull on x [B, N, N + M] and y [B, M, N + M].

    Row i of ``pull_x`` holds the factors with which all points, those of x first, add up to the gradient of the i-th
    potential: everything that the backward pass needs (empty where ``keep_x`` is False).
    """
    n, m = x.shape[1], y.shape[1]
    costs, last = anneal(x, y, a, b, diameter, per_problem, p, blur, scaling, debias)
    final = _softmin(blur**p, costs, last)
    f, g = (final[0] - final[2], final[1] - final[3]) if debias else (final[0], final[1])
    f, g = f[:, :n].clone(), g[:, :m].clone()
    value = _mean(f, a).add_(_mean(g, b))
    if debias:
        value.clamp_min_(0)
    pull_x, pull_y = f.new_empty(0), g.new_empty(0)
    if keep_x:
        toward, itself = _pull(costs, last, p, blur**p, 0, 2 if debias else None, (n, m))
        pull_x = torch.cat((itself, toward), 2)
    if keep_y:
        toward, itself = _pull(costs, last, p, blur**p, 1, 3 if debias else None, (m, n))
        pull_y = torch.cat((toward, itself), 2)
    return value, f, g, pull_x, pull_y


def _mean(potential: Tensor, weights: Tensor | None) -> Tensor:
    return potential.mean(1) if weights is None else (potential * weights.to(potential.dtype)).sum(1)


def _pull(
    costs: Tensor, h: Tensor, p: int, eps: float, cross: int, own: int | None, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Factors of the other set's points [B, R, C] and of the own points [B, R, R] in the gradients of R potentials.

    A potential is ``-eps log sum_j exp(h_j - C_ij / eps)``; its gradient is ``sum_j P_ij dC_ij/dx_i``, where P is the
    softmax over j and ``dC_ij/dx_i = x_i - y_j`` (p = 2), or that over the distance (p = 1). All else is constant.
    """
    rows, columns = sizes

    def weights(problem: int, count: int) -> Tensor:
        cost = costs[:count, problem, :, :rows]  # [columns, B, rows]
        softmax = torch.add(h[:count, problem].unsqueeze(-1), cost, alpha=-1 / eps).softmax(0)
        if p == 1:
            softmax = softmax.div_(cost).masked_fill_(cost < NEAREST**0.5 * (1 + 1e-6), 0.0)
        return softmax.permute(1, 2, 0)

    toward = weights(cross, columns)
    away = torch.zeros_like(toward[:, :, :1]).expand(-1, -1, rows) if own is None else weights(own, rows)
    totals = toward.sum(2) - away.sum(2)
    if p == 2:
        totals = torch.full_like(totals, 1.0 if own is None else 0.0)  # exactly: every softmax sums to 1
    return toward.neg(), away + torch.diag_embed(totals)


def sinkhorn_backward(
    grad_value: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    pull_x: Tensor | None,
    pull_y: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of y, each empty if its pull is None."""
    return (
        _gradient(grad_value, grad_f, a, pull_x, x, y, x),
        _gradient(grad_value, grad_g, b, pull_y, x, y, y),
    )


def _gradient(
    grad_value: Tensor | None,
    grad_potential: Tensor | None,
    weights: Tensor | None,
    pull: Tensor | None,
    x: Tensor,
    y: Tensor,
    like: Tensor,
) -> Tensor:
    if pull is None:
        return like.new_empty(0)
    if grad_value is None and grad_potential is None:
        return like.new_zeros(like.shape)
    scale = row_gradients(grad_value, grad_potential, weights, like.shape[1]).unsqueeze(-1)
    n = x.shape[1]
    moved = torch.bmm(pull[:, :, :n], x.to(pull.dtype)).baddbmm_(pull[:, :, n:], y.to(pull.dtype))
    return moved.mul_(scale).to(like.dtype)


def row_gradients(
    grad_value: Tensor | None, grad_potential: Tensor | None, weights: Tensor | None, count: int
) -> Tensor:
    """Gradient [B, count] of each potential, from those of the value [B] and of the potentials (not both None)."""
    if grad_value is None:
        assert grad_potential is not None
        return grad_potential
    scale = grad_value.unsqueeze(1) * (1 / count if weights is None else weights.to(grad_value.dtype))
    scale = scale.expand(-1, count)
    return scale if grad_potential is None else scale + grad_potential
