"""A stage as the training loop sees it: a model, its batches and its loss."""

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
    """One parameter group of all parameters that need a gradient."""
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


@dataclass
class Task:
    """What a step computes.

    Attributes:
        model: what is trained.
        loss: ``loss(model, *batch)`` is a scalar and numbers to log.
        inputs: what the model trains on.
        noise: shape, without the batch, of standard normal noise that is the last tensor of a batch; None for none.
        optim: optimiser settings; ``precision`` resolved.
        device: where to train.
        ranks: the processes that share each batch.
        parameter_groups: of AdamW; each may have a factor ``lr_scale`` of the learning rate, and a step ``starts_at``,
            counted from 0, up to which its rate is 0: its weights stay as they are, and are not decayed.
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
        """Frames that a step looks at."""
        return self.optim.batch_size * self.inputs.frames_per_sample

    def batches(self, first: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batch of step ``first``, of the next one, and so on: this process's rows of each.

        A batch is a function of the number of its step, wherever the iteration began.
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
        """Loss and numbers to log."""
        return self.loss(self.model, *batch)
