"""A stage for the training loop: a model, its batches and its loss."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from interpreter.configs import OptimConfig
from interpreter.engine.distributed import Ranks
from interpreter.engine.inputs import Inputs
from interpreter.engine.randomness import torch_generator

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def all_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """One parameter group with all trainable parameters."""
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


@dataclass
class Task:
    """The computation of a training step.

    Attributes:
        model: the module that is trained.
        loss: ``loss(model, *batch)`` returns a scalar and values to log.
        inputs: the inputs that the model trains on.
        noise: shape (without the batch) of standard normal noise, the last tensor of a batch; None for no noise.
        optim: optimiser settings; ``precision`` resolved.
        device: where to train.
        ranks: the processes that share each batch.
        parameter_groups: parameter groups of AdamW. Each may have a factor ``lr_scale`` of the learning rate, and a
            first step ``starts_at`` (counted from 0). Before this step its rate is 0, so its weights do not change.
        after_step: called with the model after each optimiser step.
    """

    model: nn.Module
    loss: Loss
    inputs: Inputs
    noise: tuple[int, ...] | None
    optim: OptimConfig
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    parameter_groups: Callable[[nn.Module], list[dict[str, Any]]] = all_parameters
    after_step: Callable[[nn.Module], None] | None = None

    @property
    def frames_per_step(self) -> int:
        """Number of frames in a step."""
        return self.optim.batch_size * self.inputs.frames_per_sample

    def batches(self, first: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batch of step ``first``, then of each next step: the rows of this process.

        A batch depends only on the number of its step, not on the step where the iteration began.
        """
        for step, tensors in zip(count(first), self.inputs.batches(range(first, self.optim.steps)), strict=False):
            yield (*tensors, *self._noise(step))

    def _noise(self, step: int) -> tuple[Tensor, ...]:
        if self.noise is None:
            return ()
        optim = self.optim
        generator = torch_generator(self.device, optim.seed, self.inputs.noise_stream, step)
        noise = torch.randn((optim.batch_size, *self.noise), generator=generator, device=self.device)
        return (noise[self.ranks.rows(optim.batch_size)],)

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors of a batch."""
        rows = self.optim.batch_size // self.ranks.world
        return [*self.inputs.shapes(rows), *([(rows, *self.noise)] if self.noise else [])]

    def dtypes(self) -> list[torch.dtype]:
        """Types of the tensors of a batch."""
        return [*self.inputs.dtypes(), *([torch.float32] if self.noise else [])]

    def forward(self, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and values to log."""
        return self.loss(self.model, *batch)
