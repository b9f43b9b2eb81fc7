"""Transport plans on a CPU, in C++ (``csrc/cpu/transport_plan.cpp``): the reference's absorbed form.

An iteration reads the absorbed matrix once, for the update of the rows and the next one of the columns. Each thread
solves some problems; the rows of a large problem are shared by all threads. The backward pass is the reference's.
"""

import torch

from .problem import Problem, Solution
from .reference import sinkhorn_plan_backward, warn_of_error

__all__ = ["sinkhorn_plan", "sinkhorn_plan_backward"]


def sinkhorn_plan(problem: Problem) -> Solution:
    """As :func:`slotkernels.transport_plan.reference.sinkhorn_plan`."""
    plan, history, made, error = torch.ops.slotkernels_native.transport_plan(*problem)
    if problem.tolerance is not None and not error.item() <= problem.tolerance:
        warn_of_error(error.item(), problem.iterations, problem.tolerance)
    return Solution(plan, history, made)
