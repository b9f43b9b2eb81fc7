"""Gather rows and sums from all processes of a job, for losses that are not means over samples."""

import torch
import torch.distributed as dist
from torch import Tensor


def own_rows(count: int) -> slice:
    """The rows of :func:`gather_rows` that come from this process, if each process has ``count`` rows."""
    rank = dist.get_rank() if world_size() > 1 else 0
    return slice(rank * count, (rank + 1) * count)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [n, ...] of all processes, in the order of ranks: [world·n, ...]. Without a job, the rows themselves.

    Differentiable: the gradient of a row is the sum of its gradients in all processes. DistributedDataParallel averages
    gradients over processes; those of a mean loss then equal the gradients of one process with the whole batch.

    Args:
        rows: rows of this process, with the same shape in all processes.
    """
    return rows if world_size() == 1 else _gather(rows.contiguous(), world_size())


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without a gradient; the tensor itself without a job.

    Use it, for example, for a loss that is divided by a count over the whole batch.

    Args:
        value: value of this process, with the same shape in all processes.
    """
    value = value.detach()
    return value if world_size() == 1 else _sum(value)


def world_size() -> int:
    """How many processes the job has; 1 without a job."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# Registered ops, because torch.compile cannot trace a collective with a gradient.
@torch.library.custom_op("interpreter::gather_rows", mutates_args=())
def _gather(rows: Tensor, world: int) -> Tensor:
    gathered = rows.new_empty(world * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows)
    return gathered


@_gather.register_fake
def _(rows: Tensor, world: int) -> Tensor:
    return rows.new_empty(world * len(rows), *rows.shape[1:])


@torch.library.custom_op("interpreter::sum_own_rows", mutates_args=())
def _sum_own(grad: Tensor, world: int) -> Tensor:
    """The sum over processes of this process's rows of ``grad``."""
    total = grad.contiguous().clone()
    dist.all_reduce(total)
    return total[own_rows(len(total) // world)].clone()


@_sum_own.register_fake
def _(grad: Tensor, world: int) -> Tensor:
    return grad.new_empty(len(grad) // world, *grad.shape[1:])


@torch.library.custom_op("interpreter::sum_over_ranks", mutates_args=())
def _sum(value: Tensor) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@_sum.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


def _remember(ctx, inputs: tuple[Tensor, int], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    ctx.world = inputs[1]


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
    return _sum_own(grad, ctx.world), None


_gather.register_autograd(_backward, setup_context=_remember)
