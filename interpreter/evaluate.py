"""Score a run against ground truth: ``python -m interpreter.evaluate --help``."""

import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from interpreter.cli import cli, run_command
from interpreter.configs import DataConfig, Stage
from interpreter.data import VOID, VideoDataset
from interpreter.engine.datasets import open_videos
from interpreter.engine.inference import Segmentation, Segmenter
from interpreter.engine.logging import progress_bar
from interpreter.engine.samples import nearest
from interpreter.files import write_text, written_whole
from interpreter.metrics import kmeans_segments, one_segment, upsample_labels
from interpreter.metrics.summary import PROTOCOLS, evaluate_video, summarise
from interpreter.render import mask_grid

Scores = dict[str, float | list[float]]


@dataclass(frozen=True)
class Evaluation:
    """Score a run, next to baselines on the same features: one segment for everything, and k-means per video.

    Prints a table with the protocol of each column; writes all numbers, per video too, as JSON, and a picture grid of
    some videos, below RUN/evaluation.
    """

    run: Path
    """Run directory."""
    stage: Stage = "video"
    """video: segments keep their identity. image: each frame by itself (its per-video numbers mean little)."""
    data: Literal["synthetic", "davis"] = "synthetic"
    """Data set with masks."""
    root: Path | None = None
    """Directory of the data. The synthetic default is RUN/scenes."""
    split: str = "val"
    """Split to score."""
    year: Literal["2016", "2017"] = "2016"
    """Edition of DAVIS."""
    num_videos: int = 40
    """Number of scenes to generate for synthetic data."""
    frame_size: tuple[int, int] | None = None
    """Height and width that frames are resized to. Default: as in training."""
    merge_threshold: float | None = None
    """Cosine distance below which video slots are merged: higher gives fewer segments. Default: as in training."""
    clusters: tuple[int, ...] = ()
    """Numbers of clusters for k-means. Default: as many as the run has slots."""
    positions: bool = False
    """Add k-means with patch positions appended to the features."""
    seed: int = 0
    """Seed of the slot prior and of k-means."""
    pictures: int = 5
    """Videos to draw picture grids of."""


def evaluate(config: Evaluation) -> dict[str, dict[str, float]]:
    """Score a run and its baselines; returns the numbers of :data:`interpreter.metrics.PROTOCOLS` for each.

    Raises:
        ValueError, FileNotFoundError: if the run or the data is missing, damaged or without masks.
    """
    segmenter = Segmenter.from_run(
        config.run, config.stage, config.frame_size, config.seed, merge_threshold=config.merge_threshold
    )
    data = DataConfig(config.data, config.root, config.split, config.year, config.num_videos)
    dataset = open_videos(data, config.run)
    name = f"{config.data}{'-' + config.year if config.data == 'davis' else ''}-{config.split}"
    home = config.run / "evaluation" / f"{name}-{config.stage}-seed{config.seed}"

    stage = segmenter.video_stage or segmenter.image_stage
    clusters = config.clusters or (stage.config.num_slots,)
    per_method: dict[str, dict[str, Scores]] = {}
    total = sum(v.num_frames for v in dataset.videos)
    with progress_bar("frames") as progress:
        bar = progress.add_task("evaluate", total=total, status="")
        for index, video in enumerate(dataset.videos):
            progress.update(bar, status=video.name)
            kept: list[Tensor] = []
            found = segmenter.segment(video, lambda n: progress.advance(bar, n), kept.append)
            truth = _truth(dataset, index)
            size = truth.shape[1:]
            patches = baselines(torch.cat(kept).cpu().numpy(), found.grid, clusters, config.positions, config.seed)
            labels = {f"{config.stage} stage": _full_size(found, size)}
            labels |= {m: upsample_labels(maps, grid=found.grid, size=size) for m, maps in patches.items()}
            for method, maps in labels.items():
                scores = evaluate_video(maps, truth, frames=None, void=VOID)
                per_method.setdefault(method, {})[video.name] = scores
            if index < config.pictures:
                _draw(home / f"{video.name.replace('/', '_')}.png", dataset, index, labels, truth, config.stage)
    summary = {method: summarise(list(scores.values())) for method, scores in per_method.items()}
    report = {"config": asdict(config), "protocols": dict(PROTOCOLS), "summary": summary, "videos": per_method}
    write_text(home / "scores.json", json.dumps(_null_for_nan(report), indent=1, default=str, allow_nan=False) + "\n")
    title = f"{name}, {len(dataset)} videos, {config.run}"
    table = format_table(summary, title, shown_columns(config.data, config.year))
    write_text(home / "table.txt", table)
    print(table)
    print(f"scores: {home / 'scores.json'}\ntable: {home / 'table.txt'}\npictures: {home}")
    return summary


def baselines(
    features: np.ndarray, grid: tuple[int, int], clusters: Sequence[int], positions: bool, seed: int
) -> dict[str, np.ndarray]:
    """Patch labels [T, M] of each baseline on features [T, M, D]."""
    frames, tokens, _ = features.shape
    maps = {"one segment": one_segment(frames, *grid).reshape(frames, tokens).astype(np.uint8)}
    for k in clusters:
        maps[f"k-means {k}"] = kmeans_segments(features, grid=grid, k=k, seed=seed)
        if positions:
            maps[f"k-means {k} + positions"] = kmeans_segments(features, grid=grid, k=k, positions=True, seed=seed)
    return maps


def _truth(dataset: VideoDataset, index: int) -> np.ndarray:
    masks = dataset.masks(index)
    if masks is None:
        raise ValueError(f"{dataset.videos[index].path} has no masks to score against")
    return masks


def _full_size(found: Segmentation, size: tuple[int, int]) -> np.ndarray:
    return np.concatenate([found.labels(slice(t, t + 16), size) for t in range(0, len(found), 16)])


def _draw(
    path: Path, dataset: VideoDataset, index: int, labels: dict[str, np.ndarray], truth: np.ndarray, stage: str
) -> None:
    video = dataset.videos[index]
    chosen = np.linspace(0, video.num_frames - 1, 6).round().astype(int)
    size = (240, round(240 * video.width / video.height))
    rows = {method: nearest(maps[chosen], size) for method, maps in labels.items() if method != "one segment"}
    image = mask_grid(video.read(chosen, size), rows, truth=nearest(truth[chosen], size), void=VOID)
    with written_whole(path) as temporary:
        Image.fromarray(image).save(temporary, format="png")


def _null_for_nan(value: object) -> object:
    """A number that is undefined (no foreground) as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _null_for_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_null_for_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def format_table(summary: dict[str, dict[str, float]], title: str, columns: Sequence[str]) -> str:
    """The numbers of each method as text, with the protocol of each column below."""
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for method, row in summary.items():
        table.add_row(method, *(f"{row[name]:.3f}" for name in columns))
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return text.getvalue() + "".join(f"{name.replace('_', ' ')}: {PROTOCOLS[name]}\n" for name in columns)


def shown_columns(data: str, year: str) -> list[str]:
    """J belongs to DAVIS: to the whole foreground in 2016, to each object in 2017."""
    wanted = {"davis-2016": "j_mean", "davis-2017": "j_mean_multi"}.get(f"{data}-{year}")
    return [name for name in PROTOCOLS if not name.startswith("j_") or name == wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    evaluate(cli(Evaluation, sys.argv[1:] if arguments is None else arguments, prog="python -m interpreter.evaluate"))
    return 0


if __name__ == "__main__":
    run_command(main)
