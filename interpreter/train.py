"""Train a stage: ``python -m interpreter.train --stage image|video --help``."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from interpreter.commands import RESUME, parse, run_command
from interpreter.configs import OptimConfig
from interpreter.console import console
from interpreter.data.loaders import LoaderError
from interpreter.engine.checkpoint import checkpoints, restore_weights
from interpreter.engine.distributed import ProcessLostError, Ranks, device_of_rank, job_size, joined
from interpreter.engine.memory import count_parameters, memory_notice, memory_report
from interpreter.engine.picture_grid import sample_grid
from interpreter.engine.precision import in_precision, resolve_precision
from interpreter.engine.randomness import NotRepeatableError, explained, repeatable
from interpreter.engine.run import (
    load_image_stage,
    load_stage_state,
    read_config,
    require_directory,
    require_finished,
    require_positive,
    require_run,
    require_same,
    write_config,
)
from interpreter.engine.trainer import DivergedError, Trainer
from interpreter.engine.videos import open_videos
from interpreter.files import remove_leftovers
from interpreter.interrupts import Interrupted, StopRequest
from interpreter.locks import Lock, LockedError
from interpreter.methods.interpreter.config import ImageModelConfig, ImageTraining, VideoModelConfig, VideoTraining
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.inputs import open_features, open_slots
from interpreter.methods.interpreter.segmenter import Segmenter
from interpreter.methods.interpreter.tasks import ImageTask, VideoTask
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.models.attention import choose_attention
from interpreter.models.backbones import VisionTransformer, load_backbone
from interpreter.store.fill import Shard


def train(config: ImageTraining | VideoTraining) -> None:
    """Train a stage of a run, from its newest checkpoint to its last step. One process, or job, at a time uses a run.

    Raises:
        Interrupted: if a signal stopped it; everything is saved.
        LockedError: if another process uses the run; says which.
        ValueError, FileNotFoundError: if something in the configuration, the data or the run directory is wrong.
        DivergedError: if the loss stops being finite.
        LoaderError: if a loader fails though no video is damaged, such as when one of its processes is killed.
        OSError: if the disk is full.
        NotRepeatableError: if an operator has no deterministic kernel on this GPU.
    """
    require_positive(config)
    config = dataclasses.replace(
        config, init=config.init and config.init.resolve(), cache=config.cache and config.cache.resolve()
    )
    if config.optim.batch_size % job_size():
        raise ValueError(
            f"--batch-size {config.optim.batch_size} cannot be shared by {job_size()} processes; "
            f"give a multiple of {job_size()}"
        )
    if isinstance(config, VideoTraining):
        require_run(config.run)
    stop = StopRequest()
    with run_of_ones_own(config.run), joined() as ranks, explained(), contextlib.ExitStack() as opened:
        console.quiet = not ranks.first
        device = device_of_rank()
        repeatable(device)
        stage = train_image if isinstance(config, ImageTraining) else train_video
        stage(config, stop, ranks, opened)  # type: ignore[arg-type]
        if stop.number:  # at the last step, too: whoever stops a chain of commands wants to stop it
            raise Interrupted(stop.number)
        console.print(memory_report(device))


@contextlib.contextmanager
def run_of_ones_own(run: Path) -> Iterator[None]:
    """Keep other trainings out of a run directory: both stages write its configuration, pictures and curves.

    Under torchrun the first process does so for all. A directory that was made for the lock goes if nothing was
    written to it.

    Raises:
        LockedError: if another process uses the run.
        NotADirectoryError: if ``run`` is a file.
    """
    require_directory(run)
    if Shard.from_environment().rank > 0:
        yield
        return
    made, lock = [folder for folder in (run, *run.parents) if not folder.exists()], Lock(run / ".lock")
    if not lock.take():
        raise LockedError(f"{run} is in use by {lock.owner()}. Wait for it, stop it with kill, or give another --run")
    try:
        if lock.exclusive:
            for folder in (run, run / "image", run / "video", run / "samples"):
                remove_leftovers(folder)
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def train_image(config: ImageTraining, stop: StopRequest, ranks: Ranks, opened: contextlib.ExitStack) -> None:
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
    # Before the long part begins, so that sizes which do not fit are refused at once.
    torch.manual_seed(optim.seed)
    model = ImageStage(config.model, backbone.dim, grid).to(device)
    if config.init:
        restore_weights(model, load_stage_state(config.init, "image").weights, config.init / "image")
        require_finished(config.init, "image", allow_unfinished=True)
    with ranks.first_goes_ahead():
        config.run.mkdir(parents=True, exist_ok=True)
        dataset = open_videos(config.data, config.run)
        if ranks.first:
            write_config(config.run, dataclasses.replace(stored, image=config))
    features = open_features(config, backbone, dataset, optim, opened)
    console.print(
        f"image stage: {count_parameters(model) / 1e6:.1f} M parameters, {grid[0]}x{grid[1]} tokens of width "
        f"{backbone.dim}, {len(dataset)} videos, {device}, {optim.precision}"
    )
    task = ImageTask(model, features, [v.num_frames for v in dataset.videos], optim, device, ranks)
    rows, slots = optim.batch_size // ranks.world, (config.model.num_slots, config.model.dim)
    tokens = grid[0] * grid[1]
    if isinstance(backbone, VisionTransformer):
        console.print(f"positions of the backbone on a new patch grid: {backbone.positions}")
    console.print(memory_notice(task, optim, [(rows, tokens, backbone.dim), (rows, *slots)]))
    console.print(_attention(device, optim, rows, config.model, tokens))

    def samples() -> np.ndarray:
        segmenter = Segmenter(backbone, model, None, config.data.frame_size, optim.precision)
        return sample_grid(segmenter, dataset)

    captured = config.compile and config.cuda_graph and device.type == "cuda"
    trainer = Trainer(
        task, optim, config.logging, config.run / "image", device, config.compile, samples, captured, ranks
    )
    trainer.run(stop)


def train_video(config: VideoTraining, stop: StopRequest, ranks: Ranks, opened: contextlib.ExitStack) -> None:
    """Train the video stage on the image stage of the same run; see :func:`train_image`."""
    device = device_of_rank()
    require_finished(config.run, "image", config.allow_unfinished)
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
        require_finished(config.init, "video", allow_unfinished=True)
    with ranks.first_goes_ahead():
        dataset = open_videos(image_config.data, config.run)
        if ranks.first:
            write_config(config.run, dataclasses.replace(stored, video=config, image_weights=weights))
    slots, stored_samples = open_slots(config, image_config, backbone, image_stage, weights, dataset, opened)
    console.print(
        f"video stage: {count_parameters(model) / 1e6:.1f} M parameters, {config.num_frames} frames of "
        f"{image_stage.config.num_slots} slots, {len(dataset)} videos, {device}, {optim.precision}"
    )
    lengths = [v.num_frames for v in dataset.videos]
    task = VideoTask(model, slots, config.samples, lengths, optim, device, ranks)
    rows, noise = optim.batch_size // ranks.world, (config.model.num_slots, config.model.dim)
    given = (image_stage.config.num_slots, image_stage.config.dim)
    console.print(memory_notice(task, optim, [(rows, config.num_frames, *given), (rows, *noise)]))
    console.print(_attention(device, optim, rows, config.model, config.num_frames * given[0]))

    def samples() -> np.ndarray:
        segmenter = Segmenter(backbone, image_stage, model, image_config.data.frame_size, optim.precision)
        return sample_grid(segmenter, dataset, stored_samples)

    captured = config.compile and config.cuda_graph and device.type == "cuda"
    trainer = Trainer(
        task, optim, config.logging, config.run / "video", device, config.compile, samples, captured, ranks
    )
    trainer.run(stop)


def _attention(
    device: torch.device, optim: OptimConfig, rows: int, model: ImageModelConfig | VideoModelConfig, tokens: int
) -> str:
    """Choose the attention kernel by the largest self-attention of a step."""
    shape = (min(rows, optim.micro_batch or rows), model.heads, tokens, model.dim // model.heads)
    return choose_attention(device, optim.precision, shape)


def _resolved(optim: OptimConfig, device: torch.device) -> OptimConfig:
    return dataclasses.replace(optim, precision=resolve_precision(optim.precision, device))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    config = parse(sys.argv[1:] if arguments is None else arguments)
    train(config)
    where = Path(config.run)
    if isinstance(config, ImageTraining):
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
    run_command(main, (DivergedError, LoaderError, NotRepeatableError, ProcessLostError), RESUME)
