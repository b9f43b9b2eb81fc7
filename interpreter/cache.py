"""Compute features or image slots of a data set once: ``python -m interpreter.cache --help``."""

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from interpreter.commands import RESUME, cli, run_command
from interpreter.configs import BackboneConfig, DataConfig, Dtype, Precision
from interpreter.console import console
from interpreter.engine.distributed import device_of_rank
from interpreter.engine.picture_grid import stored_pictures
from interpreter.engine.precision import in_precision, resolve_precision
from interpreter.engine.run import load_image_stage, load_stage_state, read_config, require_finished
from interpreter.engine.videos import open_videos
from interpreter.methods.interpreter.config import ImageTraining, Preset, StageName, training_defaults
from interpreter.methods.interpreter.image_slots import SlotMaker
from interpreter.models.backbones import load_backbone
from interpreter.store.features import FeatureMaker
from interpreter.store.fill import Cache, Maker, Shard, default_workers, gigabytes, read_contents


@dataclass(frozen=True)
class Caching:
    """Compute what training reads again and again, once: one memory-mapped safetensors file per video and flip.

    --stage image stores the backbone's features of every frame, which the image stage trains on. --stage video stores
    the image slots of every frame, --samples draws of the slot prior each, and their attention over patches; the video
    stage then trains without decoding a pixel. `interpreter.train` finds what is there, and makes what is missing.

    A file's address is a hash of the video's bytes and of everything else that its values depend on (backbone, its
    weights, block, norm, frame size, precision, type, flip, checkpoint of the image stage): what changed is made anew.
    Prints the required disk space before anything is written. If interrupted, rerun the same command to continue.
    Under torchrun each process takes its share of the videos. Commands that fill the same --cache share the work:
    torchrun --nproc-per-node 8 -m -- interpreter.cache --run DIR (without the -- torchrun takes --run for its own).
    """

    run: Path
    """Run directory. Options below that are not given come from its configuration or, before the first training, from
    --preset."""
    stage: StageName = "video"
    """image: features. video: image slots and their attention, from the trained image stage of the run."""
    cache: Path | None = None
    """Directory of the cached files. Default: the --cache that this run was trained with, else RUN/cache."""
    samples: int = 4
    """Draws of the slot prior R for each frame (--stage video); as many as --samples of the training."""
    dtype: Dtype = "fp16"
    """Type of the stored values. Training takes either; bf16 where values overflow fp16."""
    flip: bool = True
    """Store the mirrored frames too, which training with --flip needs."""
    workers: int = field(default_factory=default_workers)
    """Videos at a time in each process: one is decoded while another is encoded."""
    allow_unfinished: bool = False
    """Use the image slots of an image stage that has not reached its last step (--stage video)."""
    prune: bool = False
    """When done, delete the stores of the same kind in the directory that were made by another recipe, such as those of
    an image stage that was trained on. Not for a directory that runs share."""
    engine: Literal["local", "ray"] = "local"
    """local: this process, or those of torchrun. ray: Ray Data on the cluster that RAY_ADDRESS names, or on this
    machine, for corpora beyond one machine; reads --source, writes --out (pip install 'ray[data]' fsspec)."""
    source: str | None = None
    """Any fsspec URL of a folder of video files and folders of frames (--engine ray)."""
    out: str | None = None
    """Any fsspec URL for the files (--engine ray); copied or mounted, it is a --cache for training."""
    ray_workers: int = 2
    """Processes of Ray, of one core and, where there are any, one GPU each (--engine ray)."""
    precision: Precision = "auto"
    """Precision of the products; as in training."""
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)


def parse(arguments: Sequence[str]) -> Caching:
    """Parse the command line: run and preset first, since the defaults follow from them."""
    first = argparse.ArgumentParser(prog="python -m interpreter.cache", add_help=False, allow_abbrev=False)
    first.add_argument("--run", type=Path)
    first.add_argument("--preset", choices=get_args(Preset), default="demo")
    chosen, rest = first.parse_known_args(list(arguments))
    preset = training_defaults("image", chosen.preset)
    assert isinstance(preset, ImageTraining)
    run = chosen.run or preset.run
    stored = read_config(run)
    image = stored.image or preset
    defaults = Caching(
        run=run,
        cache=(stored.video and stored.video.cache) or image.cache,
        samples=stored.video.samples if stored.video else Caching.samples,
        precision=image.optim.precision,
        data=image.data,
        backbone=image.backbone,
    )
    description = (
        f"{inspect.cleandoc(Caching.__doc__ or '')}\n\nBefore all others: --preset {{{','.join(get_args(Preset))}}} "
        f"(here: {chosen.preset}), for a run that has no configuration yet."
    )
    return cli(Caching, rest, default=defaults, prog="python -m interpreter.cache", description=description)


def fill(config: Caching, shard: Shard) -> None:
    """Make this process's share of what is missing. What is finished stays, whatever ends the call.

    Raises:
        ValueError, FileNotFoundError: if the run, the data or an option is wrong.
        OSError: if the disk cannot hold it; nothing was written then.
    """
    for name in ("samples", "workers", "ray_workers"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(config, name)}")
    root = config.cache or config.run / "cache"
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{root} is a file; --cache takes a directory")
    maker = make_maker(config, root)
    dataset = open_videos(config.data, config.run)
    cache = Cache(maker, dataset.videos, read_contents(dataset.videos, config.workers))
    advice = "give --cache DIR on a larger disk, or make room (--prune deletes stores of other recipes, at the end)"
    cache.fill(shard, config.workers, advice)
    if config.stage == "video" and shard.rank == 0:
        stored_pictures(root, dataset.videos, cache.contents, config.data.frame_size)
    others = cache.other_stores()
    if others and config.prune and shard.rank == 0:
        console.print(f"deleted {gigabytes(cache.delete(others))}: {', '.join(path.name for path in others)}")


def make_maker(config: Caching, root: Path) -> Maker:
    """What makes the files that are asked for."""
    device, size = device_of_rank(), config.data.frame_size
    precision = resolve_precision(config.precision, device)
    if config.stage == "image":
        backbone = in_precision(load_backbone(config.backbone), precision).to(device)
        return FeatureMaker(root, backbone, config.backbone, size, precision, config.dtype, config.flip)
    require_finished(config.run, "image", config.allow_unfinished)
    image, backbone, image_stage, weights = load_image_stage(config.run, device)
    if (config.backbone, size) != (image.backbone, image.data.frame_size):
        raise ValueError(
            f"the image stage of {config.run} was trained on {image.backbone} at frame size {image.data.frame_size}; "
            "leave the options of the backbone and --frame-size out"
        )
    if "fp8-backbone" in {precision, image.optim.precision} and precision != image.optim.precision:
        raise ValueError(
            f"the image stage of {config.run} was trained with --precision {image.optim.precision}; leave it out"
        )
    features = FeatureMaker(root, backbone, image.backbone, size, precision, config.dtype, config.flip)
    return SlotMaker(root, features, image_stage, weights, config.samples)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    shard = Shard.from_environment()
    console.quiet = shard.rank > 0  # one process speaks for all; errors are told by each
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    config = parse(sys.argv[1:] if arguments is None else arguments)
    if config.engine == "ray":
        from interpreter.store import ray as cache_ray

        if config.stage == "video":
            require_finished(config.run, "image", config.allow_unfinished)
            load_stage_state(config.run, "image")  # an error here is easier to read than one of a process far away
        cache_ray.fill(config)
    else:
        fill(config, shard)
        share = f"share {shard.rank + 1} of {shard.world} is done" if shard.world > 1 else "done"
        console.print(f"{share}. Next: python -m interpreter.train --stage {config.stage} --run {config.run}")
    return 0


if __name__ == "__main__":
    run_command(main, stopped=RESUME)
