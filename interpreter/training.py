"""Trains a stage of a method, from the options to the last step."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interpreter.configs import OptimConfig, StageConfig
from interpreter.console import console
from interpreter.data import Video, VideoDataset
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
from interpreter.engine.trackers import flat, require_trackers
from interpreter.engine.trainer import Trainer
from interpreter.engine.videos import open_videos
from interpreter.evaluation.provenance import code_version
from interpreter.files import remove_leftovers
from interpreter.hub.contents import BUNDLED
from interpreter.hub.fetching import fetch, local_run
from interpreter.hub.names import is_hub_name, parse_name, pinned_name
from interpreter.interrupts import Interrupted, StopRequest
from interpreter.locks import Lock, LockedError
from interpreter.methods.base import Context, Method, Stage
from interpreter.methods.runs import needed_stages, open_context
from interpreter.models.attention import choose_attention
from interpreter.models.backbones import VisionTransformer
from interpreter.segmentation import Segmentation
from interpreter.store.fill import Shard


def train(method: Method, stage: Stage[Any], config: StageConfig) -> None:
    """Train a stage of a run, from its newest checkpoint to its last step. One process or job at a time can use a run.

    Raises:
        Interrupted: if a signal stopped it; everything is saved.
        LockedError: if another process uses the run; names the process.
        ValueError, FileNotFoundError: if something in the configuration, the data or the run directory is wrong.
        DivergedError: if the loss or a gradient is not finite.
        LoaderError: if a loader fails for another reason than a damaged video, such as a process that was killed.
        OSError: if the disk is full.
        NotRepeatableError: if an operator has no deterministic kernel on this GPU.
    """
    _check_options(method, stage, config)
    config = _with_absolute_paths(config)
    stop = StopRequest()
    with exclusive_run(config.run, [s.name for s in method.stages]), joined() as ranks, explained():
        console.quiet = not ranks.first
        device = device_of_rank()
        with ranks.first_goes_ahead():
            config = _with_pinned_init(method, stage, config)
        if config.optim.deterministic:
            repeatable(device)
        train_stage(method, stage, config, stop, ranks, device)
        if stop.number:  # also after the last step, because the signal must stop the following commands too
            raise Interrupted(stop.number)
        console.print(memory_report(device))


def _check_options(method: Method, stage: Stage[Any], config: StageConfig) -> None:
    """Check the options before anything is opened or written.

    Raises:
        ValueError: if an option is invalid; names it.
        FileNotFoundError, NotADirectoryError: if a run that must exist does not.
    """
    check_ranges(config)
    require_trackers(config.logging.log_to)
    if config.optim.batch_size % job_size():
        raise ValueError(
            f"--batch-size {config.optim.batch_size} cannot be shared by {job_size()} processes; "
            f"give a multiple of {job_size()}"
        )
    if config.optim.micro_batch is not None and not stage.additive:
        raise ValueError(
            f"--micro-batch: the loss of {method.name} compares all samples of a batch, so it cannot be computed in "
            f"parts; use {ways_to_save_memory(stage, config)}"
        )
    if is_hub_name(config.run):
        raise ValueError(
            f"--run {config.run}: a run of the hub is not trained further; to start from its weights, give --run DIR "
            f"--init {config.run}"
        )
    if stage.needs(config):
        require_run(config.run, method.name)
    if (other := _run_to_start_from(stage, config)) and not is_hub_name(other):
        require_run(other, method.name)


def _run_to_start_from(stage: Stage[Any], config: StageConfig) -> Path | None:
    """The run of ``--init``; None if the stage resumes, because its weights then come from its own checkpoint."""
    return None if checkpoints(config.run / stage.key(config)) else config.init


def ways_to_save_memory(stage: Stage[Any], config: StageConfig) -> str:
    """The options of a stage that reduce the memory of a step, for a message."""
    options = ["--micro-batch"] if stage.additive else []
    if hasattr(getattr(config, "model", None), "recompute"):
        options.append("--recompute")
    return " or ".join(filter(None, (", ".join(options), "a smaller --batch-size")))


def _with_absolute_paths(config: StageConfig) -> StageConfig:
    """The options with absolute paths for config.json, because later commands may start in another directory."""
    paths: dict[str, Any] = {
        name: value.resolve()
        for name in ("init", "cache")
        if (value := getattr(config, name)) and not is_hub_name(value)
    }
    data = getattr(config, "data", None)
    if data is not None and data.root is not None:
        paths["data"] = dataclasses.replace(data, root=data.root.resolve())
    backbone = getattr(config, "backbone", None)
    if backbone is not None and backbone.backbone != BUNDLED and (place := Path(backbone.backbone)).exists():
        # Links are not resolved: they have the right suffix, but the files in the cache of the hub's client have none.
        paths["backbone"] = dataclasses.replace(backbone, backbone=str(place.absolute()))
    return dataclasses.replace(config, **paths)


def _with_pinned_init(method: Method, stage: Stage[Any], config: StageConfig) -> StageConfig:
    """The options with the commit of an ``--init`` of the hub, so that later commits do not change where a run started.

    A stage that resumes keeps the commit that it started from.
    """
    if config.init is None or not is_hub_name(config.init):
        return config
    name = parse_name(config.init)
    if _run_to_start_from(stage, config):
        return dataclasses.replace(config, init=Path(str(pinned_name(fetch(name)))))
    started = _stored_config(method, config.run).options(stage.key(config), stage.config)
    before = parse_name(started.init) if started and started.init and is_hub_name(started.init) else None
    same = before and before.repository == name.repository and (not name.is_pinned or before == name)
    return dataclasses.replace(config, init=Path(str(before if same else name)))


@contextlib.contextmanager
def exclusive_run(run: Path, stages: Sequence[str]) -> Iterator[None]:
    """Lock a run directory against other trainings, because all stages write its configuration, pictures and curves.

    Under torchrun the first process holds the lock for all. A directory that was created for the lock is removed again
    if nothing else was written to it.

    Args:
        run: run directory.
        stages: names of the method's stages. Partial files of killed processes are deleted from their directories.

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
    """Train a stage; see :func:`train`. In this order: earlier stages, model, data, inputs, training."""
    key, stored = stage.key(config), _stored_config(method, config.run)
    for needed in needed_stages(method, stage, config, stored):
        require_finished(config.run, needed, stored, getattr(config, "allow_unfinished", False))
    if checkpoints(config.run / key) and (before := stored.options(key, stage.config)):
        require_same(_with_absolute_paths(before), config)
    context = open_context(method, stage, config, config.run, device, stored)
    stored = _with_stage(stored, key, stage, config, context)
    # config.json keeps the option --precision: "auto" may choose another precision on the machine that resumes the run.
    optim = dataclasses.replace(config.optim, precision=resolve_precision(config.optim.precision, device))
    model = _build(method, stage, config, context)  # before the data is opened, so that wrong sizes fail at once
    with ranks.first_goes_ahead():
        config.run.mkdir(parents=True, exist_ok=True)
        dataset = open_videos(context.data, config.run)
        if ranks.first:
            write_config(config.run, stored)
    with stage.inputs(config, context, InputSettings(dataset, optim, ranks)) as inputs:
        groups, after = stage.parameter_groups, stage.after_step
        task = Task(model, stage.loss, inputs, stage.noise(model), optim, device, ranks, groups, after)
        _print_facts(stage, config, context, task, len(dataset))
        if heads := stage.attention(config, context):
            console.print(_choose_attention(device, optim, ranks, *heads))
        captured = config.compile and config.cuda_graph and device.type == "cuda"
        pictures = Pictures(stage, config, model, context, dataset, inputs)
        directory, options = config.run / key, _options_for_trackers(method, key, config)
        trainer = Trainer(
            task, optim, config.logging, directory, device, config.compile, pictures, captured, ranks, options
        )
        trainer.run(stop)


def _build(method: Method, stage: Stage[Any], config: StageConfig, context: Context) -> torch.nn.Module:
    """The module with the initial weights: random, or from ``--init``."""
    torch.manual_seed(config.optim.seed)
    model = stage.build(config, context).to(context.device)
    if other := _run_to_start_from(stage, config):
        key, other = stage.key(config), local_run(other)
        restore_weights(model, load_stage_state(other, key, method.name).weights, other / key)
        require_finished(other, key, read_config(other), allow_unfinished=True)
    return model


def _print_facts(stage: Stage[Any], config: StageConfig, context: Context, task: Task, videos: int) -> None:
    """Print the stage, its data and device, and the memory of a step."""
    console.print(
        f"{stage.key(config)} stage: {count_parameters(task.model) / 1e6:.1f} M parameters, "
        f"{stage.describe(config, context)}, {videos} videos, {task.device}, {task.optim.precision}"
    )
    if isinstance(context.backbone, VisionTransformer) and not context.earlier:
        console.print(f"positions of the backbone on a new patch grid: {context.backbone.positions}")
    console.print(memory_notice(task, ways_to_save_memory(stage, config)))


def _stored_config(method: Method, run: Path) -> RunConfig:
    """The configuration of a run of this method; an empty one if the run is new.

    Raises:
        ValueError: if the run belongs to another method.
    """
    stored = read_config(run)
    if stored.stages and stored.method != method.name:
        raise ValueError(
            f"{run} is a run of the method {stored.method}; give another --run to train {method.name}, or --method "
            f"{stored.method} to train this one"
        )
    return dataclasses.replace(stored, method=method.name)


def _with_stage(stored: RunConfig, key: str, stage: Stage[Any], config: StageConfig, context: Context) -> RunConfig:
    """The run's configuration with this stage in it.

    Raises:
        ValueError: if checkpoints of this stage were trained on other weights of the earlier stage.
    """
    trained_on = dict(stored.trained_on)
    for needed in stage.needs(config)[:1]:
        weights = context.earlier[needed].weights
        if checkpoints(config.run / key) and trained_on.get(key) != weights:
            raise ValueError(
                f"the {key} stage in {config.run} was trained on another {needed} stage than the one there now; "
                f"delete {config.run / key} to train it from the start"
            )
        trained_on[key] = weights
    return dataclasses.replace(stored, stages={**stored.stages, key: to_dict(config)}, trained_on=trained_on)


def _options_for_trackers(method: Method, key: str, config: StageConfig) -> dict[str, Any]:
    """The options of a stage that trackers record, with method, stage and version of the code."""
    return {"method": method.name, "stage": key, "code": code_version(), **flat(to_dict(config))}


def _choose_attention(
    device: torch.device, optim: OptimConfig, ranks: Ranks, heads: int, tokens: int, width: int
) -> str:
    """Choose the attention kernel for the largest self-attention of a step."""
    rows = optim.batch_size // ranks.world
    return choose_attention(device, optim.precision, (min(rows, optim.micro_batch or rows), heads, tokens, width))


@dataclasses.dataclass
class Pictures:
    """Draws the masks of the current weights on a few frames. Decodes nothing if the cache has what is needed."""

    stage: Stage[Any]
    config: StageConfig
    model: torch.nn.Module
    context: Context
    dataset: VideoDataset
    inputs: Inputs

    def __call__(self) -> np.ndarray:
        """A picture grid, uint8 [H, W, 3]."""
        segmenter = self.stage.segmenter(self.config, self.model, self.context)

        def segment(number: int, video: Video) -> Segmentation:
            encoded = self.inputs.encoded(number)
            return segmenter.segment(segmenter.encode(video) if encoded is None else encoded)

        size, digests = segmenter.frame_size, self.inputs.digests
        pictures = None if digests is None else stored_pictures(self.context.store, self.dataset.videos, digests, size)
        return sample_grid(segment, self.dataset, size, pictures)
