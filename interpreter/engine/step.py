"""One training step: forward, backward, clipping and AdamW; eager, compiled, or replayed as one CUDA graph.

Everything a step changes is a tensor on the device, the number of the step and the learning rate too, so that one CUDA
graph holds all of it and the host reads nothing back. What is to be logged is summed up on the device and read when
somebody asks.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from slotkernels.ranges import annotate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from interpreter.configs import OptimConfig
from interpreter.engine.distributed import Ranks
from interpreter.engine.schedule import learning_rate
from interpreter.methods.interpreter.tasks import Task
from interpreter.models.autocast import autocast

EAGER_STEPS = 11  # before a graph is captured: kernels are compiled, buffers are made (DDP asks for 11)


class TrainingStep:
    """The optimiser and what a step does with it.

    Args:
        task: what a step computes.
        optim: optimiser settings; ``precision`` resolved.
        device: where to train.
        compiled: run forward and backward through torch.compile.
        captured: replay the whole step as one CUDA graph after ``EAGER_STEPS`` steps.
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
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            weight_decay=optim.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.optimizer.param_groups[0]["lr"] = self.rate
        self.number = torch.zeros((), dtype=torch.int64, device=device)  # steps done
        # The first step whose loss, or else whose gradient, was not finite, counted from 1. From then on weights rest.
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
        """Go on after ``step`` steps, in a logging window with the given sums."""
        self.number.fill_(step)
        self.sums = {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in sums.items()}

    def run(self, batch: tuple[Tensor, ...]) -> None:
        """Take a step; on a GPU it is under way when this returns."""
        with annotate("step"):
            if self.graph is None:
                self._compute(*batch)
            else:
                self.graph.run(batch)

    def read_sums(self) -> dict[str, float]:
        """Sums over the steps since :meth:`clear_sums`, means over ranks; waits for the device."""
        return self.ranks.mean(self.sums)

    def clear_sums(self) -> None:
        """Begin a logging window."""
        for value in self.sums.values():
            value.zero_()

    def failure(self) -> str | None:
        """What was not finite, and in which step; waits for the device."""
        for name, bad in (("loss", self.bad_loss), ("gradient", self.bad_gradient)):
            if bad.item():
                return f"the {name} of step {bad.item()} is not finite"
        return None

    def _compute(self, *batch: Tensor) -> None:
        self.rate.copy_(self.rates.index_select(0, self.number.view(1)).squeeze())
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for part, share, last in self._micro_batches(batch):
            # Gradients of several parts add up here, and travel once.
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
            # AdamW leaves everything as it is where this is 1, as for the gradient scaler that it was made for.
            self.optimizer.found_inf = (self.bad_loss + self.bad_gradient > 0).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        for name, value in {**sums, "loss": loss, "grad_norm": norm}.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
            self.sums[name] += value

    def _note(self, bad: Tensor, value: Tensor) -> None:
        bad.copy_(torch.where((bad == 0) & ~value.isfinite(), self.number, bad))

    def _micro_batches(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[tuple[Tensor, ...], float, bool]]:
        """Parts of the batch that are computed one after the other, their shares of it, and which is the last."""
        rows = len(batch[0])
        size = self.optim.micro_batch or rows
        for begin in range(0, rows, size):
            end = min(rows, begin + size)
            yield tuple(t[begin:end] for t in batch), (end - begin) / rows, end == rows


class _Forward(nn.Module):
    """What DistributedDataParallel wraps: a model and the function that computes its loss."""

    def __init__(self, model: nn.Module, function: Callable) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *batch: Tensor) -> Any:
        return self.function(*batch)


def _distributed(model: nn.Module, forward: Callable, device: torch.device) -> DistributedDataParallel:
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "broadcast_buffers": False, "static_graph": True}
    if device.type == "cpu":
        return DistributedDataParallel(_Forward(model, forward), **options)
    side = torch.cuda.Stream(device)  # or its hooks would wait for the default stream, which a capture forbids
    with torch.cuda.stream(side):
        return DistributedDataParallel(_Forward(model, forward), device_ids=[device.index], **options)


class StepGraph:
    """A function of tensors on a GPU, replayed as one CUDA graph.

    The first ``EAGER_STEPS`` calls run eagerly. The next one captures the function with its own input tensors, into
    which each batch is copied: inputs must keep their shapes and dtypes.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function, self.calls = function, 0
        self.side: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()

    def run(self, batch: tuple[Tensor, ...]) -> None:
        """Compute or replay.

        Raises:
            ValueError: if shapes or dtypes differ from those captured; says which.
        """
        self.calls += 1
        if self.side is None:
            # A capture needs a side stream, and warm-up should use the one that is captured. It is always the same
            # one: the caching allocator keeps free memory per stream, so a new stream would allocate everything anew.
            self.side = torch.cuda.Stream()
        if self.calls <= EAGER_STEPS:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.function(*batch)
            torch.cuda.current_stream().wait_stream(self.side)
            return
        if self.graph is None:
            self.inputs = tuple(t.clone() for t in batch)
            self.graph = torch.cuda.CUDAGraph()
            # "thread_local": threads of a loader may allocate and copy meanwhile.
            capture = torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local")
            with annotate("graph capture"), capture:
                self.function(*self.inputs)
        check_same_inputs(self.inputs, batch)
        for own, given in zip(self.inputs, batch, strict=True):
            own.copy_(given)
        with annotate("graph replay"):
            self.graph.replay()


def check_same_inputs(captured: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> None:
    """Raise ValueError, naming the first input that a captured step cannot take."""
    for index, (old, new) in enumerate(zip(captured, given, strict=True)):
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError(
                f"input {index} of the step is {list(new.shape)} {new.dtype}, but the step was captured in a CUDA "
                f"graph with {list(old.shape)} {old.dtype}; give batches of one size, or train with --no-cuda-graph"
            )


class Prefetched:
    """Batches of a task, made one step ahead on a side stream while the device computes."""

    def __init__(self, task: Task, device: torch.device, steps: int) -> None:
        self.task, self.steps = task, steps
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: tuple[int, tuple[Tensor, ...]] | None = None

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Inputs of a step."""
        if self.side is None:
            with annotate("loader"):
                return self.task.batch(step)
        batch = self._make(step) if self.ahead is None or self.ahead[0] != step else self.ahead[1]
        current = torch.cuda.current_stream()
        current.wait_stream(self.side)
        for tensor in batch:
            tensor.record_stream(current)
        return batch

    def prepare(self, step: int) -> None:
        """Begin the next batch; called when a step is under way."""
        if self.side is not None and step < self.steps:
            self.ahead = (step, self._make(step))

    def _make(self, step: int) -> tuple[Tensor, ...]:
        assert self.side is not None
        with annotate("loader"), torch.cuda.stream(self.side):
            return self.task.batch(step)
