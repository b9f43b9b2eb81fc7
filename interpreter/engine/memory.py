"""Computes how much memory a training step needs, without allocating it."""

import copy
import dataclasses
import resource
import sys
import weakref
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from interpreter.console import gigabytes
from interpreter.engine.step import TrainingStep
from interpreter.engine.task import Task


class LivingStorages(TorchDispatchMode):
    """Counts the bytes of all tensors that operators create or :meth:`note` gets, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known = WeakIdKeyDictionary()

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        self.known[storage] = True
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._died, storage.nbytes())

    def _died(self, size: int) -> None:
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out


def predicted_peak(task: Task) -> int:
    """Peak number of bytes in an eager step: weights, optimiser, gradients, activations and the batch.

    The step runs on tensors without data, whose storages are counted. Not counted: memory that libraries allocate
    internally, buffers inside the ops of ``slotkernels``, and a frozen backbone outside the model.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), LivingStorages() as living:
        # Under the fake mode copy.deepcopy makes parameters without data, but cannot copy buffers.
        buffers = {id(buffer): buffer.clone() for buffer in task.model.buffers()}
        fake = dataclasses.replace(task, model=copy.deepcopy(task.model, buffers))
        kinds = zip(task.shapes(), task.dtypes(), strict=True)
        inputs = tuple(torch.zeros(shape, dtype=dtype, device=task.device) for shape, dtype in kinds)
        step = TrainingStep(fake, task.optim, task.device)
        step.start(0, {})
        for _ in range(2):  # the second step has the optimiser's state from the start
            step.run(inputs)
    return living.peak


def count_parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def free_bytes(device: torch.device) -> int:
    """Free memory, of the GPU or of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def memory_notice(task: Task, remedies: str = "--micro-batch or a smaller --batch-size") -> str:
    """The memory that a step needs and, if that is more than is free, the options that reduce it."""
    needed, free = predicted_peak(task), free_bytes(task.device)
    notice = f"a step takes {gigabytes(needed)} of memory at its peak"
    if task.device.type == "cuda":
        weights = sum(p.numel() * p.element_size() for p in task.model.parameters())
        others = torch.cuda.memory_allocated(task.device) - weights
        notice += f", besides {gigabytes(others)} of backbone and data"
    if needed > free:
        notice += f", but {gigabytes(free)} are free: use {remedies}"
    return notice


def memory_report(device: torch.device) -> str:
    """The peak memory of tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return f"peak memory of tensors: {gigabytes(torch.cuda.max_memory_allocated(device))}"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if sys.platform == "darwin" else 1024
    return f"peak memory of the process, libraries and data included: {gigabytes(kilobytes * scale)}"
