"""One training step: forward, backward, clipping and AdamW; eager, compiled, or replayed as one CUDA graph.

Everything that a step changes is a tensor on the device, also the number of the step and the learning rate. So a single
CUDA graph contains the whole step, and the host reads nothing back. Values to log are summed on the device and read
rarely.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from slotkernels.ranges import annotate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from interpreter.configs import OptimConfig
from interpreter.engine.cuda_graph import StepGraph
from interpreter.engine.distributed import Ranks
from interpreter.engine.schedule import learning_rate
from interpreter.engine.task import Task
from interpreter.models.autocast import autocast


class TrainingStep:
    """The optimiser, and the computation of a step.

    Args:
        task: the computation of a step.
        optim: optimiser settings; ``precision`` resolved.
        device: where to train.
        compiled: run forward and backward through torch.compile.
        captured: replay the whole step as one CUDA graph, after some eager steps (see :mod:`.cuda_graph`).
        ranks: the processes that share each batch; gradients are averaged over them.
    """

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        device: torch.device,
        compiled: bool = False,
        captured: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.task, self.optim, self.device, self.ranks = task, optim, device, ranks or Ranks()
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        rates = [learning_rate(step, optim) for step in range(optim.steps)]
        self.rates = torch.tensor(rates, dtype=torch.float32, device=device)
        groups = task.parameter_groups(task.model)
        self.scales = [(group.pop("lr_scale", 1.0), group.pop("starts_at", 0)) for group in groups]
        self.group_rates = [torch.zeros((), device=device) for _ in groups]
        self.optimizer = torch.optim.AdamW(
            groups,
            weight_decay=optim.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        for group, rate in zip(self.optimizer.param_groups, self.group_rates, strict=True):
            group["lr"] = rate
        self.number = torch.zeros((), dtype=torch.int64, device=device)  # steps done
        # The first step whose loss, or else whose gradient, was not finite, counted from 1. No later step updates
        # weights.
        self.bad_loss, self.bad_gradient = (torch.zeros_like(self.number) for _ in range(2))
        self.sums: dict[str, Tensor] = {}
        self.forward: Callable = task.forward
        if compiled:
            self.forward = torch.compile(task.forward, fullgraph=True, dynamic=False)
        self.no_sync: Callable[[], AbstractContextManager] = nullcontext
        if self.ranks.world > 1:
            self.forward = _distributed(task.model, self.forward, device)
            self.no_sync = self.forward.no_sync
        self.graph = StepGraph(self._compute) if captured else None

    def start(self, step: int, sums: dict[str, float]) -> None:
        """Resume after ``step`` steps, with the sums of the current logging window."""
        self.number.fill_(step)
        self.sums = {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in sums.items()}

    def run(self, batch: tuple[Tensor, ...]) -> None:
        """Take a step. On a GPU it is still running when this returns."""
        with annotate("step"):
            if self.graph is None:
                self._compute(*batch)
            else:
                self.graph.run(batch)

    def read_sums(self) -> dict[str, float]:
        """Sums over the steps since :meth:`clear_sums`, averaged over ranks. Waits for the device."""
        return self.ranks.mean(self.sums)

    def clear_sums(self) -> None:
        """Begin a logging window."""
        for value in self.sums.values():
            value.zero_()

    def failure(self) -> str | None:
        """A message if a loss or gradient was not finite, with its step. Waits for the device."""
        for name, bad in (("loss", self.bad_loss), ("gradient", self.bad_gradient)):
            if bad.item():
                return f"the {name} of step {bad.item()} is not finite"
        return None

    def _compute(self, *batch: Tensor) -> None:
        rate = self.rates.index_select(0, self.number.view(1)).squeeze()
        for group_rate, (scale, start) in zip(self.group_rates, self.scales, strict=True):
            group_rate.copy_(rate if scale == 1.0 else rate * scale)
            if start:  # weight decay is multiplied by the rate too
                group_rate *= self.number >= start
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for part, share, last in self._micro_batches(batch):
            # Gradients of several parts are summed here, and exchanged once.
            with nullcontext() if last else self.no_sync():
                with annotate("forward"), autocast(self.device, self.optim.precision):
                    loss, diagnostics = self.forward(*part)
                with annotate("backward"):
                    (loss * share).backward()
            for name, value in {"loss": loss.detach(), **diagnostics}.items():
                sums[name] = sums.get(name, 0.0) + value.double() * share
        with annotate("optimizer"):
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            if self.optim.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.optim.clip_norm, norm)
            self.number += 1
            loss = self.ranks.average(sums["loss"])
            self._note(self.bad_loss, loss)
            self._note(self.bad_gradient, norm)
            # Fused AdamW skips the update if this is 1. Usually GradScaler sets it.
            self.optimizer.found_inf = (self.bad_loss + self.bad_gradient > 0).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        if self.task.after_step is not None:
            self.task.after_step(self.task.model)
        for name, value in {**sums, "loss": loss, "grad_norm": norm}.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
            self.sums[name] += value

    def _note(self, bad: Tensor, value: Tensor) -> None:
        bad.copy_(torch.where((bad == 0) & ~value.isfinite(), self.number, bad))

    def _micro_batches(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[tuple[Tensor, ...], float, bool]]:
        """The parts of the batch that are computed in turn, their shares of it, and whether each is the last."""
        rows = len(batch[0])
        size = self.optim.micro_batch or rows
        for begin in range(0, rows, size):
            end = min(rows, begin + size)
            yield tuple(t[begin:end] for t in batch), (end - begin) / rows, end == rows


class _Forward(nn.Module):
    """The module that DistributedDataParallel wraps: a model and the function that computes its loss."""

    def __init__(self, model: nn.Module, function: Callable) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *batch: Tensor) -> Any:
        return self.function(*batch)


def _distributed(model: nn.Module, forward: Callable, device: torch.device) -> DistributedDataParallel:
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "broadcast_buffers": False, "static_graph": True}
    if device.type == "cpu":
        return DistributedDataParallel(_Forward(model, forward), **options)
    side = torch.cuda.Stream(device)  # else its hooks would wait for the default stream, which a capture forbids
    with torch.cuda.stream(side):
        return DistributedDataParallel(_Forward(model, forward), device_ids=[device.index], **options)


class Prefetched:
    """Batches of a task. Each is prepared on a side stream while the device computes the step before.

    Args:
        task: task whose batches are prepared.
        device: where to train.
        first: step to begin with.
    """

    def __init__(self, task: Task, device: torch.device, first: int) -> None:
        self.batches = task.batches(first)
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: tuple[Tensor, ...] | None = None

    def next(self) -> tuple[Tensor, ...]:
        """Inputs of the next step."""
        if self.side is None:
            with annotate("loader"):
                return next(self.batches)
        if self.ahead is None:
            self.prepare()
        batch, self.ahead = self.ahead, None
        assert batch is not None, "there are no further steps"
        current = torch.cuda.current_stream()
        current.wait_stream(self.side)
        for tensor in batch:
            tensor.record_stream(current)
        return batch

    def prepare(self) -> None:
        """Begin to prepare the next batch. Called while a step is running."""
        if self.side is not None:
            with annotate("loader"), torch.cuda.stream(self.side):
                self.ahead = next(self.batches, None)
