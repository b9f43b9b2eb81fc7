"""Entropic transport plans between pairs of sets: which point goes where, for dense alignment (SMTC, eq. 8-9)."""

import math
import warnings

import torch
from torch import Tensor

from .._checks import accumulate_dtype, check_same, check_tensor, check_that

CHECK_EVERY = 5  # iterations between looks at the marginals: an accelerator's host waits for each


def sinkhorn_plan(
    cost: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    x: Tensor | None = None,
    y: Tensor | None = None,
    p: int = 2,
    eps: float,
    iterations: int = 100,
    tolerance: float | None = None,
) -> Tensor:
    """Plan that minimises ``<plan, cost> - eps * entropy(plan)`` among those with marginals a and b (Cuturi 2013).

    Sinkhorn's iteration in the log domain: no eps is too small for it, though a smaller one needs more iterations. The
    columns of the result sum to b to rounding, the rows to a as far as the iteration has converged. The gradient is
    that of the iterations as they were made, exact however few they are; it needs no more memory than the plan itself.

    Args:
        cost: [B, N, M]; float32, float64, bfloat16 or float16. An infinite cost forbids a pair.
        a: [B, N] weights of rows, each set summing to 1; uniform if None. Constant to autograd, like b.
        b: [B, M] weights of columns.
        x: [B, N, D] points instead of ``cost``, which then is ``|x - y|^p / p``.
        y: [B, M, D] points, dtype of ``x``.
        p: 1 or 2.
        eps: > 0, in the unit of the costs; with 1/50 of their spread or more a hundred iterations are plenty.
        iterations: number of iterations, each an update of all rows and all columns.
        tolerance: stop as soon as the rows of every problem miss a by less than this in sum (looked at every few
            iterations, for which the host waits for the device); warn if ``iterations`` do not suffice. None: never
            look, so that the call can be captured in a CUDA graph.

    Returns:
        [B, N, M] float32 (float64 for float64 inputs), differentiable once in cost, or x and y. Where a problem has no
        plan, as all that a point may go to is forbidden, it is NaN.

    Raises:
        ValueError: if shapes or dtypes disagree, a set is empty, or a parameter is out of its range.
    """
    sizes: dict[str, int] = {}
    points = x is not None or y is not None
    check_that(
        (cost is None) == points and (x is None) == (y is None), "sinkhorn_plan: expected either cost, or both x and y"
    )
    if cost is None:
        assert x is not None
        assert y is not None
        check_tensor("sinkhorn_plan", "x", x, "B N D", sizes)
        check_tensor("sinkhorn_plan", "y", y, "B M D", sizes)
        check_same("sinkhorn_plan", x=x, y=y)
        check_that(p in (1, 2), f"sinkhorn_plan: p={p}, expected 1 or 2")
        cost = _cost(x, y, p)
    else:
        check_tensor("sinkhorn_plan", "cost", cost, "B N M", sizes)
    for name, weights, shape in (("a", a, "B N"), ("b", b, "B M")):
        if weights is not None:
            check_tensor("sinkhorn_plan", name, weights, shape, sizes)
    check_that(0 < eps < math.inf, f"sinkhorn_plan: eps={eps}, expected a finite number > 0")
    check_that(iterations >= 1, f"sinkhorn_plan: iterations={iterations}, expected at least 1")
    check_that(tolerance is None or tolerance > 0, f"sinkhorn_plan: tolerance={tolerance}, expected None or > 0")
    keep = torch.is_grad_enabled() and cost.requires_grad
    return _plan(cost, a, b, float(eps), iterations, tolerance, keep)[0]


def _cost(x: Tensor, y: Tensor, p: int) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    center = y.detach().to(dtype).mean(1, keepdim=True)  # squares of far points would leave no digits for distances
    x, y = x.to(dtype) - center, y.to(dtype) - center
    if p == 1:
        return torch.cdist(x, y)
    squares = x.square().sum(2).unsqueeze(2) + y.square().sum(2).unsqueeze(1)
    return torch.baddbmm(squares, x, y.transpose(1, 2), beta=0.5, alpha=-1).clamp_min(0)


def _logs(weights: Tensor | None, cost: Tensor, dim: int) -> Tensor:
    """Log-weights [B, N] or [B, M]."""
    dtype, count = accumulate_dtype(cost.dtype), cost.shape[dim]
    if weights is None:
        return torch.full((cost.shape[0], count), -math.log(count), dtype=dtype, device=cost.device)
    return weights.to(dtype).log()


def _update(logits: Tensor, partner: Tensor, logs: Tensor, dim: int, buffer: Tensor) -> Tensor:
    """``logs - log sum_dim exp(logits + partner)``: the scaling that gives rows (dim 2) or columns (1) their sums."""
    torch.add(logits, partner.unsqueeze(3 - dim), out=buffer)
    highest = buffer.amax(dim, keepdim=True)  # -inf, and then NaN, where nothing is allowed
    sums = buffer.sub_(highest).clamp_min_(-80).exp_().sum(dim)  # exp(-80) is nothing; exp is slow where it underflows
    return torch.where(logs == -math.inf, logs, logs - sums.log_().add_(highest.squeeze(dim)))


@torch.library.custom_op("slotkernels::sinkhorn_plan", mutates_args=())
def _plan(
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    eps: float,
    iterations: int,
    tolerance: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plan, logarithms of the scalings of rows [I, B, N] and columns [I + 1, B, M], and the iterations made."""
    logits = cost.to(accumulate_dtype(cost.dtype)) / -eps
    a_log, b_log = _logs(a, cost, 1), _logs(b, cost, 2)
    buffer = torch.empty_like(logits)
    (batch, n, m), kept = cost.shape, iterations if keep else 0
    rows, columns = buffer.new_zeros(kept, batch, n), buffer.new_zeros(kept + 1 if keep else 0, batch, m)
    u, v, made, missed = a_log, b_log, 0, math.inf
    if keep:
        columns[0] = v
    for i in range(iterations):
        before, u = u, _update(logits, v, a_log, 2, buffer)
        if tolerance is not None and i and i % CHECK_EVERY == 0 and batch:
            # Before this update row i summed to a exp(before - u).
            missed = float((a_log.exp() * torch.expm1(before - u)).nan_to_num().abs().sum(1).max())
            if missed < tolerance:
                u = before
                break
        v = _update(logits, u, b_log, 1, buffer)
        made = i + 1
        if keep:
            rows[i], columns[i + 1] = u, v
    else:
        if tolerance is not None and batch:
            total = torch.add(logits, u.unsqueeze(2), out=buffer).add_(v.unsqueeze(1)).exp_().sum(2)
            missed = float((total - a_log.exp()).abs().sum(1).max())
            if not missed < tolerance:
                warnings.warn(
                    f"sinkhorn_plan: rows miss their weights by {missed:.2g} after {iterations} iterations, tolerance="
                    f"{tolerance}; more iterations or a larger eps than {eps} help",
                    RuntimeWarning,
                    stacklevel=2,
                )
    plan = torch.add(logits, u.unsqueeze(2), out=buffer).add_(v.unsqueeze(1)).exp_()
    return plan, rows, columns, torch.tensor(made)


@_plan.register_fake
def _(cost, a, b, eps, iterations, tolerance, keep):
    (batch, n, m), kept = cost.shape, iterations if keep else 0
    plan = cost.new_empty(cost.shape, dtype=accumulate_dtype(cost.dtype))
    rows, columns = plan.new_empty(kept, batch, n), plan.new_empty(kept + 1 if keep else 0, batch, m)
    return plan, rows, columns, torch.empty((), dtype=torch.int64)


@torch.library.custom_op("slotkernels::sinkhorn_plan_backward", mutates_args=())
def _backward(
    grad: Tensor,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    made: Tensor,
    eps: float,
) -> Tensor:
    """Gradient of the cost through all iterations, the last first; each one's softmaxes are computed again."""
    logits = cost.to(rows.dtype) / -eps
    a_log, b_log = _logs(a, cost, 1), _logs(b, cost, 2)
    buffer, last = torch.empty_like(logits), int(made)

    def scaled(u: Tensor, v: Tensor) -> Tensor:
        return torch.add(logits, u.unsqueeze(2), out=buffer).add_(v.unsqueeze(1)).exp_()

    if last == 0:
        return torch.zeros_like(cost)
    grad_logits = scaled(rows[last - 1], columns[last]) * grad
    grad_rows, grad_columns = grad_logits.sum(2), grad_logits.sum(1)
    for i in reversed(range(last)):
        # v = log b - log sum_i exp(logits + u), whose softmax over rows is exp(logits + u + v - log b).
        softmax = scaled(rows[i], _minus(columns[i + 1], b_log)).mul_(grad_columns.unsqueeze(1))
        grad_logits -= softmax
        grad_rows = grad_rows - softmax.sum(2)
        softmax = scaled(_minus(rows[i], a_log), columns[i]).mul_(grad_rows.unsqueeze(2))
        grad_logits -= softmax
        grad_columns, grad_rows = -softmax.sum(1), torch.zeros_like(grad_rows)
    return grad_logits.div_(-eps).to(cost.dtype)


def _minus(scaling: Tensor, logs: Tensor) -> Tensor:
    """Difference of logarithms, -inf where the weight is zero: that row or column takes no part."""
    return torch.where(logs == -math.inf, logs, scaling - logs)


@_backward.register_fake
def _(grad, cost, a, b, rows, columns, made, eps):
    return torch.empty_like(cost)


def _setup_context(ctx, inputs, output):
    cost, a, b, ctx.eps = inputs[:4]
    _, rows, columns, made = output
    ctx.save_for_backward(cost, a, b, rows, columns, made)
    ctx.mark_non_differentiable(rows, columns, made)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    return _backward(grad, *ctx.saved_tensors, ctx.eps), *(None,) * 6


_plan.register_autograd(_autograd, setup_context=_setup_context)
