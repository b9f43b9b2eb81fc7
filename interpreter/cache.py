"""Compute the inputs of a stage once: ``python -m interpreter.cache --help``."""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from interpreter.commands import RESUME, cli, parse_first, rename_options, run_command
from interpreter.configs import BackboneConfig, DataConfig, Dtype, Precision, option
from interpreter.console import console, gigabytes
from interpreter.engine.checkpoint import checkpoints
from interpreter.engine.distributed import device_of_rank
from interpreter.engine.picture_grid import stored_pictures
from interpreter.engine.precision import resolve_precision
from interpreter.engine.run import (
    DEFAULT_METHOD,
    check_ranges,
    load_stage_state,
    require_finished,
    train_command,
)
from interpreter.engine.videos import open_videos
from interpreter.hub.names import is_hub_name
from interpreter.method_options import Chosen, choose_method
from interpreter.methods import METHODS
from interpreter.methods.base import Context, Stage
from interpreter.methods.runs import needed_stages, open_context
from interpreter.store.features import NOT_STORED
from interpreter.store.fill import Cache, Maker, Shard, default_workers, read_contents

PROG = "python -m interpreter.cache"


@dataclass(frozen=True)
class Caching:
    """Compute features or image slots of all frames once, for training: one safetensors file per video and flip.

    --stage image stores the features of every frame, which the image stage trains on. --stage video stores the image
    slots of every frame (for --draws draws of the slot prior) and their attention over patches, so that the video stage
    trains without decoding frames. `interpreter.train` uses existing files and computes missing ones.

    The path of a file is a hash of the video's bytes and of everything else that its values depend on (backbone, its
    weights, block, norm, frame size, precision, type, flip, checkpoint of the image stage). If any of these changes,
    the values are computed again. The command prints the required disk space first. If interrupted, rerun the same
    command to resume. Several commands that fill the same --cache share the videos. So do the processes of torchrun:
    torchrun --nproc-per-node 8 -m -- interpreter.cache --run DIR (without --, torchrun would read --run as its own
    option).

    Examples:
      python -m interpreter.cache --run runs/demo --stage image
      python -m interpreter.cache --run runs/ytvis19 --stage video --cache /data/cache
    """

    run: Path
    """Run directory. The options below default to its configuration, or to --preset before the first training."""
    method: str = DEFAULT_METHOD
    """Method of the run. Default: the one in its configuration."""
    stage: str = "video"
    """Stage whose inputs are computed. For the method interpreter:
    image (features), video (image slots and their attention, from the trained image stage of the run), or video-3 and
    more (slots of the level below, for a level whose training has begun)."""
    preset: tyro.conf.Suppress[str] = "demo"  # read first, because other defaults depend on it
    cache: Path | None = None
    """Directory of the cached files. Default: the --cache that this run was trained with, else RUN/cache."""
    draws: int = option(4, at_least=1)
    """Number R of draws of the slot prior for each frame (--stage video). Use the --draws of the training."""
    dtype: Dtype = "fp16"
    """Type of the stored values. Training reads both. Use bf16 if values overflow fp16."""
    flip: bool = True
    """Store the mirrored frames too, which training with --flip needs."""
    workers: int = field(default_factory=default_workers, metadata={"at_least": 1})
    """Number of videos that each process handles at a time: one is decoded while another is encoded."""
    allow_unfinished: bool = False
    """Use the image slots of an image stage that has not reached its last step (--stage video)."""
    prune: bool = False
    """At the end, delete files of the same kind that were computed with other settings or another image stage.
    Do not use it if several runs share the directory."""
    engine: Literal["local", "ray"] = "local"
    """local: this process, or those of torchrun.
    ray: Ray Data, for corpora beyond one machine; reads --source, writes --out (pip install 'ray[data]' fsspec).
    It runs on the cluster that RAY_ADDRESS names, else on this machine."""
    source: str | None = None
    """Any fsspec URL of a folder of video files and folders of frames (--engine ray)."""
    out: str | None = None
    """Any fsspec URL for the files (--engine ray). To train on the result, copy or mount it and use it as --cache."""
    ray_workers: int = option(2, at_least=1)
    """Number of Ray's processes, each with one core and, if there are GPUs, one GPU (--engine ray)."""
    precision: Precision = "auto"
    """Precision of matrix products. Use the same as in training."""
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)


def parse(arguments: Sequence[str]) -> tuple[Chosen, Caching]:
    """Parse the command line: first run, method and preset, because all other defaults depend on them.

    Returns:
        The method with the run's configuration, and the options.

    Raises:
        ValueError: if the run belongs to another method, the method trains nothing, or the preset is unknown.
    """
    arguments = rename_options(arguments, {"--samples": "--draws"})
    options: dict[str, dict[str, Any]] = {
        "run": {"type": Path},
        "method": {"choices": METHODS},
        "preset": {},
        "stage": {},
    }
    named, rest = parse_first(arguments, PROG, **options)
    if named.run and is_hub_name(named.run):
        raise ValueError(
            f"--run {named.run}: a cache holds the inputs of a training, and a run of the hub is not trained further; "
            f"start a run of your own from it: {train_command(DEFAULT_METHOD, 'image', Path('DIR'))} --init {named.run}"
        )
    method, stored = choose_method(named.method, named.run)
    if not method.stages:
        raise ValueError(f"the method {method.name} has nothing to train, so there is nothing to cache for it")
    first, presets = method.stages[0], list(method.stages[0].presets)
    if named.preset is not None and named.preset not in presets:
        raise ValueError(f"unknown --preset {named.preset!r}; choose from {', '.join(presets)}")
    preset = first.presets[named.preset or "demo"]
    run = named.run or preset.run
    if named.run is None:
        method, stored = choose_method(method.name, run)
    begun = {key: stored.options(key, method.stage(key).config) for key in stored.stages}
    source: Any = begun.get(first.key(preset)) or preset  # the stage whose data and backbone are used
    stage = named.stage or method.stages[-1].name
    latest: Any = begun.get(stage) or next(reversed(begun.values()), source)
    defaults = Caching(
        run=run,
        method=method.name,
        stage=stage,
        preset=named.preset or "demo",
        cache=latest.cache or source.cache,
        draws=getattr(latest, "draws", Caching.draws),
        precision=source.optim.precision,
        data=source.data,
        backbone=source.backbone,
    )
    description = (
        f"{inspect.cleandoc(Caching.__doc__ or '')}\n\nFor a run that has no configuration yet: --preset "
        f"{{{','.join(presets)}}} (here: {named.preset or 'demo'}). Stages that have not begun take its options."
    )
    return Chosen(method, stored), cli(Caching, rest, default=defaults, prog=PROG, description=description)


def stage_options(config: Caching, run: Path, chosen: Chosen) -> tuple[Stage[Any], Any]:
    """The stage whose inputs are cached, and its options with those of the command.

    Raises:
        ValueError: if the run does not have the options of this level, or the stage has nothing to cache.
    """
    stage = chosen.method.stage(config.stage)
    if config.preset not in stage.presets:
        raise ValueError(
            f"--stage {stage.name} has no --preset {config.preset}; choose from {', '.join(stage.presets)}"
        )
    preset = stage.presets[config.preset]
    key = stage.key(preset) if config.stage == stage.name else config.stage
    known = chosen.stored.options(key, stage.config) or preset
    if stage.key(known) != key:
        raise ValueError(
            f"{config.run} does not hold the options of --stage {key} yet; start its training, which computes the "
            f"same files: {train_command(config.method, key, config.run)}"
        )
    changes: dict[str, Any] = {"run": run, "cache": config.cache}
    if not stage.needs(known):
        changes |= {"data": config.data, "backbone": config.backbone}
        changes["optim"] = replace(known.optim, precision=config.precision)
    elif hasattr(known, "draws"):
        changes["draws"] = config.draws
    options = replace(known, **changes)
    stage.require_cacheable(options)
    return stage, options


def open_maker(config: Caching, run: Path, root: Path, chosen: Chosen | None = None) -> Maker:
    """Return what computes the files of a stage's inputs.

    Args:
        config: the options.
        run: run directory. On a machine of a cluster it is a copy of ``config.run``.
        root: directory of the cache.
        chosen: the method with the run's configuration. Default: read from ``run``.

    Raises:
        FileNotFoundError: if an earlier stage was not trained.
        ValueError: if it is not finished, or options differ from those that it was trained with.
    """
    chosen = chosen or choose_method(config.method, run)
    stage, options = stage_options(config, run, chosen)
    for needed in needed_stages(chosen.method, stage, options, chosen.stored):
        require_finished(run, needed, chosen.stored, config.allow_unfinished)
    context = open_context(chosen.method, stage, options, run, device_of_rank(), chosen.stored)
    if context.earlier:
        _check_same_features(config, context)
    return stage.maker(options, replace(context, store=root), config.dtype, config.flip)


def _check_same_features(config: Caching, context: Context) -> None:
    """Raise an error if options of the backbone differ from those that the earlier stage was trained with."""
    (name, trained), *_ = context.earlier.items()
    if (config.backbone, config.data.frame_size) != (context.backbone_config, context.data.frame_size):
        raise ValueError(
            f"the {name} stage of {config.run} was trained on {context.backbone_config} at frame size "
            f"{context.data.frame_size}; leave the options of the backbone and --frame-size out"
        )
    precision, before = resolve_precision(config.precision, context.device), trained.config.optim.precision
    if "fp8-backbone" in {precision, before} and precision != before:
        raise ValueError(f"the {name} stage of {config.run} was trained with --precision {before}; leave it out")


def fill(config: Caching, shard: Shard, chosen: Chosen) -> None:
    """Compute this process's share of the missing files. Finished files are kept if the call fails or is interrupted.

    Raises:
        ValueError, FileNotFoundError: if the run, the data or an option is wrong.
        OSError: if the disk is too small. Then nothing is written.
    """
    root = config.cache or config.run / "cache"
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; --cache takes a directory")
    maker = open_maker(config, config.run, root, chosen)
    dataset = open_videos(config.data, config.run)
    cache = Cache(maker, dataset.videos, read_contents(dataset.videos, config.workers))
    advice = "give --cache DIR on a larger disk, or make room (--prune deletes stores of other recipes, at the end)"
    cache.fill(shard, config.workers, advice)
    if config.stage != chosen.method.stages[0].name and shard.rank == 0:
        # A stage above another one trains without decoding, so the frames that its picture grids show are cached too.
        digests = [content.digest for content in cache.contents]
        stored_pictures(root, dataset.videos, digests, config.data.frame_size)
    others = cache.other_stores()
    if others and config.prune and shard.rank == 0:
        console.print(f"deleted {gigabytes(cache.delete(others))}: {', '.join(path.name for path in others)}")


def fill_with_ray(config: Caching, chosen: Chosen) -> None:
    """Fill the cache of a corpus at a URL; see :mod:`interpreter.store.ray`."""
    from interpreter.store import ray

    if not config.source or not config.out:
        raise ValueError("--engine ray needs --source URL (a folder of videos) and --out URL (where the files go)")
    if config.data.crop != "none" or config.data.crop_borders:
        raise ValueError("--engine ray encodes whole frames; use --crop none and --no-crop-borders, or --engine local")
    stage, options = stage_options(config, config.run, chosen)
    needed: list[Path] = []
    for key in needed_stages(chosen.method, stage, options, chosen.stored):
        require_finished(config.run, key, chosen.stored, config.allow_unfinished)
        load_stage_state(config.run, key, config.method)  # errors appear here, not in a process of the cluster
        needed += [config.run / "config.json", *checkpoints(config.run / key)[-1:]]
    corpus = ray.Corpus(config.source, config.out, config.ray_workers)
    ray.fill(corpus, partial(open_maker, config), config.run, needed)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    shard = Shard.from_environment()
    console.quiet = shard.rank > 0  # only rank 0 prints progress; every rank reports its own errors
    device = device_of_rank()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    chosen, config = parse(sys.argv[1:] if arguments is None else arguments)
    check_ranges(config)
    if config.data.crop == "random":
        raise ValueError(NOT_STORED)
    if config.engine == "ray":
        fill_with_ray(config, chosen)
    else:
        fill(config, shard, chosen)
        share = f"share {shard.rank + 1} of {shard.world} is done" if shard.world > 1 else "done"
        console.print(f"{share}. Next: {train_command(config.method, config.stage, config.run)}")
    return 0


if __name__ == "__main__":
    run_command(main, stopped=RESUME)
