"""Training of a stage of a method, from the options to the last step."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interpreter.configs import OptimConfig, StageConfig
from interpreter.console import console
from interpreter.data import Video
from interpreter.engine.checkpoint import checkpoints, restore_weights
from interpreter.engine.distributed import Ranks, device_of_rank, job_size, joined
from interpreter.engine.inputs import Inputs, InputSettings
from interpreter.engine.memory import count_parameters, memory_notice, memory_report
from interpreter.engine.picture_grid import sample_grid, stored_pictures
from interpreter.engine.precision import resolve_precision
from interpreter.engine.randomness import explained, repeatable
from interpreter.engine.run import (
    RunConfig,
    check_ranges,
    load_stage_state,
    read_config,
    require_directory,
    require_finished,
    require_run,
    require_same,
    to_dict,
    write_config,
)
from interpreter.engine.task import Task
from interpreter.engine.trainer import Trainer
from interpreter.engine.videos import open_videos
from interpreter.files import remove_leftovers
from interpreter.interrupts import Interrupted, StopRequest
from interpreter.locks import Lock, LockedError
from interpreter.methods.base import Context, Method, Stage
from interpreter.methods.runs import open_context
from interpreter.models.attention import choose_attention
from interpreter.models.backbones import VisionTransformer
from interpreter.segmentation import Segmentation
from interpreter.store.fill import Shard


def train(method: Method, stage: Stage[Any], config: StageConfig) -> None:
    """Train a stage of a run, from its newest checkpoint to its last step. One process, or job, at a time uses a run.

    Raises:
        Interrupted: if a signal stopped it; everything is saved.
        LockedError: if another process uses the run; says which.
        ValueError, FileNotFoundError: if something in the configuration, the data or the run directory is wrong.
        DivergedError: if the loss stops being finite.
        LoaderError: if a loader fails though no video is damaged, such as when one of its processes is killed.
        OSError: if the disk is full.
        NotRepeatableError: if an operator has no deterministic kernel on this GPU.
    """
    check_ranges(config)
    config = _with_absolute_paths(config)
    if config.optim.batch_size % job_size():
        raise ValueError(
            f"--batch-size {config.optim.batch_size} cannot be shared by {job_size()} processes; "
            f"give a multiple of {job_size()}"
        )
    if config.optim.micro_batch is not None and not stage.additive:
        raise ValueError(
            f"--micro-batch: the loss of {method.name} compares all samples of a batch, so it cannot be computed in "
            "parts; use --recompute or a smaller --batch-size"
        )
    if stage.needs(config):
        require_run(config.run)
    stop = StopRequest()
    with exclusive_run(config.run, [s.name for s in method.stages]), joined() as ranks, explained():
        console.quiet = not ranks.first
        device = device_of_rank()
        repeatable(device)
        train_stage(method, stage, config, stop, ranks, device)
        if stop.number:  # at the last step, too: a signal is meant to stop the commands that follow as well
            raise Interrupted(stop.number)
        console.print(memory_report(device))


def _with_absolute_paths(config: StageConfig) -> StageConfig:
    """What config.json records holds wherever a later command is started."""
    paths: dict[str, Any] = {name: value.resolve() for name in ("init", "cache") if (value := getattr(config, name))}
    data = getattr(config, "data", None)
    if data is not None and data.root is not None:
        paths["data"] = dataclasses.replace(data, root=data.root.resolve())
    return dataclasses.replace(config, **paths)


@contextlib.contextmanager
def exclusive_run(run: Path, stages: Sequence[str]) -> Iterator[None]:
    """Keep other trainings out of a run directory: all stages write its configuration, pictures and curves.

    Under torchrun the first process does so for all. A directory that was made for the lock is removed if nothing was
    written to it.

    Raises:
        LockedError: if another process uses the run.
        NotADirectoryError: if ``run`` is a file.
    """
    require_directory(run)
    if Shard.from_environment().rank > 0:
        yield
        return
    made, lock = [folder for folder in (run, *run.parents) if not folder.exists()], Lock(run / ".lock")
    if not lock.take():
        raise LockedError(f"{run} is in use by {lock.owner()}. Wait for it, stop it with kill, or give another --run")
    try:
        if lock.exclusive:
            for folder in (run, *(path for name in stages for path in run.glob(f"{name}*")), run / "samples"):
                remove_leftovers(folder)
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def train_stage(
    method: Method, stage: Stage[Any], config: StageConfig, stop: StopRequest, ranks: Ranks, device: torch.device
) -> None:
    """Train a stage; see :func:`train`. The order of events: earlier stages, model, data, inputs, training."""
    key, stored = stage.key(config), _stored_config(method, config.run)
    for needed in stage.needs(config):
        require_finished(config.run, needed, stored, getattr(config, "allow_unfinished", False))
    if checkpoints(config.run / key):
        require_same(stored.options(key, stage.config), config)
    context = open_context(method, stage, config, config.run, device, stored)
    stored = _with_stage(stored, key, stage, config, context)
    optim = dataclasses.replace(config.optim, precision=resolve_precision(config.optim.precision, device))
    # Before the data is opened, so that sizes which do not fit are refused at once.
    torch.manual_seed(optim.seed)
    model = stage.build(config, context).to(device)
    if config.init:
        restore_weights(model, load_stage_state(config.init, key, method.name).weights, config.init / key)
        require_finished(config.init, key, read_config(config.init), allow_unfinished=True)
    with ranks.first_goes_ahead():
        config.run.mkdir(parents=True, exist_ok=True)
        dataset = open_videos(context.data, config.run)
        if ranks.first:
            write_config(config.run, stored)
    settings = InputSettings(dataset, optim, ranks)
    with stage.inputs(config, context, settings) as inputs:
        console.print(
            f"{key} stage: {count_parameters(model) / 1e6:.1f} M parameters, {stage.describe(config, context)}, "
            f"{len(dataset)} videos, {device}, {optim.precision}"
        )
        if isinstance(context.backbone, VisionTransformer) and not context.earlier:
            console.print(f"positions of the backbone on a new patch grid: {context.backbone.positions}")
        task = Task(
            model,
            stage.loss,
            inputs,
            stage.noise(model),
            optim,
            device,
            ranks,
            stage.parameter_groups,
            stage.after_step,
        )
        console.print(memory_notice(task))
        if heads := stage.attention(config, context):
            console.print(_choose_attention(device, optim, ranks, *heads))
        captured = config.compile and config.cuda_graph and device.type == "cuda"
        picture = Pictures(stage, config, model, context, settings, inputs)
        directory = config.run / key
        Trainer(task, optim, config.logging, directory, device, config.compile, picture, captured, ranks).run(stop)


def _stored_config(method: Method, run: Path) -> RunConfig:
    """The configuration of a run, of this method.

    Raises:
        ValueError: if the run belongs to another method.
    """
    stored = read_config(run)
    if stored.stages and stored.method != method.name:
        raise ValueError(f"{run} is a run of the method {stored.method}; give another --run to train {method.name}")
    return dataclasses.replace(stored, method=method.name)


def _with_stage(stored: RunConfig, key: str, stage: Stage[Any], config: StageConfig, context: Context) -> RunConfig:
    """The run's configuration with this stage in it.

    Raises:
        ValueError: if it was begun on another earlier stage than the one that is there now.
    """
    trained_on = dict(stored.trained_on)
    for needed in stage.needs(config)[:1]:
        weights = context.earlier[needed].weights
        if checkpoints(config.run / key) and trained_on.get(key) != weights:
            raise ValueError(
                f"the {key} stage in {config.run} was trained on another {needed} stage than the one there now; "
                f"delete {config.run / key} to train it anew"
            )
        trained_on[key] = weights
    return dataclasses.replace(stored, stages={**stored.stages, key: to_dict(config)}, trained_on=trained_on)


def _choose_attention(
    device: torch.device, optim: OptimConfig, ranks: Ranks, heads: int, tokens: int, width: int
) -> str:
    """Choose the attention kernel by the largest self-attention of a step."""
    rows = optim.batch_size // ranks.world
    return choose_attention(device, optim.precision, (min(rows, optim.micro_batch or rows), heads, tokens, width))


@dataclasses.dataclass
class Pictures:
    """Draws the masks of the current weights on a few frames, from the cache where it holds what is needed."""

    stage: Stage[Any]
    config: StageConfig
    model: torch.nn.Module
    context: Context
    settings: InputSettings
    inputs: Inputs

    def __call__(self) -> np.ndarray:
        """A picture grid, uint8 [H, W, 3]."""
        segmenter = self.stage.segmenter(self.config, self.model, self.context)

        def segment(number: int, video: Video) -> Segmentation:
            encoded = self.inputs.encoded(number)
            return segmenter.segment(segmenter.encode(video) if encoded is None else encoded)

        videos, size = self.settings.dataset.videos, segmenter.frame_size
        digests = self.inputs.digests
        pictures = None if digests is None else stored_pictures(self.context.store, videos, digests, size)
        return sample_grid(segment, self.settings.dataset, size, pictures)
