"""Launches the Triton kernel of the transport plan: a program for each problem, one launch for all iterations.

With a tolerance there is a launch for every 10 iterations, and the host reads the errors between them. The backward
pass is the reference's.
"""

import torch
import triton

from .._triton import launch
from .kernels import plan_kernel
from .problem import Problem, Solution
from .reference import CHECK_EVERY, LOG2E, sinkhorn_plan_backward, warn_of_error

__all__ = ["sinkhorn_plan", "sinkhorn_plan_backward"]

TILE = 8192  # costs in registers: 16 for each thread of 16 warps, and as many sums
# If the number of columns is not a multiple of this, costs are read one by one. Their addresses take as many registers,
# so a tile is half as large.
ALIGNED = 16
PER_WARP = 256  # costs of a smaller tile


def sinkhorn_plan(problem: Problem) -> Solution:
    """As :func:`slotkernels.transport_plan.reference.sinkhorn_plan`."""
    cost = problem.cost.contiguous()
    a, b = (None if t is None else t.contiguous() for t in problem[1:3])
    iterations, tolerance = problem.iterations, problem.tolerance
    batch, n, m = cost.shape
    plan, row_potentials, column_potentials, errors = (
        cost.new_empty(shape, dtype=torch.float32) for shape in (cost.shape, (batch, n), (batch, m), (batch,))
    )
    history = cost.new_zeros((iterations if problem.keep else 0, batch, n + m), dtype=torch.float64)
    columns = triton.next_power_of_2(m)
    tile = TILE if m % ALIGNED == 0 else TILE // 2
    rows = min(triton.next_power_of_2(n), max(1, tile // columns))
    warps = max(1, min(16, rows * columns // PER_WARP))
    made, error = 0, 0.0
    while made < iterations:
        count = iterations if tolerance is None else min(iterations - made, CHECK_EVERY)
        if batch:
            launch(
                plan_kernel, (batch,),
                cost, a, b, plan, history[made:], row_potentials, column_potentials, errors,
                batch, n, m, count, LOG2E / problem.eps,
                RESUME=made > 0, KEEP=problem.keep, ONCE=rows >= n, ROWS=rows, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
        made += count
        if tolerance is not None:
            error = float(errors.max()) if batch else 0.0
            if error <= tolerance:
                break
            if made == iterations:
                warn_of_error(error, iterations, tolerance)
    return Solution(plan, history, torch.full((1,), made, device=cost.device))
