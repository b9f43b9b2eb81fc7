"""A run directory: its configuration, its stages, and how they are opened again."""

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from interpreter.console import console
from interpreter.engine.checkpoint import TrainingState, load_checkpoint, newest_step, restore_weights
from interpreter.engine.precision import in_precision, resolve_precision
from interpreter.files import read_text, write_text
from interpreter.methods.interpreter.config import ImageTraining, StageName, VideoTraining
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.backbones import Backbone, load_backbone

T = TypeVar("T")

# Settings that may change between two calls on the same run directory.
FREE = {
    "run",
    "logging",
    "decoding",
    "compile",
    "cuda_graph",
    "recompute",
    "features",
    "cache",
    "steps",
    "allow_unfinished",
}
# Whole numbers that are no counts.
MAY_BE_ZERO = {"seed", "warmup_steps", "feature_layer"}


@dataclass
class RunConfig:
    """What ``config.json`` holds."""

    image: ImageTraining | None = None
    video: VideoTraining | None = None
    image_weights: str | None = None  # hash of the image stage that the video stage was trained on


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """Rebuild a (nested) dataclass from what :func:`dataclasses.asdict` and JSON made of it."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _restore(hints[name], value) for name, value in values.items()})


def _restore(hint: Any, value: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return from_dict(option, value)  # type: ignore[arg-type]
        if option is Path:
            return Path(value)
        if typing.get_origin(option) is tuple:
            return tuple(value)
    return value


def read_config(run: Path) -> RunConfig:
    """Read ``config.json``; an absent one is an empty configuration.

    Raises:
        ValueError: if it cannot be understood.
    """
    path = run / "config.json"
    if not path.exists():
        return RunConfig()
    try:
        return from_dict(RunConfig, json.loads(read_text(path)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a run ({error})") from error


def write_config(run: Path, config: RunConfig) -> None:
    """Write ``config.json`` atomically."""
    write_text(run / "config.json", json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def require_same(old: ImageTraining | VideoTraining | None, new: ImageTraining | VideoTraining) -> None:
    """Refuse to go on with settings that differ from those that a stage was started with.

    Raises:
        ValueError: names each setting that differs.
    """
    if old is None:
        return
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    changed = [f"{k} was {before[k]}, now {after[k]}" for k in after if before.get(k) != after[k]]
    if changed:
        raise ValueError(
            f"{new.run} was started with other settings: {'; '.join(changed)}. "
            "Use the same settings to go on, or another --run to start anew"
        )


def require_positive(config: ImageTraining | VideoTraining) -> None:
    """Refuse counts and sizes below 1, before anything is computed.

    Raises:
        ValueError: names the option.
    """
    for part in (config, *(getattr(config, f.name) for f in dataclasses.fields(config))):
        for option in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
            values = getattr(part, option.name)
            for value in values if isinstance(values, tuple) else (values,):
                if type(value) is int and value < 1 and option.name not in MAY_BE_ZERO:
                    raise ValueError(f"--{option.name.replace('_', '-')} must be at least 1, got {value}")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key not in FREE:
            flat |= _flat(value) if isinstance(value, dict) else {"--" + key.replace("_", "-"): value}
    return flat


def require_directory(run: Path) -> None:
    """Refuse a file as a run directory.

    Raises:
        NotADirectoryError: says what --run takes.
    """
    if run.is_file():
        raise NotADirectoryError(f"{run} is a file; --run takes the directory that interpreter.train made")


def require_run(run: Path) -> None:
    """Refuse a path where there is no run directory.

    Raises:
        FileNotFoundError: says which command makes one.
        NotADirectoryError: if ``run`` is a file.
    """
    require_directory(run)
    if not run.is_dir():
        raise FileNotFoundError(f"no run directory at {run}; make one with: python -m interpreter.train --run {run}")


def unfinished(run: Path, stage: StageName) -> str | None:
    """How far the training of a stage came, if it did not reach its last step; None if it did, or never began."""
    config, step = getattr(read_config(run), stage), newest_step(run / stage)
    if config is None or step == 0 or step >= config.optim.steps:
        return None
    return f"the {stage} stage of {run} is unfinished: step {step} of {config.optim.steps}"


def require_finished(run: Path, stage: StageName, allow_unfinished: bool = False) -> None:
    """Refuse to build on a stage that did not reach its last step; if that is allowed, say so on screen.

    Raises:
        ValueError: says how far it is, and what to do.
    """
    text = unfinished(run, stage)
    if text and not allow_unfinished:
        raise ValueError(
            f"{text}. Rerun its training command to finish it, or add --allow-unfinished to use it as it is"
        )
    if text:
        console.print(f"[yellow]{text}", highlight=False, soft_wrap=True)


def load_stage_state(run: Path, stage: StageName) -> TrainingState:
    """The newest checkpoint of a stage.

    Raises:
        FileNotFoundError: if the stage was not trained; says which command trains it.
        NotADirectoryError: if ``run`` is a file.
    """
    require_run(run)
    state = load_checkpoint(run / stage)
    if state is None:
        raise FileNotFoundError(
            f"{run} holds no trained {stage} stage; "
            f"train it with: python -m interpreter.train --stage {stage} --run {run}"
        )
    return state


def load_image_stage(run: Path, device: torch.device) -> tuple[ImageTraining, Backbone, ImageStage, str]:
    """Configuration, frozen backbone, image stage and the hash of its weights, of a run.

    Raises:
        FileNotFoundError: if the run has no trained image stage.
        ValueError: if its files are damaged or do not belong together.
    """
    state = load_stage_state(run, "image")
    config = read_config(run).image
    if config is None:
        raise ValueError(f"{run}/config.json does not describe the image stage that lies beside it")
    precision = resolve_precision(config.optim.precision, device)
    backbone = in_precision(load_backbone(config.backbone), precision).to(device)
    stage = ImageStage(config.model, backbone.dim, backbone.grid(config.data.frame_size)).to(device)
    restore_weights(stage, state.weights, run / "image")
    stage.slot_attention.iterations = config.model.inference_iterations
    return config, backbone, stage.requires_grad_(False).eval(), weights_hash(state)


def load_video_stage(run: Path, image_stage: ImageStage, image_weights: str, device: torch.device) -> VideoStage:
    """The trained video stage of a run.

    Raises:
        FileNotFoundError: if the run has none.
        ValueError: if it was trained on another image stage, or its files are damaged.
    """
    state = load_stage_state(run, "video")
    config = read_config(run)
    if config.video is None:
        raise ValueError(f"{run}/config.json does not describe the video stage that lies beside it")
    if config.image_weights != image_weights:
        raise ValueError(
            f"the video stage of {run} was trained on another image stage than the one there now; "
            f"delete {run / 'video'} and train it again: python -m interpreter.train --stage video --run {run}"
        )
    stage = VideoStage(config.video.model, image_stage.config.dim, config.video.num_frames).to(device)
    restore_weights(stage, state.weights, run / "video")
    stage.slot_attention.iterations = config.video.model.inference_iterations
    return stage.requires_grad_(False).eval()


def weights_hash(state: TrainingState) -> str:
    """Hash of the weights of a stage."""
    digest = hashlib.sha256()
    for name in sorted(state.weights):
        digest.update(name.encode())
        digest.update(state.weights[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
