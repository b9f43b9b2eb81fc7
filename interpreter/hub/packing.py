"""Packs a run for the Hugging Face hub: the weights of its stages, a configuration without paths, its backbone."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from interpreter.configs import BackboneConfig
from interpreter.engine.checkpoint import checkpoints, save_weights
from interpreter.engine.run import (
    BACKBONE_FOLDER,
    BACKBONE_WEIGHTS,
    FORMAT,
    WITHIN_RUN,
    backbone_in_run,
    load_stage_state,
    read_config,
    require_run,
    to_dict,
    unfinished,
    weights_hash,
)
from interpreter.evaluation.provenance import code_version
from interpreter.files import read_text, write_text
from interpreter.hub.client import cache_folder
from interpreter.hub.contents import BUNDLED, MODEL_FILES, PREPROCESSORS, is_named, stage_options, without_paths
from interpreter.hub.names import PREFIX, HubName, is_commit, is_hub_name, repository_folder
from interpreter.methods import find_method
from interpreter.methods.base import Method
from interpreter.methods.runs import needed_stages
from interpreter.models.backbones.dinov2 import read_tensors
from interpreter.models.backbones.load import CHECKPOINTS, split_revision
from interpreter.versions import own_version


@dataclass(frozen=True)
class Packed:
    """A run in a separate folder, as it is sent.

    Attributes:
        folder: a run directory.
        run: the directory that it was packed from.
        method: its method.
        options: options of each stage, as published.
        weights: hash of the weights of each stage.
        steps: number of training steps of each stage.
        starts: the run on the hub that a stage started from (``--init``), by key.
        commit: commit of the code that packed it.
        notes: lines about parts that were left out or are unknown.
    """

    folder: Path
    run: Path
    method: Method
    options: dict[str, Any]
    weights: dict[str, str]
    steps: dict[str, int]
    starts: dict[str, str]
    commit: str
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """Paths of its files, relative to the folder."""
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)


def pack(run: Path, folder: Path, allow_unfinished: bool = False) -> Packed:
    """Write the published files of a run into an empty folder, which is then also a run.

    Args:
        run: run directory.
        folder: to write to.
        allow_unfinished: whether to include stages that did not reach their last step.

    Raises:
        FileNotFoundError: if the run does not exist, or has no trained stage.
        ValueError: if its files are damaged, or a stage needs one that is left out.
    """
    require_run(run)
    stored = read_config(run)
    method = find_method(stored.method)
    notes: list[str] = []
    states = {key: load_stage_state(run, key, method.name) for key in stored.stages if checkpoints(run / key)}
    notes += [f"left out: the {key} stage of {run} has no checkpoint yet" for key in stored.stages.keys() - states]
    for key in list(states):
        if (text := unfinished(run, key, stored)) and not allow_unfinished:
            notes.append(f"left out: {text}; add --allow-unfinished to send it as it is")
            del states[key]
    if not states:
        raise FileNotFoundError(
            f"{run} has no stage that is trained to its last step{f' ({notes[0]})' if notes else ''}; train one first"
        )
    every = stage_options(stored)
    for key in states:
        if missing := [k for k in needed_stages(method, method.stage(key), every[key], stored) if k not in states]:
            raise ValueError(
                f"the {key} stage of {run} needs its {missing[0]} stage, which is not trained to its last step; "
                "finish that training, or add --allow-unfinished"
            )
    backbones: dict[str, str] = {}  # published names, by the names in the run

    def published(backbone: BackboneConfig) -> BackboneConfig:
        if backbone.backbone not in backbones:
            backbones[backbone.backbone] = _pack_backbone(backbone.backbone, run, folder, notes)
        return replace(backbone, backbone=backbones[backbone.backbone])

    options = {key: without_paths(every[key], published) for key in states}
    if len([name for name in backbones.values() if name.startswith(WITHIN_RUN)]) > 1:
        raise ValueError(f"{run} uses several backbones of this computer, but only one can be uploaded with a run")
    hashes = {key: weights_hash(state) for key, state in states.items()}
    for key in states:
        for needed in method.stage(key).needs(every[key])[:1]:
            if stored.trained_on.get(key) != hashes[needed]:
                raise ValueError(
                    f"the {key} stage of {run} was trained on a different {needed} stage than the present one; "
                    f"train it again, or delete {run / key} to share the run without it"
                )
    for key, state in states.items():
        save_weights(folder / key, state.step, state.weights)
    commit = code_version()
    content = {
        "format": FORMAT,
        "method": method.name,
        "stages": {key: to_dict(values) for key, values in options.items()},
        "trained_on": {key: value for key, value in stored.trained_on.items() if key in states},
        "made_with": {"version": own_version(), "commit": commit},
    }
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
    steps = {key: state.step for key, state in states.items()}
    starts = {key: str(every[key].init) for key in states if every[key].init and is_hub_name(every[key].init)}
    return Packed(folder, run, method, options, hashes, steps, starts, commit, notes)


def _pack_backbone(name: str, run: Path, folder: Path, notes: list[str]) -> str:
    """Copy a backbone of this computer to the folder. Returns the name by which others load it.

    Raises:
        FileNotFoundError: if it no longer exists.
        ValueError: if it is damaged, or of a kind that cannot be uploaded.
    """
    if name == BUNDLED:
        return name
    if is_named(name):
        return _pinned(name, notes)
    place, target = Path(backbone_in_run(name, run)), folder / BACKBONE_FOLDER
    if place.is_dir():
        _pack_model(place, target)
        return f"{WITHIN_RUN}{BACKBONE_FOLDER}"
    if place.suffix in CHECKPOINTS:
        target.mkdir(exist_ok=True)
        save_file(
            {key: value.contiguous().clone() for key, value in read_tensors(place).items()}, target / BACKBONE_WEIGHTS
        )
        return f"{WITHIN_RUN}{BACKBONE_FOLDER}/{BACKBONE_WEIGHTS}"
    if not is_named(f"{PREFIX}{name}"):
        raise FileNotFoundError(f"the backbone of {run} is no longer at {name}; put it back there to share the run")
    return _pinned(name, notes)


def _pack_model(source: Path, target: Path) -> None:
    """Copy a backbone in Hugging Face's format: its weights, and its configuration without its origin."""
    for name in MODEL_FILES:
        if not (source / name).is_file():
            raise ValueError(
                f"the backbone {source} has no {name}, so it cannot be uploaded with the run; save it again with "
                "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of transformers"
            )
    target.mkdir(exist_ok=True)
    for name in ("config.json", *PREPROCESSORS):
        if (source / name).exists():
            content = json.loads(read_text(source / name))
            write_text(target / name, json.dumps(_without_origin(content), indent=2) + "\n")
    try:
        save_file(load_file(source / "model.safetensors"), target / "model.safetensors", {"format": "pt"})
    except SafetensorError as error:
        raise ValueError(f"{source / 'model.safetensors'} cannot be read as weights: {error}") from error


def _without_origin(content: Any) -> Any:
    """A configuration, and the configurations inside it, without their origin and the code that they request."""
    if isinstance(content, dict):
        kept = ((key, value) for key, value in content.items() if key not in ("_name_or_path", "auto_map"))
        return {key: _without_origin(value) for key, value in kept}
    return [_without_origin(value) for value in content] if isinstance(content, list) else content


def _pinned(name: str, notes: list[str]) -> str:
    """The name of a backbone of the hub, with the commit in the cache of this computer. It begins with ``hub:``, so
    that a folder with the same name is not used instead."""
    repository, revision = split_revision(name)
    folder = repository_folder(cache_folder(), HubName(repository))
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    if is_commit(revision) or is_commit(commit):
        return f"{PREFIX}{repository}@{revision if is_commit(revision) else commit}"
    if folder.is_dir():
        notes.append(f"the commit of the backbone {name} is unknown on this computer: others will load the newest one")
    else:
        notes.append(
            f"the backbone {name} is not in the cache of this computer: others will load the newest one of that name "
            "on the hub; if it is a folder of yours, train with its whole path as --backbone instead"
        )
    return f"{PREFIX}{name.removeprefix(PREFIX)}"
