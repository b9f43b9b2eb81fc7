"""Checkpoints: weights, optimiser and counters of one stage in one safetensors file.

One file holds everything, so a kill between two writes cannot leave parts of two checkpoints. The two newest are kept.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from interpreter.files import written_whole

KEEP = 2


@dataclass
class TrainingState:
    """Everything that training needs to resume as if it had never stopped."""

    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    progress: dict[str, float] = field(default_factory=dict)  # sums of the current logging window


def checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a stage, oldest first."""
    return sorted(directory.glob("checkpoint-*.safetensors"))


def newest_step(directory: Path) -> int:
    """Step of the newest checkpoint of a stage; 0 if there is none."""
    paths = checkpoints(directory)
    return int(paths[-1].stem.removeprefix("checkpoint-")) if paths else 0


def save_checkpoint(directory: Path, state: TrainingState) -> Path:
    """Write ``checkpoint-STEP.safetensors``, and delete all but the newest checkpoints."""
    path = _write(directory / f"checkpoint-{state.step:08d}.safetensors", state)
    for old in checkpoints(directory)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def save_diverged(directory: Path, state: TrainingState) -> Path:
    """Write ``diverged-STEP.safetensors`` for inspection; training never resumes from it."""
    return _write(directory / f"diverged-{state.step:08d}.safetensors", state)


def save_weights(directory: Path, step: int, weights: dict[str, Tensor]) -> Path:
    """Write a checkpoint that holds only weights, for sharing. The same weights always give the same bytes."""
    path = directory / f"checkpoint-{step:08d}.safetensors"
    tensors = {f"weights.{name}": tensor.contiguous() for name, tensor in weights.items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, {"step": str(step)})  # one entry: the order of several is random
    return path


def _write(path: Path, state: TrainingState) -> Path:
    tensors = {f"weights.{k}": v.detach().cpu().contiguous() for k, v in state.weights.items()}
    tensors |= {f"optimizer.{k}": v.detach().cpu().contiguous() for k, v in state.optimizer.items()}
    metadata = {"step": str(state.step), "progress": json.dumps(state.progress)}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata)
    return path


def load_checkpoint(directory: Path) -> TrainingState | None:
    """The newest checkpoint of a stage, or None if there is none. The stage may be training at the same time.

    Raises:
        ValueError: if it is damaged; the message says what to do.
    """
    paths = checkpoints(directory)
    if not paths:
        return None
    state = TrainingState()
    try:
        with safe_open(paths[-1], framework="pt") as file:
            metadata = file.metadata()
            state.step, state.progress = int(metadata["step"]), json.loads(metadata.get("progress", "{}"))
            for key in file.keys():  # noqa: SIM118 (no mapping)
                group, name = key.split(".", 1)
                {"weights": state.weights, "optimizer": state.optimizer}[group][name] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        if not paths[-1].exists():  # training replaced it by a newer one after it was listed
            return load_checkpoint(directory)
        advice = (
            f"delete it to resume from {paths[-2].name}"
            if len(paths) > 1
            else "delete it to train this stage from the start"
        )
        raise ValueError(f"{paths[-1]} is damaged ({error}); {advice}") from error
    return state


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """State of the optimiser as ``{"PARAMETER/KEY": tensor}``."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Undo :func:`optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("/", 1)
        target = parameters[parameter]
        # A fused optimiser needs its step counter on the device of the parameter.
        optimizer.state[target][key] = tensor.to(target.device)


def restore_weights(model: nn.Module, weights: dict[str, Tensor], where: Path) -> None:
    """Load weights. If they do not fit, the error names the run and the difference."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the checkpoint in {where} belongs to another configuration: {reason}") from error
