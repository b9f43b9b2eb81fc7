"""The training loop of either stage: steps, logs, checkpoints, a clean stop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from interpreter.configs import LoggingConfig, OptimConfig
from interpreter.engine.checkpoint import (
    TrainingState,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    restore_weights,
    save_checkpoint,
    save_diverged,
)
from interpreter.engine.logging import RunLog
from interpreter.engine.schedule import learning_rate
from interpreter.engine.stopping import StopRequest
from interpreter.engine.tasks import Task
from interpreter.models.transformer import autocast


class DivergedError(RuntimeError):
    """The loss is not finite any more."""


@dataclass
class Trainer:
    """Train one stage of a run, from its newest checkpoint on.

    Args:
        task: what a step computes.
        optim: optimiser settings; ``precision`` resolved.
        logging: how often to log, sample and save.
        directory: RUN/image or RUN/video.
        device: where to train.
        compiled: run the step through torch.compile.
        samples: draws a picture grid of the current masks, uint8 [H, W, 3].
    """

    task: Task
    optim: OptimConfig
    logging: LoggingConfig
    directory: Path
    device: torch.device
    compiled: bool
    samples: Callable[[], np.ndarray]

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step; False if a signal stopped it before (everything is saved either way).

        Raises:
            DivergedError: if the loss is not finite; names the saved state.
            ValueError: if the newest checkpoint is damaged or belongs to another configuration.
        """
        model, optim = self.task.model, self.optim
        optimizer = torch.optim.AdamW(model.parameters(), lr=optim.start_lr, weight_decay=optim.weight_decay)
        state = load_checkpoint(self.directory)
        if state:
            restore_weights(model, state.weights, self.directory)
            restore_optimizer(optimizer, model, state.optimizer)
        step, window = (state.step, state.progress) if state else (0, {})
        forward = torch.compile(self.task.forward, fullgraph=True) if self.compiled else self.task.forward

        with RunLog(self.directory, step, optim.steps, self.task.frames_per_step) as log:
            if step == 0:
                log.picture(0, self.samples())
            while step < optim.steps and not stop.requested:
                lr = learning_rate(step, optim)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                values = self._step(forward, optimizer, step)
                step += 1
                for name, value in values.items():
                    window[name] = window.get(name, 0.0) + value
                if step % self.logging.log_every == 0 or step == optim.steps:
                    count = window.pop("count")
                    log.record(step, {name: total / count for name, total in window.items()} | {"lr": lr})
                    window = {}
                if step % self.logging.sample_every == 0 or step == optim.steps:
                    log.picture(step, self.samples())
                if step % self.logging.checkpoint_every == 0 or step == optim.steps:
                    self._save(step, optimizer, window)
                log.advance(step, values["seconds_for_batch"])
            if step < optim.steps:
                self._save(step, optimizer, window)
        return step >= optim.steps

    def _step(self, forward: Callable, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
        started = time.perf_counter()
        with autocast(self.device, self.optim.precision):
            batch = self.task.batch(step)
            loaded = time.perf_counter() - started
            loss, diagnostics = forward(*batch)
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(step, f"the loss of step {step + 1} is {value}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = self.task.model.parameters()
        limit = self.optim.clip_norm if self.optim.clip_norm is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not math.isfinite(norm.item()):
            raise self._diverged(step, f"the gradient of step {step + 1} is {norm.item()}")
        optimizer.step()
        values = {name: tensor.item() for name, tensor in diagnostics.items()}
        seconds = time.perf_counter() - started
        times = {"seconds_per_step": seconds, "seconds_for_batch": loaded}
        return {"loss": value, "grad_norm": norm.item(), **values, **times, "count": 1.0}

    def _save(self, step: int, optimizer: torch.optim.Optimizer, window: dict[str, float]) -> None:
        model = self.task.model
        # A checkpoint must never hold what training cannot go on from: the loss would tell one step too late.
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise self._diverged(step, f"step {step} left weights that are not finite")
        state = TrainingState(step, model.state_dict(), optimizer_tensors(optimizer, model), window)
        save_checkpoint(self.directory, state)

    def _diverged(self, step: int, what: str) -> DivergedError:
        path = save_diverged(self.directory, TrainingState(step, self.task.model.state_dict()))
        return DivergedError(
            f"{what}; the weights at that point are in {path}, checkpoints are from before. Start anew, with another "
            f"--run or after deleting {self.directory}, with a lower --peak-lr, --clip-norm 1 or --precision fp32"
        )
