"""The processes of a ``torchrun`` job: their ranks, their devices, and the numbers that they exchange."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=30)  # rank 0 may encode a data set while the other ranks wait


@dataclass(frozen=True)
class Ranks:
    """One process of ``world`` processes; by default the only one."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """The rows of a global batch that belong to this process."""
        size = batch // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def average(self, value: Tensor) -> Tensor:
        """Mean of a tensor over all processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Means of numbers over all processes, read from the device in one transfer."""
        if not values:
            return {}
        return dict(zip(values, self.average(torch.stack(list(values.values()))).tolist(), strict=True))

    def largest(self, values: list[float]) -> list[float]:
        """The largest of each number over all processes."""
        if self.world == 1:
            return values
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        all_values = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(all_values, dist.ReduceOp.MAX)
        return all_values.tolist()

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """A block that the first process finishes before the others enter it, so they find its files."""
        if not self.first:
            dist.barrier()
        yield
        if self.first and self.world > 1:
            dist.barrier()


def device_of_rank() -> torch.device:
    """The GPU of this process if there is one: the GPU LOCAL_RANK under ``torchrun``, else the first."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


class ProcessLostError(RuntimeError):
    """Another process of the job has ended."""


def job_size() -> int:
    """Number of processes that ``torchrun`` started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the job, if ``torchrun`` started one.

    Raises:
        ProcessLostError: if another process ended while this one waited for it.
    """
    world = job_size()
    if world == 1:
        yield Ranks()
        return
    device = device_of_rank()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), world)
    try:
        yield ranks
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ProcessLostError(
            f"process {ranks.rank} of {world} lost another one, whose own message says why; the newest checkpoint is "
            f"whole. Rerun the same command to continue from it ({str(error).splitlines()[0][:200]})"
        ) from error
    finally:
        dist.destroy_process_group()
