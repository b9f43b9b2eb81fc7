"""Contents of a run on the Hugging Face hub: options without paths, and a backbone that others can load."""

import dataclasses
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from interpreter.configs import BackboneConfig
from interpreter.engine.run import BACKBONE_FOLDER, BACKBONE_WEIGHTS, WITHIN_RUN, RunConfig
from interpreter.hub.names import PREFIX, is_hub_name, parse_name
from interpreter.methods import find_method

T = TypeVar("T")

BUNDLED = "efficientnet-lite0"  # is part of the installation
MODEL_FILES = ("config.json", "model.safetensors")  # of a backbone in Hugging Face's format
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")  # it can also have one of these
BACKBONE_FILES = tuple(f"{BACKBONE_FOLDER}/{name}" for name in (*MODEL_FILES, *PREPROCESSORS, BACKBONE_WEIGHTS))
"""All possible files of a backbone that is uploaded with a run."""


def stage_options(stored: RunConfig) -> dict[str, Any]:
    """The options of every stage of a run as its dataclass, by key.

    Raises:
        ValueError: if the method or stage does not exist, or the options are not those of this version.
    """
    method = find_method(stored.method)
    return {key: stored.options(key, method.stage(key).config) for key in stored.stages}


def without_paths(config: T, change: Callable[[BackboneConfig], BackboneConfig] = lambda backbone: backbone) -> T:
    """The options with every path removed: None, or the current directory where an option needs a path.

    Paths are recognised by the types of values, so that no option of a new method is missed.

    Args:
        config: options of a stage.
        change: function for the backbone, whose name can also be a path.
    """
    hints = typing.get_type_hints(type(config))
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value: Any = getattr(config, field.name)
        if isinstance(value, BackboneConfig):
            changed[field.name] = change(value)
        elif dataclasses.is_dataclass(value):
            changed[field.name] = without_paths(value, change)
        elif isinstance(value, Path):
            changed[field.name] = None if type(None) in typing.get_args(hints[field.name]) else Path()
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def backbone_names(stored: RunConfig) -> list[str]:
    """The names of the backbones in a run's configuration."""
    return sorted({backbone.backbone for options in stage_options(stored).values() for backbone in backbones(options)})


def backbones_inside(stored: RunConfig) -> list[str]:
    """The folder or file, relative to the run, of each backbone that is uploaded with it."""
    return [n.removeprefix(WITHIN_RUN) for n in backbone_names(stored) if n.startswith(WITHIN_RUN)]


def backbone_paths(inside: str) -> list[str]:
    """The files that a backbone must have, relative to the run, by its folder or file."""
    return [f"{inside}/{name}" for name in MODEL_FILES] if inside == BACKBONE_FOLDER else [inside]


def backbones(config: Any) -> Iterator[BackboneConfig]:
    """The backbones among the options of a stage."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, BackboneConfig):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from backbones(value)


def require_publishable(stored: RunConfig) -> None:
    """Refuse a configuration that names paths outside its run.

    Raises:
        ValueError: if it does. The message names the stage or the backbone.
    """
    inside = {f"{WITHIN_RUN}{BACKBONE_FOLDER}", f"{WITHIN_RUN}{BACKBONE_FOLDER}/{BACKBONE_WEIGHTS}"}
    for key, options in stage_options(stored).items():
        if without_paths(options) != options:
            raise ValueError(
                f"{stored.path} is not from interpreter.hub push: the options of its {key} stage name folders of a "
                "computer; ask the owner to push the run with that command"
            )
    for name in backbone_names(stored):
        if name != BUNDLED and name not in inside and not is_named(name):
            raise ValueError(
                f"{stored.path} is not from interpreter.hub push: its backbone {name!r} is not a name on the hub, "
                f"{PREFIX}OWNER/NAME; ask the owner to push the run with that command"
            )


def is_named(backbone: object) -> bool:
    """Whether the name of a backbone can only mean the hub, and never a file of the computer.

    >>> is_named("hub:facebook/dinov2-small@main"), is_named("facebook/dinov2-small"), is_named("hub:../x")
    (True, False, False)
    """
    with suppress(ValueError):
        return isinstance(backbone, str) and is_hub_name(backbone) and bool(parse_name(backbone))
    return False
