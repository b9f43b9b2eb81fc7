"""Train a stage: ``python -m interpreter.train --stage image|video --help``."""

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from interpreter.cli import parse, run_command
from interpreter.configs import ImageTraining, LoaderConfig, OptimConfig, VideoTraining
from interpreter.data import VideoDataset
from interpreter.data.loaders import Loader, LoaderError, open_loader
from interpreter.engine.checkpoint import checkpoints, restore_weights
from interpreter.engine.datasets import open_videos
from interpreter.engine.distributed import ProcessLostError, Ranks, device_of_rank, job_size, joined
from interpreter.engine.features import (
    FeatureSource,
    StreamedFeatures,
    features_key,
    store_features,
    stored_bytes,
)
from interpreter.engine.inference import Segmenter
from interpreter.engine.logging import console, progress_bar
from interpreter.engine.memory import memory_notice
from interpreter.engine.precision import in_precision, resolve_precision
from interpreter.engine.run import (
    load_image_stage,
    load_stage_state,
    read_config,
    require_positive,
    require_same,
    write_config,
)
from interpreter.engine.samples import sample_grid
from interpreter.engine.stopping import StopRequest
from interpreter.engine.tasks import ImageTask, VideoTask
from interpreter.engine.trainer import DivergedError, Trainer
from interpreter.models.backbone import Backbone, load_backbone
from interpreter.models.image_stage import ImageStage
from interpreter.models.transformer import count_parameters
from interpreter.models.video_stage import VideoStage


def train(config: ImageTraining | VideoTraining) -> bool:
    """Train a stage of a run, from its newest checkpoint on.

    Returns:
        True when the last step is done, False when a signal stopped it before; everything is saved either way.

    Raises:
        ValueError, FileNotFoundError: if something in the configuration, the data or the run directory is wrong.
        DivergedError: if the loss stops being finite.
        LoaderError: if a loader fails though no video is damaged, such as when one of its processes is killed.
        OSError: if the disk is full.
    """
    require_positive(config)
    config = dataclasses.replace(config, init=config.init and config.init.resolve())
    if config.optim.batch_size % job_size():
        raise ValueError(
            f"--batch-size {config.optim.batch_size} cannot be shared by {job_size()} processes; "
            f"give a multiple of {job_size()}"
        )
    with StopRequest() as stop, joined() as ranks, contextlib.ExitStack() as opened:
        console.quiet = not ranks.first
        try:
            if isinstance(config, ImageTraining):
                return train_image(config, stop, ranks, opened)
            return train_video(config, stop, ranks, opened)
        except Stopped:
            return False


class Stopped(Exception):
    """A signal asked to stop before the first step."""


def train_image(config: ImageTraining, stop: StopRequest, ranks: Ranks, opened: contextlib.ExitStack) -> bool:
    """Train the image stage; see :func:`train`. What has to be closed is left in ``opened``."""
    device = device_of_rank()
    root = config.data.root and config.data.root.resolve()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=root))
    stored = read_config(config.run)
    if checkpoints(config.run / "image"):
        require_same(stored.image, config)
    optim = _resolved(config.optim, device)
    backbone = in_precision(load_backbone(config.backbone), optim.precision).to(device)
    grid = backbone.grid(config.data.frame_size)
    # Before the long part begins, so that sizes which do not fit are told at once.
    torch.manual_seed(optim.seed)
    model = ImageStage(config.model, backbone.dim, grid).to(device)
    if config.init:
        restore_weights(model, load_stage_state(config.init, "image").weights, config.init / "image")
    with ranks.first_goes_ahead():
        config.run.mkdir(parents=True, exist_ok=True)
        dataset = open_videos(config.data, config.run)
        if ranks.first:
            write_config(config.run, dataclasses.replace(stored, image=config))
        features = open_features(config, backbone, dataset, optim, stop, config.decoding, opened)
    console.print(
        f"image stage: {count_parameters(model) / 1e6:.1f} M parameters, {grid[0]}x{grid[1]} tokens of width "
        f"{backbone.dim}, {len(dataset)} videos, {device}, {optim.precision}"
    )
    task = ImageTask(model, features, [v.num_frames for v in dataset.videos], optim, device, ranks)
    rows, slots = optim.batch_size // ranks.world, (config.model.num_slots, config.model.dim)
    console.print(memory_notice(task, optim, [(rows, grid[0] * grid[1], backbone.dim), (rows, *slots)]))

    def samples() -> np.ndarray:
        segmenter = Segmenter(backbone, model, None, config.data.frame_size, optim.precision)
        return sample_grid(segmenter, dataset)

    captured = config.compile and config.cuda_graph and device.type == "cuda"
    trainer = Trainer(
        task, optim, config.logging, config.run / "image", device, config.compile, samples, captured, ranks
    )
    return trainer.run(stop)


def train_video(config: VideoTraining, stop: StopRequest, ranks: Ranks, opened: contextlib.ExitStack) -> bool:
    """Train the video stage on the image stage of the same run; see :func:`train_image`."""
    device = device_of_rank()
    image_config, backbone, image_stage, weights = load_image_stage(config.run, device)
    stored = read_config(config.run)
    started = bool(checkpoints(config.run / "video"))
    if started and stored.image_weights != weights:
        raise ValueError(
            f"the video stage in {config.run} was trained on another image stage than the one there now; "
            f"delete {config.run / 'video'} to train it anew"
        )
    if started:
        require_same(stored.video, config)
    optim = _resolved(config.optim, device)
    torch.manual_seed(optim.seed)
    model = VideoStage(config.model, image_stage.config.dim, config.num_frames).to(device)
    if config.init:
        restore_weights(model, load_stage_state(config.init, "video").weights, config.init / "video")
    with ranks.first_goes_ahead():
        dataset = open_videos(image_config.data, config.run)
        if ranks.first:
            write_config(config.run, dataclasses.replace(stored, video=config, image_weights=weights))
        features = open_features(image_config, backbone, dataset, optim, stop, config.decoding, opened)
    console.print(
        f"video stage: {count_parameters(model) / 1e6:.1f} M parameters, {config.num_frames} frames of "
        f"{image_stage.config.num_slots} slots, {len(dataset)} videos, {device}, {optim.precision}"
    )
    task = VideoTask(model, image_stage, features, [v.num_frames for v in dataset.videos], optim, device, ranks)
    rows, slots = optim.batch_size // ranks.world, (config.model.num_slots, config.model.dim)
    given = (image_stage.config.num_slots, image_stage.config.dim)
    console.print(memory_notice(task, optim, [(rows, config.num_frames, *given), (rows, *slots)]))

    def samples() -> np.ndarray:
        segmenter = Segmenter(backbone, image_stage, model, image_config.data.frame_size, optim.precision)
        return sample_grid(segmenter, dataset)

    captured = config.compile and config.cuda_graph and device.type == "cuda"
    trainer = Trainer(
        task, optim, config.logging, config.run / "video", device, config.compile, samples, captured, ranks
    )
    return trainer.run(stop)


def _resolved(optim: OptimConfig, device: torch.device) -> OptimConfig:
    return dataclasses.replace(optim, precision=resolve_precision(optim.precision, device))


def open_features(
    config: ImageTraining,
    backbone: Backbone,
    dataset: VideoDataset,
    optim: OptimConfig,
    stop: StopRequest,
    decoding: LoaderConfig,
    opened: contextlib.ExitStack,
) -> FeatureSource:
    """Features of all frames, stored or streamed as the configuration says; a loader is left in ``opened``."""
    size, videos = config.data.frame_size, dataset.videos
    precision = _resolved(config.optim, backbone.mean.device).precision
    home = config.run / "features"
    # The video stage may flip where the image stage did not: one store has to serve both.
    flip = config.optim.flip or optim.flip
    needed = stored_bytes(backbone, videos, size, flip)
    present = sum(f.stat().st_size for f in home.glob("*/*")) if home.exists() else 0
    free = shutil.disk_usage(config.run).free + present
    if config.features == "streamed" or (config.features == "auto" and needed > free / 2):
        loader = opened.enter_context(start_loader(decoding, dataset, size, backbone.mean.device, stop))
        return StreamedFeatures(backbone, loader, precision)
    if needed > free:
        raise OSError(
            f"the features need {needed / 1e9:.1f} GB, but {config.run} has {free / 1e9:.1f} GB free; "
            "use --features streamed, or a --run on a larger disk"
        )
    key = features_key(backbone, config.backbone, videos, size, precision)
    total = sum(v.num_frames for v in videos)
    with progress_bar("frames") as progress:
        bar = progress.add_task("features", total=total, status=f"{needed / 1e9:.1f} GB")

        def advance(frames: int) -> None:
            progress.advance(bar, frames)
            if stop.requested:
                raise Stopped

        return store_features(home, backbone, key, videos, size, precision, flip, advance)


def start_loader(
    config: LoaderConfig, dataset: VideoDataset, size: tuple[int, int], device: torch.device, stop: StopRequest
) -> Loader:
    """Open the loader that the configuration says; one that decodes everything first shows a progress bar."""
    with progress_bar("frames") as progress:
        bar = progress.add_task("decoding", total=sum(v.num_frames for v in dataset.videos), status="", visible=False)

        def advance(frames: int) -> None:
            progress.update(bar, advance=frames, visible=True)
            if stop.requested:
                raise Stopped

        loader = open_loader(config.loader, dataset.videos, size, device, config.workers, config.prefetch, advance)
    console.print(f"frames are decoded by the {loader.name} loader")
    return loader


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    config = parse(sys.argv[1:] if arguments is None else arguments)
    done = train(config)
    where = Path(config.run)
    if not done:
        console.print(f"stopped; everything is saved in {where}. The same command goes on from there.")
    elif isinstance(config, ImageTraining):
        console.print(
            f"image stage done. Next: python -m interpreter.train --stage video --run {where} "
            "(with the same --preset, if you gave one)"
        )
    else:
        console.print(
            f"video stage done. Next: python -m interpreter.evaluate --run {where}, or "
            f"python -m interpreter.segment CLIP.mp4 --run {where} --out DIR"
        )
    return 0


if __name__ == "__main__":
    run_command(main, (DivergedError, LoaderError, ProcessLostError))
