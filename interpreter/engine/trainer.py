"""The training loop: steps, records, picture grids, checkpoints, and stopping after a signal."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

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
from interpreter.engine.distributed import Ranks
from interpreter.engine.records import NoLog, RunLog
from interpreter.engine.schedule import learning_rate
from interpreter.engine.step import Prefetched, TrainingStep
from interpreter.engine.task import Task
from interpreter.interrupts import Interrupted, StopRequest

# How often the processes of a job check whether any of them received a signal. torchrun ends all of them after 30 s.
AGREE_SECONDS, AGREE_STEPS = 2.0, 10


class DivergedError(RuntimeError):
    """The loss or a gradient is no longer finite."""


@dataclass
class LogWindow:
    """Steps and seconds since the last record, on the host. (The step has the sums on the device.)"""

    count: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0  # seconds spent on waiting for batches

    def add(self, seconds: float, waited: float) -> None:
        """Count a step."""
        self.count, self.seconds, self.waited = self.count + 1, self.seconds + seconds, self.waited + waited


@dataclass
class Trainer:
    """Trains a stage of a run, starting at its newest checkpoint.

    Args:
        task: the computation of a step.
        optim: optimiser settings; ``precision`` resolved.
        logging: how often to write records, picture grids and checkpoints, and which trackers to use.
        directory: RUN/STAGE.
        device: where to train.
        compiled: run the step through torch.compile.
        captured: replay the step as one CUDA graph.
        samples: returns a picture grid of the current masks, uint8 [H, W, 3].
        ranks: the processes that train together; the first one writes.
        options: options of the stage, with the version of the code, for the trackers.
    """

    task: Task
    optim: OptimConfig
    logging: LoggingConfig
    directory: Path
    device: torch.device
    compiled: bool
    samples: Callable[[], np.ndarray]
    captured: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    options: Mapping[str, Any] = field(default_factory=dict)
    _agreed: tuple[int, float] = field(default=(0, 0.0), init=False)  # step and time of the last check of all processes
    _agree_at: int = field(default=0, init=False)  # step of the next check

    def run(self, stop: StopRequest) -> bool:
        """Train to the last step. Returns False if a signal stopped it earlier; everything is saved in both cases.

        Args:
            stop: records signals from the first step on. Before that there is nothing to save, so signals interrupt at
                once.

        Raises:
            DivergedError: if the loss is not finite; names the saved state.
            ValueError: if the newest checkpoint is damaged or belongs to another configuration.
        """
        optim, state = self.optim, load_checkpoint(self.directory)
        if state:
            restore_weights(self.task.model, state.weights, self.directory)
        step = TrainingStep(self.task, optim, self.device, self.compiled, self.captured, self.ranks)
        if state:
            restore_optimizer(step.optimizer, self.task.model, state.optimizer)
        done, sums = (state.step, state.progress) if state else (0, {})
        window = LogWindow(*(sums.pop(f.name, 0.0) for f in fields(LogWindow)))
        step.start(done, sums)
        batches = Prefetched(self.task, self.device, done)

        with ExitStack() as noted, self._log(done) as log:  # signals are recorded until the log is closed
            first, sampled = done, done % self.logging.sample_every == 0 or done == optim.steps
            if done == 0 or (sampled and not log.has_picture(done)):  # it may have stopped while drawing
                self._picture(log, done, stop)
            while done < optim.steps and not self._stopped(stop, done):
                started = time.perf_counter()
                batch = batches.next()
                waited = time.perf_counter() - started
                step.run(batch)
                done += 1
                if done == first + 1:
                    noted.enter_context(stop)
                batches.prepare()
                log_now, draw_now, save_now = self._due(done)
                if log_now or draw_now or save_now or self.device.type == "cpu":  # a GPU does not wait in between
                    self._check(step)
                window.add(time.perf_counter() - started, waited)
                if log_now:
                    log.record(done, self._values(done, step, window))
                    step.clear_sums()
                    window = LogWindow()
                if draw_now:
                    self._picture(log, done, stop)
                if save_now:
                    self._save(done, step, window)
                log.advance(done, waited)
            if done < optim.steps:
                self._check(step)
                self._save(done, step, window)
        return done >= optim.steps

    def _due(self, done: int) -> tuple[bool, bool, bool]:
        """Whether to write a record, a picture grid and a checkpoint after ``done`` steps."""
        every, last = self.logging, done == self.optim.steps
        log, draw, save = (done % n == 0 or last for n in (every.log_every, every.sample_every, every.checkpoint_every))
        return log, draw, save

    def _values(self, done: int, step: TrainingStep, window: LogWindow) -> dict[str, float]:
        """A record: means since the last record."""
        values = {name: total / window.count for name, total in step.read_sums().items()}
        return values | {
            "seconds_per_step": window.seconds / window.count,
            "seconds_for_batch": window.waited / window.count,
            "lr": learning_rate(done - 1, self.optim),
        }

    def _log(self, done: int) -> RunLog | NoLog:
        if not self.ranks.first:
            return NoLog()
        steps, frames = self.optim.steps, self.task.frames_per_step
        return RunLog(self.directory, done, steps, frames, self.logging.log_to, self.options)

    def _picture(self, log: RunLog | NoLog, done: int, stop: StopRequest) -> None:
        if not isinstance(log, RunLog):
            return
        try:
            with stop.interruptible():  # pictures of long videos take long
                image = self.samples()
        except Interrupted:
            if not stop.number:  # no step was taken yet
                raise
        else:
            log.picture(done, image)

    def _stopped(self, stop: StopRequest, done: int) -> bool:
        """Whether to stop. All processes stop after the same step."""
        if self.ranks.world == 1:
            return stop.number > 0
        if done < self._agree_at:
            return False
        (step, since), now = self._agreed, time.perf_counter()
        pace = (now - since) / (done - step) if done > step else AGREE_SECONDS
        number, pace = self.ranks.largest([stop.number, pace])
        self._agreed, self._agree_at = (done, now), done + min(AGREE_STEPS, max(1, int(AGREE_SECONDS / pace)))
        if number:  # else a signal that arrived in between is handled at the next check
            stop.number = int(number)
        return number > 0

    def _check(self, step: TrainingStep) -> None:
        failure = step.failure()
        if failure is not None:
            number = int(step.bad_loss.item() or step.bad_gradient.item())
            raise self._diverged(number - 1, failure)

    def _save(self, done: int, step: TrainingStep, window: LogWindow) -> None:
        model, progress = self.task.model, step.read_sums() | asdict(window)
        # A checkpoint must never contain weights that are not finite. The loss would show this one step too late.
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise self._diverged(done, f"step {done} left weights that are not finite")
        if self.ranks.first:
            state = TrainingState(done, model.state_dict(), optimizer_tensors(step.optimizer, model), progress)
            save_checkpoint(self.directory, state)

    def _diverged(self, step: int, what: str) -> DivergedError:
        path = self.directory / f"diverged-{step:08d}.safetensors"
        if self.ranks.first:
            save_diverged(self.directory, TrainingState(step, self.task.model.state_dict()))
        return DivergedError(
            f"{what}; the weights of this step are in {path}, checkpoints are from earlier steps. Start a new training "
            f"(with another --run, or after deleting {self.directory}) with a lower --peak-lr, --clip-norm 1 or "
            "--precision fp32"
        )
