"""Train a stage: ``python -m interpreter.train --stage image|video --help``."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from interpreter.cli import parse, run_command
from interpreter.configs import Dtype, Features, ImageTraining, OptimConfig, VideoTraining
from interpreter.data import VideoDataset
from interpreter.engine.cache import Cache, Shard, Stopped, default_workers, read_contents
from interpreter.engine.checkpoint import checkpoints, restore_weights
from interpreter.engine.datasets import open_videos
from interpreter.engine.features import FeatureMaker, FeatureSource, StoredFeatures, StreamedFeatures
from interpreter.engine.inference import Segmenter, default_device
from interpreter.engine.logging import console
from interpreter.engine.precision import resolve_precision
from interpreter.engine.run import (
    load_image_stage,
    load_stage_state,
    read_config,
    require_positive,
    require_same,
    write_config,
)
from interpreter.engine.samples import StoredSamples, sample_grid, stored_pictures
from interpreter.engine.slots import SlotMaker, SlotSource, StoredSlots, StreamedSlots
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
        OSError: if the disk is full.
    """
    require_positive(config)
    config = dataclasses.replace(
        config, init=config.init and config.init.resolve(), cache=config.cache and config.cache.resolve()
    )
    with StopRequest() as stop:
        try:
            return train_image(config, stop) if isinstance(config, ImageTraining) else train_video(config, stop)
        except Stopped:
            return False


def train_image(config: ImageTraining, stop: StopRequest) -> bool:
    """Train the image stage; see :func:`train`."""
    device = default_device()
    root = config.data.root and config.data.root.resolve()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=root))
    stored = read_config(config.run)
    if checkpoints(config.run / "image"):
        require_same(stored.image, config)
    backbone = load_backbone(config.backbone).to(device)
    grid = backbone.grid(config.data.frame_size)
    optim = _resolved(config.optim, device)
    # Before the long part begins, so that sizes which do not fit are told at once.
    torch.manual_seed(optim.seed)
    model = ImageStage(config.model, backbone.dim, grid).to(device)
    if config.init:
        restore_weights(model, load_stage_state(config.init, "image").weights, config.init / "image")
    config.run.mkdir(parents=True, exist_ok=True)
    dataset = open_videos(config.data, config.run)
    write_config(config.run, dataclasses.replace(stored, image=config))

    features = open_features(config, backbone, dataset, optim, stop)
    console.print(
        f"image stage: {count_parameters(model) / 1e6:.1f} M parameters, {grid[0]}x{grid[1]} tokens of width "
        f"{backbone.dim}, {len(dataset)} videos, {device}, {optim.precision}"
    )
    task = ImageTask(model, features, [v.num_frames for v in dataset.videos], optim, device)

    def samples() -> np.ndarray:
        segmenter = Segmenter(backbone, model, None, config.data.frame_size, optim.precision)
        return sample_grid(segmenter, dataset)

    trainer = Trainer(task, optim, config.logging, config.run / "image", device, config.compile, samples)
    return trainer.run(stop)


def train_video(config: VideoTraining, stop: StopRequest) -> bool:
    """Train the video stage on the image stage of the same run; see :func:`train`."""
    device = default_device()
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
    dataset = open_videos(image_config.data, config.run)
    write_config(config.run, dataclasses.replace(stored, video=config, image_weights=weights))

    slots, stored_samples = open_slots(config, image_config, backbone, image_stage, weights, dataset, stop)
    console.print(
        f"video stage: {count_parameters(model) / 1e6:.1f} M parameters, {config.num_frames} frames of "
        f"{image_stage.config.num_slots} slots, {len(dataset)} videos, {device}, {optim.precision}"
    )
    lengths = [v.num_frames for v in dataset.videos]
    task = VideoTask(model, slots, config.samples, lengths, optim, device)

    def samples() -> np.ndarray:
        segmenter = Segmenter(backbone, image_stage, model, image_config.data.frame_size, optim.precision)
        return sample_grid(segmenter, dataset, stored_samples)

    trainer = Trainer(task, optim, config.logging, config.run / "video", device, config.compile, samples)
    return trainer.run(stop)


def _resolved(optim: OptimConfig, device: torch.device) -> OptimConfig:
    return dataclasses.replace(optim, precision=resolve_precision(optim.precision, device))


def open_features(
    config: ImageTraining, backbone: Backbone, dataset: VideoDataset, optim: OptimConfig, stop: StopRequest
) -> FeatureSource:
    """Features of all frames, stored or streamed as the configuration says."""
    videos, size = dataset.videos, config.data.frame_size
    if config.features != "streamed":
        contents = read_contents(videos, default_workers())
        root = config.cache or config.run / "cache"

        def cache(dtype: Dtype) -> Cache:
            maker = FeatureMaker(root, backbone, config.backbone, size, optim.precision, dtype, optim.flip)
            return Cache(maker, videos, contents)

        if stored := _stored(config.features, cache, stop):
            return StoredFeatures(stored.table(), backbone.mean.device)
    console.print("features are streamed: each batch is decoded and encoded anew")
    return StreamedFeatures(backbone, videos, size, optim.precision)


def open_slots(
    config: VideoTraining,
    image_config: ImageTraining,
    backbone: Backbone,
    image_stage: ImageStage,
    weights: str,
    dataset: VideoDataset,
    stop: StopRequest,
) -> tuple[SlotSource, StoredSamples | None]:
    """Image slots of all frames, stored or streamed as the configuration says; what the pictures need if stored."""
    videos, size, device = dataset.videos, image_config.data.frame_size, backbone.mean.device
    precision = _resolved(image_config.optim, device).precision
    contents = read_contents(videos, default_workers())
    if config.features != "streamed":
        root = config.cache or image_config.cache or config.run / "cache"

        def cache(dtype: Dtype) -> Cache:
            features = FeatureMaker(root, backbone, image_config.backbone, size, precision, dtype, config.optim.flip)
            return Cache(SlotMaker(root, features, image_stage, weights, config.samples), videos, contents)

        if stored := _stored(config.features, cache, stop):
            slots = StoredSlots(stored.table(), device)
            return slots, StoredSamples(slots, stored_pictures(root, videos, contents, size))
    console.print("image slots are streamed: each batch is decoded, encoded and passed through the image stage anew")
    features = StreamedFeatures(backbone, videos, size, precision)
    digests, lengths = [content.digest for content in contents], [v.num_frames for v in videos]
    return StreamedSlots(image_stage, features, digests, lengths, precision), None


def _stored(choice: Features, cache: Callable[[Dtype], Cache], stop: StopRequest) -> Cache | None:
    """The cache, complete: of either type if it is there, else fp16 is made. None if it is to be done without."""
    caches = [cache("fp16"), cache("bf16")]
    chosen = next((one for one in caches if not one.missing()), caches[0])
    missing = chosen.num_bytes(chosen.missing())
    # What is there already counts as free: a call that goes on decides as the first one did.
    if choice == "auto" and missing and chosen.num_bytes() > (chosen.free_bytes() + chosen.num_bytes() - missing) / 2:
        return None
    advice = "use --features streamed, or --cache DIR on a larger disk"
    chosen.fill(Shard.from_environment(), default_workers(), lambda: stop.requested, advice)
    chosen.wait_for_others(lambda: stop.requested)
    return chosen


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
    run_command(main, (DivergedError,))
