"""A run directory: its configuration, and the checkpoints of its stages."""

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from interpreter.console import console
from interpreter.engine.checkpoint import TrainingState, load_checkpoint, newest_step
from interpreter.files import read_text, write_text

T = TypeVar("T")

FORMAT = 2
DEFAULT_METHOD = "interpreter"  # of runs and commands that name no method
RENAMED = {"samples": "draws"}  # old names of options in format 1
WITHIN_RUN = "run:"  # prefix of a backbone that is stored in the run directory
BACKBONE_FOLDER = "backbone"
BACKBONE_WEIGHTS = "weights.safetensors"  # an official DINOv2 checkpoint in that folder


@dataclass
class RunConfig:
    """The contents of ``config.json``.

    Attributes:
        method: name of the method.
        stages: options of each stage whose training has begun, by key, in JSON's types.
        trained_on: for each stage that was trained on an earlier stage, the hash of the earlier stage's weights.
        path: path of the file, for messages.
    """

    method: str = DEFAULT_METHOD
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained_on: dict[str, str] = field(default_factory=dict)
    path: Path = field(default=Path("config.json"), compare=False)

    def options(self, key: str, kind: type[T]) -> T | None:
        """Options of a stage as a dataclass; None if its training has not begun.

        Raises:
            ValueError: if the file has options of another kind.
        """
        if key not in self.stages:
            return None
        try:
            return from_dict(kind, self.stages[key])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.path} is not the configuration of a run: its {key} stage ({error})") from error


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """Rebuild a (nested) dataclass that was written with :func:`dataclasses.asdict` and JSON."""
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


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass in JSON's types."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def read_config(run: Path) -> RunConfig:
    """Read ``config.json``. If there is no such file, the configuration is empty.

    A file of format 1, which had only the method ``interpreter``, is converted to format 2.

    Raises:
        ValueError: if it is not the configuration of a run.
    """
    path = run / "config.json"
    if not path.exists():
        return RunConfig()
    try:
        content = json.loads(read_text(path))
        number = content.get("format", 1)
        if number == 1:
            content = _from_format_1(content)
        elif number != FORMAT:
            raise ValueError(f"format {number}; this version reads 1 and {FORMAT}")
        if not isinstance(content["method"], str):
            raise ValueError(f"its method is {content['method']!r}")
        stages = dict(content["stages"])
        for options in stages.values():
            int(options["optim"]["steps"])  # commands read it without the class of the stage
        return RunConfig(content["method"], stages, dict(content.get("trained_on", {})), path)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is not the configuration of a run ({error})") from error


def _from_format_1(content: dict[str, Any]) -> dict[str, Any]:
    """``{"image": …, "video": …, "image_weights": …}`` in format 2."""
    if unknown := sorted(content.keys() - {"image", "video", "image_weights"}):
        raise ValueError(f"unknown entries {', '.join(unknown)}")
    stages = {
        name: {RENAMED.get(option, option): value for option, value in content[name].items()}
        for name in ("image", "video")
        if content.get(name)
    }
    weights = content.get("image_weights")
    return {"method": DEFAULT_METHOD, "stages": stages, "trained_on": {"video": weights} if weights else {}}


def write_config(run: Path, config: RunConfig) -> None:
    """Write ``config.json``, completely or not at all."""
    content = {"format": FORMAT, "method": config.method, "stages": config.stages, "trained_on": config.trained_on}
    write_text(run / "config.json", json.dumps(content, indent=2) + "\n")


def backbone_in_run(name: str, run: Path) -> str:
    """The path of a backbone that is stored in the run directory. Any other name is returned unchanged.

    >>> backbone_in_run("run:backbone", Path("runs/mine")), backbone_in_run("facebook/dinov2-base", Path("runs/mine"))
    ('runs/mine/backbone', 'facebook/dinov2-base')

    Args:
        name: name of the backbone in ``config.json``: ``run:backbone`` is a folder of a Hugging Face model,
            ``run:backbone/weights.safetensors`` an official DINOv2 checkpoint.
        run: run directory.

    Raises:
        ValueError: if it names another place in the run directory, or a place outside.
    """
    if not name.startswith(WITHIN_RUN):
        return name
    path = name.removeprefix(WITHIN_RUN)
    if path not in (BACKBONE_FOLDER, f"{BACKBONE_FOLDER}/{BACKBONE_WEIGHTS}"):
        raise ValueError(
            f"{run}/config.json names the backbone {name!r}; one that travels with a run is "
            f"{WITHIN_RUN}{BACKBONE_FOLDER} or {WITHIN_RUN}{BACKBONE_FOLDER}/{BACKBONE_WEIGHTS}"
        )
    return str(run / path)


def require_same(old: Any, new: Any) -> None:
    """Raise an error if a stage is resumed with other settings than it was started with.

    Options with ``option(..., may_change=True)`` may differ.

    Args:
        old: options that the stage was started with; None if it was not started.
        new: options now, of the same dataclass.

    Raises:
        ValueError: if a setting differs; names each one.
    """
    if old is None:
        return
    before, after = _fixed(old), _fixed(new)
    changed = [f"{k} was {before[k]}, now {after[k]}" for k in after if before.get(k) != after[k]]
    if changed:
        raise ValueError(
            f"{new.run} was started with other settings: {'; '.join(changed)}. "
            "Use the same settings to resume, or another --run for a new training"
        )


def _fixed(options: Any) -> dict[str, Any]:
    """Options that must not change, by their names on the command line."""
    fixed: dict[str, Any] = {}
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if option.metadata.get("may_change"):
            continue
        fixed |= _fixed(value) if dataclasses.is_dataclass(value) else {flag(option.name): value}
    return fixed


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")


def check_ranges(options: Any) -> None:
    """Raise an error for whole numbers below the least value of their option (``option(..., at_least=1)``).

    Raises:
        ValueError: if a number is too small; names the option.
    """
    for option in dataclasses.fields(options):
        value, least = getattr(options, option.name), option.metadata.get("at_least")
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        elif least is not None and value is not None:
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, str) and number < least:
                    raise ValueError(f"{flag(option.name)} must be at least {least}, got {number}")


def require_directory(run: Path) -> None:
    """Raise an error if the run directory is a file.

    Raises:
        NotADirectoryError: if it is a file; says what --run expects.
    """
    if run.is_file():
        raise NotADirectoryError(f"{run} is a file; --run expects a directory that interpreter.train wrote")


def require_run(run: Path, method: str = DEFAULT_METHOD) -> None:
    """Raise an error if there is no run directory at a path.

    Args:
        run: the path.
        method: method that trains such a run, for the message.

    Raises:
        FileNotFoundError: if there is none; says which command creates one.
        NotADirectoryError: if ``run`` is a file.
    """
    require_directory(run)
    if not run.is_dir():
        which = "" if method == DEFAULT_METHOD else f" --method {method}"
        raise FileNotFoundError(
            f"no run directory at {run}; make one with: python -m interpreter.train{which} --run {run}"
        )


def train_command(method: str, key: str, run: Path) -> str:
    """The command line that trains a stage. For the key video-3 it is ``--stage video --level 3``."""
    which = "" if method == DEFAULT_METHOD else f" --method {method}"
    stage, _, level = key.partition("-")
    return f"python -m interpreter.train{which} --stage {stage}{f' --level {level}' if level else ''} --run {run}"


def unfinished(run: Path, key: str, stored: RunConfig) -> str | None:
    """A message with the last step of an unfinished stage; None if it is finished or has not begun."""
    options, step = stored.stages.get(key), newest_step(run / key)
    if options is None or step == 0 or step >= options["optim"]["steps"]:
        return None
    return f"the {key} stage of {run} is unfinished: step {step} of {options['optim']['steps']}"


def require_finished(run: Path, key: str, stored: RunConfig, allow_unfinished: bool = False) -> None:
    """Raise an error if a stage has not reached its last step. If that is allowed, print a warning instead.

    Args:
        run: run directory.
        key: key of the stage.
        stored: configuration of the run.
        allow_unfinished: whether to only print a warning.

    Raises:
        ValueError: if it is unfinished; names its step and what to do.
    """
    text = unfinished(run, key, stored)
    if text and not allow_unfinished:
        raise ValueError(
            f"{text}. Rerun its training command to finish it, or add --allow-unfinished to use it as it is"
        )
    if text:
        console.print(f"[yellow]{text}", highlight=False, soft_wrap=True)


def load_stage_state(run: Path, key: str, method: str = DEFAULT_METHOD) -> TrainingState:
    """The newest checkpoint of a stage.

    Raises:
        FileNotFoundError: if the stage was not trained; names the command that trains it.
        NotADirectoryError: if ``run`` is a file.
    """
    require_run(run)
    state = load_checkpoint(run / key)
    if state is None:
        raise FileNotFoundError(f"{run} holds no trained {key} stage; train it with: {train_command(method, key, run)}")
    return state


def weights_hash(state: TrainingState) -> str:
    """Hash of the weights of a stage."""
    digest = hashlib.sha256()
    for name in sorted(state.weights):
        digest.update(name.encode())
        digest.update(state.weights[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
