"""Open the trained stages of a run: to train another stage on top of them, or to segment."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from interpreter.configs import FeatureStageConfig
from interpreter.engine.checkpoint import restore_weights
from interpreter.engine.distributed import device_of_rank
from interpreter.engine.precision import in_precision, resolve_precision
from interpreter.engine.run import (
    RunConfig,
    backbone_in_run,
    load_stage_state,
    read_config,
    require_finished,
    train_command,
    weights_hash,
)
from interpreter.methods.base import Context, Method, Segmenter, Stage, Trained
from interpreter.models.backbones import load_backbone


def open_context(
    method: Method, stage: Stage[Any], config: Any, run: Path, device: torch.device, stored: RunConfig | None = None
) -> Context:
    """Load what a stage builds on: its backbone, or all earlier stages.

    Raises:
        FileNotFoundError: if an earlier stage was not trained.
        ValueError: if files of the run are damaged or do not belong together, or the backbone cannot be loaded.
    """
    earlier: dict[str, Trained] = {}
    first: Context | None = None
    for key in stage.needs(config):
        context, trained = load_trained(method, run, key, device, stored)
        earlier |= {**context.earlier, key: trained}
        first = first or context
    if first is not None:
        return replace(first, store=config.cache or first.store, earlier=earlier)
    if not isinstance(config, FeatureStageConfig):
        raise TypeError(f"stage {stage.name} of {method.name} needs no other stage, so its options need a backbone")
    precision = resolve_precision(config.optim.precision, device)
    located = replace(config.backbone, backbone=backbone_in_run(config.backbone.backbone, run))
    backbone = in_precision(load_backbone(located), precision).to(device)
    return Context(run, device, precision, config.data, config.backbone, backbone, config.cache or run / "cache")


def needed_stages(method: Method, stage: Stage[Any], config: Any, stored: RunConfig) -> list[str]:
    """Keys of all stages that a stage builds on, directly or through another one, in the order of their training."""
    keys: list[str] = []
    for key in stage.needs(config):
        below = method.stage(key)
        options = stored.options(key, below.config)
        earlier = needed_stages(method, below, options, stored) if options else []
        keys += [k for k in (*earlier, key) if k not in keys]
    return keys


def load_trained(
    method: Method, run: Path, key: str, device: torch.device, stored: RunConfig | None = None
) -> tuple[Context, Trained]:
    """Load a trained stage, frozen and in evaluation mode, and what it was built on.

    Raises:
        FileNotFoundError: if it was not trained; the message contains the command that trains it.
        ValueError: if its files are damaged, or an earlier stage of the run has changed since it was trained.
    """
    state, stage = load_stage_state(run, key, method.name), method.stage(key)
    stored = stored or read_config(run)
    config = stored.options(key, stage.config)
    if config is None:
        raise ValueError(
            f"{run}/config.json does not describe the {key} stage, whose checkpoints are in {run / key}; restore the "
            f"file, or delete {run / key} and train it again: {train_command(method.name, key, run)}"
        )
    context = open_context(method, stage, config, run, device, stored)
    for needed in stage.needs(config)[:1]:
        if stored.trained_on.get(key) != context.earlier[needed].weights:
            raise ValueError(
                f"the {key} stage of {run} was trained on another {needed} stage than the one there now; "
                f"delete {run / key} and train it again: {train_command(method.name, key, run)}"
            )
    model = stage.build(config, context).to(device)
    restore_weights(model, state.weights, run / key)
    return context, Trained(config, model.requires_grad_(False).eval(), weights_hash(state))


def open_segmenter(
    method: Method,
    run: Path | None,
    settings: Any = None,
    frame_size: tuple[int, int] | None = None,
    device: torch.device | None = None,
    stored: RunConfig | None = None,
) -> Segmenter:
    """Open a segmenter. Prints a warning if the training of a stage is unfinished.

    Args:
        method: the method of the run.
        run: run directory; not used by a method without stages.
        settings: an instance of ``Method.settings``. Default: its defaults.
        frame_size: (H, W) that frames are resized to before the backbone. Default: as in training.
        device: device to compute on. Default: the GPU if there is one.
        stored: configuration of the run, if you have read it already.

    Raises:
        FileNotFoundError: if the run, or the stage that segments, does not exist.
        ValueError: if no run is given, or its files are damaged or do not belong together.
    """
    device, settings = device or device_of_rank(), method.settings() if settings is None else settings
    if not method.stages:
        assert method.open is not None, f"{method.name} has no stages, so it has to define open"
        return _with_valid_size(method.open(device, settings, frame_size))
    if run is None:
        raise ValueError(
            f"the method {method.name} has to be trained before it segments: give --run DIR, a trained run"
        )
    stored = stored or read_config(run)
    key = method.segmenting_stage(settings)
    stage = method.stage(key)
    options = stored.options(key, stage.config)
    for used in (*(needed_stages(method, stage, options, stored) if options else ()), key):
        require_finished(run, used, stored, allow_unfinished=True)
    context, trained = load_trained(method, run, key, device, stored)
    segmenter = stage.segmenter(trained.config, trained.model, context, settings, frame_size)
    segmenter.weights = {used: part.weights for used, part in {**context.earlier, key: trained}.items()}
    return _with_valid_size(segmenter)


def _with_valid_size(segmenter: Segmenter) -> Segmenter:
    """Return the segmenter. Raises a ValueError if its frame size does not fit its backbone, before any decoding."""
    segmenter.backbone.grid(segmenter.frame_size)
    return segmenter
