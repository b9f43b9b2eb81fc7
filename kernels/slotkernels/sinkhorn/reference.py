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

from .._checks import accumulate_dtype

# Position of each problem's partner: x→y and y→x read each other's potential, x→x and y→y their own.
SWAP = (1, 0, 2, 3)
# A diameter beyond this many times the blur is cut to it where the schedule's length must not depend on the data.
LONGEST_RATIO = 1e8
# Below this many times the blur two sets are one point (GeomLoss divides by zero there).
SHORTEST_RATIO = 1e-3
# Squared distance below which the cost |x - y| is flat (p = 1), as in GeomLoss.
NEAREST = 1e-8


def bounding_diameter(x: Tensor, y: Tensor, per_problem: bool) -> Tensor:
    """Diagonal of the bounding box of both sets: a scalar for the batch, or [B]; an upper bound on all distances."""
    dims = (1,) if per_problem else (0, 1)
    low = torch.minimum(x.amin(dims), y.amin(dims))
    high = torch.maximum(x.amax(dims), y.amax(dims))
    return torch.linalg.vector_norm((high - low).to(accumulate_dtype(x.dtype)), dim=-1)


def epsilon_schedule(
    diameter: float | Tensor, p: int, blur: float, scaling: float
) -> Iterator[tuple[float | Tensor, Tensor | None]]:
    """Temperatures ``[d^p, d^p, (d s)^p, …, blur^p]``, each with the mask [B, 1] of the problems that take the step.

    A number, or a 0-dimensional tensor on the CPU, gives floats and no masks. Problems with their own diameters [B]
    take different numbers of steps. On an accelerator the loop has the longest schedule's length, so that the host
    never waits.
    """
    stop, step = p * math.log(blur), p * math.log(scaling)
    if isinstance(diameter, Tensor) and diameter.dim() == 0 and diameter.device.type == "cpu":
        diameter = diameter.item()
    if not isinstance(diameter, Tensor):  # one schedule for all
        start = p * math.log(max(diameter, SHORTEST_RATIO * blur) if math.isfinite(diameter) else blur)
        yield math.exp(start), None
        for i in range(math.ceil((stop - start) / step)):
            yield math.exp(start + i * step), None
        yield blur**p, None
        return

    clamped = diameter.double().nan_to_num(blur).clamp(SHORTEST_RATIO * blur, LONGEST_RATIO * blur)
    starts = p * clamped.log().reshape(-1, 1)
    lengths = ((stop - starts) / step).ceil().clamp_min(0)
    yield starts.exp(), torch.ones_like(lengths, dtype=torch.bool)
    if diameter.device.type == "cpu":
        longest = int(lengths.max()) if lengths.numel() else 0
    else:
        longest = math.ceil(p * math.log(LONGEST_RATIO) / -step)
    for i in range(longest + 1):
        yield torch.where(lengths > i, (starts + i * step).exp(), blur**p), lengths >= i


def _pad(points: Tensor, length: int) -> Tensor:
    points = points.to(accumulate_dtype(points.dtype))
    missing = length - points.shape[1]
    return F.pad(points, (0, 0, 0, missing)) if missing else points


def _log_weights(weights: Tensor | None, points: Tensor, length: int) -> Tensor:
    """[L, B] log-weights; zero weights become -100000 as in GeomLoss, padding -inf."""
    batch, count = points.shape[:2]
    dtype = accumulate_dtype(points.dtype)
    if weights is None:
        logs = torch.full((count, batch), -math.log(count), dtype=dtype, device=points.device)
    else:
        weights = weights.to(dtype).t()
        logs = torch.where(weights > 0, weights.log(), -100000.0)
    return F.pad(logs, (0, 0, 0, length - count), value=-math.inf) if length > count else logs


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[B, N, M], as |x|² - 2 x·y + |y|²; exactly zero between a point and itself, where rounding would show."""
    xx = torch.linalg.vector_norm(x, dim=-1).square_()
    yy = xx if y is x else torch.linalg.vector_norm(y, dim=-1).square_()
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
    scaled = potentials[list(SWAP[: potentials.shape[0]])] / eps
    return logs + scaled.permute(2, 0, 1)


def _stack_logs(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, length: int, debias: bool) -> Tensor:
    a_log, b_log = _log_weights(a, x, length), _log_weights(b, y, length)
    return torch.stack((b_log, a_log, a_log, b_log) if debias else (b_log, a_log), 1)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials on x [B, N] and on y [B, M], and the potentials [4 or 2, B, L] that entered the last update."""
    length = max(x.shape[1], y.shape[1])
    logs = _stack_logs(x, y, a, b, length, debias)
    costs = _all_costs(_pad(x, length), _pad(y, length), p, debias)

    potentials: Tensor | None = None
    start = bounding_diameter(x, y, per_problem) if diameter is None else diameter
    for eps, active in epsilon_schedule(start, p, blur, scaling):
        if potentials is None:
            potentials = _softmin(eps, costs, logs)
        updates = _softmin(eps, costs, _columns(logs, potentials, eps)).add_(potentials).mul_(0.5)
        potentials = updates if active is None else torch.where(active, updates, potentials)
    assert potentials is not None
    final = _softmin(blur**p, costs, _columns(logs, potentials, blur**p))
    f, g = (final[0] - final[2], final[1] - final[3]) if debias else (final[0], final[1])
    return f[:, : x.shape[1]].clone(), g[:, : y.shape[1]].clone(), potentials


def sinkhorn_backward(
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    potentials: Tensor,
    p: int,
    blur: float,
    debias: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y through the last update, everything that entered it being constant (as in GeomLoss).

    A row's potential is ``-eps log sum_j exp(h_j - C_ij/eps)``, so its gradient is ``sum_j P_ij dC_ij/dx_i`` with P the
    softmax over j; the second argument of each cost is a constant.
    """
    x_, y_ = (t.to(potentials.dtype) for t in (x, y))
    n, m, eps = x.shape[1], y.shape[1], blur**p
    a_log, b_log = _log_weights(a, x, n).t(), _log_weights(b, y, m).t()
    f_cross, g_cross = potentials[0, :, :n], potentials[1, :, :m]
    own = (potentials[2, :, :n], potentials[3, :, :m]) if debias else (None, None)

    def pull(rows: Tensor, partner: Tensor, logs: Tensor, h: Tensor, own_logs: Tensor, own_h: Tensor | None) -> Tensor:
        moved, total = _pull(rows, partner, logs + h / eps, p, eps)
        if own_h is not None:
            own_moved, own_total = _pull(rows, rows, own_logs + own_h / eps, p, eps)
            moved, total = moved.sub_(own_moved), total - own_total
        if p == 2 and debias:  # both totals are 1
            return moved.neg_()
        return torch.addcmul(moved.neg_(), total.unsqueeze(-1), rows)

    need_x, need_y = needs
    grad_x, grad_y = x.new_empty(0), y.new_empty(0)
    if need_x:
        grad_x = x.new_zeros(x.shape)
        if grad_f is not None:
            grad_x = pull(x_, y_, b_log, g_cross, a_log, own[0]).mul_(grad_f.unsqueeze(-1)).to(x.dtype)
    if need_y:
        grad_y = y.new_zeros(y.shape)
        if grad_g is not None:
            grad_y = pull(y_, x_, a_log, f_cross, b_log, own[1]).mul_(grad_g.unsqueeze(-1)).to(y.dtype)
    return grad_x, grad_y


def _pull(rows: Tensor, partner: Tensor, h: Tensor, p: int, eps: float) -> tuple[Tensor, Tensor]:
    """``sum_j W_ij partner_j`` and ``sum_j W_ij``: the gradient at row i is ``sum_j W_ij (rows_i - partner_j)``."""
    squared = _squared_distances(partner, rows)  # [B, column, row]: the softmax over columns then vectorises
    near = squared < NEAREST if p == 1 else None
    costs = _to_costs(squared, p)
    weights = torch.add(h.unsqueeze(2), costs, alpha=-1 / eps).softmax(1)
    if near is not None:
        weights = weights.div_(costs).masked_fill_(near, 0.0)
    return torch.bmm(weights.transpose(1, 2), partner), weights.sum(1)
