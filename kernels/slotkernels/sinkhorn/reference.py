"""Sinkhorn divergence in plain PyTorch: the oracle of every other backend.

The four transport problems x→y, y→x, x→x and y→y are one tensor of costs [L, 4, B, L]. Columns are its first
dimension: a log-sum-exp over columns then reduces the leading dimension, which is fast for sets of any size. The
smaller set is padded to L points with points of weight 0 (log-weight -inf), which change nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import accumulate_dtype
from .problem import BackwardArguments, Problem, Solution
from .schedule import bounding_diameter, epsilon_schedule
from .unbalanced import damping, difference, slope

# Squared distance below which the cost |x - y| is flat (p = 1), as in GeomLoss.
NEAREST = 1e-8
# Replaces the logarithm of a weight of 0: finite, and far below any -cost / temperature (GeomLoss: -1e5).
NO_WEIGHT = -1e30


def sinkhorn(problem: Problem) -> Solution:
    """Anneal, take one last full step at ``blur^p``, and combine the potentials of the four problems."""
    n, m, eps = problem.x.shape[1], problem.y.shape[1], problem.blur**problem.p
    costs, last = anneal(problem)
    final = _update(eps, costs, last, problem)  # [4, B, L]
    own = final[2:] if problem.debias else (None, None)
    f, g = difference(final[0], own[0], problem), difference(final[1], own[1], problem)
    f, g = f[:, :n].clone(), g[:, :m].clone()
    value = mean(f, problem.a).add_(mean(g, problem.b))
    if problem.debias:
        value.clamp_min_(0)
    transport_x, transport_y = f.new_empty(0), g.new_empty(0)
    if problem.keep_x:
        transport_x = torch.cat(_transport_weights(costs, last, final, problem, 0, (n, m))[::-1], 2)
    if problem.keep_y:
        transport_y = torch.cat(_transport_weights(costs, last, final, problem, 1, (m, n)), 2)
    return Solution(value, f, g, transport_x, transport_y)


def anneal(problem: Problem) -> tuple[Tensor, Tensor]:
    """Costs [L, 4, B, L] of all problems, and log-weights plus potentials over eps [L, 4, B] before the last update."""
    x, y, a, b, diameter, per_problem, p, blur, scaling, _, debias, *_ = problem
    length = max(x.shape[1], y.shape[1])
    logs = _stack_logs(x, y, a, b, length, debias)
    centred_x, centred_y = (_pad(points, length) for points in centred(x, y, a, b))
    costs = _all_costs(centred_x, centred_y, p, debias)
    potentials: Tensor | None = None  # [4, B, L]
    start = bounding_diameter(x, y, per_problem, a, b) if diameter is None else diameter
    for eps, active in epsilon_schedule(start, p, blur, scaling):
        if potentials is None:
            potentials = _update(eps, costs, logs, problem)
        updates = _update(eps, costs, _columns(logs, potentials, eps), problem).add_(potentials).mul_(0.5)
        potentials = updates if active is None else torch.where(active, updates, potentials)
    assert potentials is not None
    return costs, _columns(logs, potentials, blur**p)


def _softmin(eps: float | Tensor, costs: Tensor, h: Tensor) -> Tensor:
    """``-eps log sum_j exp(h_j - C_ij / eps)``: costs [L, 4, B, L], h [L, 4, B] over columns -> [4, B, L] over rows."""
    if isinstance(eps, Tensor):
        logits = torch.addcmul(h.unsqueeze(-1), costs, (-1 / eps).to(costs.dtype))
        eps = eps.to(costs.dtype)
    else:
        logits = torch.add(h.unsqueeze(-1), costs, alpha=-1 / eps)
    highest = logits.amax(0)
    # exp(-80) is negligible next to the largest term, 1, and exp is 10x slower on a CPU where it underflows.
    return logits.sub_(highest).clamp_min_(-80).exp_().sum(0).log_().add_(highest).mul_(-eps)


def _update(eps: float | Tensor, costs: Tensor, h: Tensor, problem: Problem) -> Tensor:
    """The softmin, damped if transport is unbalanced."""
    softmin = _softmin(eps, costs, h)
    if problem.reach is None:
        return softmin
    factor = damping(eps, problem.p, problem.reach)
    return softmin.mul_(factor.to(softmin.dtype) if isinstance(factor, Tensor) else factor)


def _columns(logs: Tensor, potentials: Tensor, eps: float | Tensor) -> Tensor:
    """Log-weights plus partner potentials over eps: [L, 4, B]."""
    eps = eps.to(potentials.dtype) if isinstance(eps, Tensor) else eps
    # x→y and y→x read each other's potential, x→x and y→y their own. A list as index would be copied from the CPU.
    scaled = torch.cat((potentials[:2].flip(0), potentials[2:])) / eps
    return logs + scaled.permute(2, 0, 1)


def mean(potential: Tensor, weights: Tensor | None) -> Tensor:
    """Sum [B] of potentials [B, N] times weights, uniform ones if None."""
    return potential.mean(1) if weights is None else (potential * weights.to(potential.dtype)).sum(1)


def centred(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sets minus the mean of all points that have weight, in the dtype of the arithmetic.

    Distances stay the same, and ``|x|² - 2 x·y + |y|²`` rounds least around zero.
    """
    x, y = (points.to(accumulate_dtype(points.dtype)) for points in (x, y))
    kept = [torch.ones_like(t[:, :, 0]) if w is None else (w > 0).to(t.dtype) for t, w in ((x, a), (y, b))]
    total = kept[0].unsqueeze(1) @ x + kept[1].unsqueeze(1) @ y  # [B, 1, D]
    origin = total / (kept[0].sum(1) + kept[1].sum(1)).clamp_min(1).view(-1, 1, 1)
    return x - origin, y - origin


def _pad(points: Tensor, length: int) -> Tensor:
    missing = length - points.shape[1]
    return F.pad(points, (0, 0, 0, missing)) if missing else points


def _log_weights(weights: Tensor | None, points: Tensor, length: int) -> Tensor:
    """[L, B] log-weights; -inf for padding."""
    batch, count = points.shape[:2]
    dtype = accumulate_dtype(points.dtype)
    if weights is None:
        logs = torch.full((count, batch), -math.log(count), dtype=dtype, device=points.device)
    else:
        weights = weights.to(dtype).t()
        logs = weights.log().masked_fill(~(weights > 0), NO_WEIGHT)
    return F.pad(logs, (0, 0, 0, length - count), value=-math.inf) if length > count else logs


def _stack_logs(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None, length: int, debias: bool) -> Tensor:
    a_log, b_log = _log_weights(a, x, length), _log_weights(b, y, length)
    return torch.stack((b_log, a_log, a_log, b_log) if debias else (b_log, a_log), 1)


def squared_distances(x: Tensor, y: Tensor, own: bool = False) -> Tensor:
    """Squared distances [B, N, M] as ``|x|² - 2 x·y + |y|²``. Rounding may make them slightly negative.

    Differentiable in every mode. ``own``: x and y are the same set, and a point has a distance of exactly 0 to itself.
    """
    norms = x.square().sum(2).unsqueeze(2) + y.square().sum(2).unsqueeze(1)
    squared = torch.baddbmm(norms, x, y.mT, alpha=-2)
    if own:
        diagonal = squared.diagonal(dim1=1, dim2=2)
        diagonal.sub_(diagonal.detach().clone())
    return squared


def _to_costs(squared: Tensor, p: int) -> Tensor:
    return squared.mul_(0.5) if p == 2 else squared.clamp_min_(NEAREST).sqrt_()


def _all_costs(x: Tensor, y: Tensor, p: int, debias: bool) -> Tensor:
    """[L, 4, B, L] costs of all problems, columns first (2 problems without debiasing), of equally long sets."""
    products = [x @ y.mT]
    norms = [x.square().sum(2), y.square().sum(2)]  # [B, L]
    if debias:  # squared norms out of the same products: so equal points have a distance of exactly 0
        products += [x @ x.mT, y @ y.mT]
        norms = [product.diagonal(dim1=1, dim2=2).clone() for product in products[1:]]
    sides = (norms, norms[:1] * 2, norms[1:] * 2)
    cross, *own = (
        product.mul_(-2).add_(left.unsqueeze(2)).add_(right.unsqueeze(1)).clamp_min_(0)
        for product, (left, right) in zip(products, sides, strict=False)
    )
    blocks = [cross.transpose(1, 2), cross, *own]  # [B, column, row]
    return _to_costs(torch.stack([block.transpose(0, 1) for block in blocks], 1), p)


def _transport_weights(
    costs: Tensor, h: Tensor, final: Tensor, problem: Problem, cross: int, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Weights of the other set's points [B, R, C] and of the own points [B, R, R] in the gradients of R potentials.

    A potential is ``-eps log sum_j exp(h_j - C_ij / eps)``. Its gradient is ``sum_j P_ij dC_ij/dx_i``, where P is the
    softmax over j and ``dC_ij/dx_i`` is ``x_i - y_j`` (p = 2) or that divided by the distance (p = 1). All else is
    constant. With ``reach`` each row is multiplied by the slope of the damped update or of its term.
    """
    rows, columns = sizes
    p, eps = problem.p, problem.blur**problem.p
    scales = slope(final[..., :rows], problem)  # [4, B, R]

    def slopes(index: int, count: int) -> Tensor:
        cost = costs[:count, index, :, :rows]  # [columns, B, rows]
        softmax = torch.add(h[:count, index].unsqueeze(-1), cost, alpha=-1 / eps).softmax(0)
        if p == 1:
            softmax = softmax.div_(cost).masked_fill_(cost < NEAREST**0.5 * (1 + 1e-6), 0.0)
        if problem.reach is not None:
            softmax = softmax.mul_(scales[index])
        return softmax.permute(1, 2, 0)

    toward = slopes(cross, columns)
    away = slopes(cross + 2, rows) if problem.debias else torch.zeros_like(toward[:, :, :1]).expand(-1, -1, rows)
    totals = toward.sum(2) - away.sum(2)
    if p == 2:  # exactly: every softmax sums to 1
        totals = scales[cross] - scales[cross + 2] if problem.debias else scales[cross]
    return toward.neg(), away + torch.diag_embed(totals)


def sinkhorn_backward(arguments: BackwardArguments) -> tuple[Tensor, Tensor]:
    """Gradients of x and of y, each empty if its transport weights are None."""
    grad_value, grad_f, grad_g, x, y, a, b, transport_x, transport_y, _ = arguments

    def of(points: Tensor, grad_potential: Tensor | None, weights: Tensor | None, transport: Tensor | None) -> Tensor:
        if transport is None:
            return points.new_empty(0)
        if grad_value is None and grad_potential is None:
            return points.new_zeros(points.shape)
        scale = row_gradients(grad_value, grad_potential, weights, points.shape[1]).unsqueeze(-1)
        n = x.shape[1]
        products = torch.bmm(transport[:, :, :n], x.to(transport.dtype))
        products.baddbmm_(transport[:, :, n:], y.to(transport.dtype))
        return products.mul_(scale).to(points.dtype)

    return of(x, grad_f, a, transport_x), of(y, grad_g, b, transport_y)


def row_gradients(
    grad_value: Tensor | None, grad_potential: Tensor | None, weights: Tensor | None, count: int
) -> Tensor:
    """Gradient [B, count] for each potential, from the gradients of the value [B] and of the potentials.

    One of the two may be None.
    """
    if grad_value is None:
        assert grad_potential is not None
        return grad_potential
    scale = grad_value.unsqueeze(1) * (1 / count if weights is None else weights.to(grad_value.dtype))
    scale = scale.expand(-1, count)
    return scale if grad_potential is None else scale + grad_potential


def weight_gradient(grad_value: Tensor | None, potential: Tensor, weights: Tensor | None) -> Tensor | None:
    """Gradient [B, count] of the weights; the value is the sum of weights times potentials."""
    if grad_value is None or weights is None:
        return None
    return (grad_value.unsqueeze(1) * potential).to(weights.dtype)
