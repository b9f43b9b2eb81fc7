"""Compare ways of choosing the number of segments, on generated scenes with 1 to 12 objects.

    for s in 0 1 2; do
        python -m interpreter.train --stage image --run DIR/seed$s --scene-objects 1 12 --num-videos 72 --steps 1000 \
            --seed $s
    done
    python -m profiling.counting DIR

Image and video stages have the settings of the preset demo with half of the steps. The video stages (500 steps of 16
clips) are trained here, with 9 slots, and with 16 slots and a gate. The held-out scenes, 4 for each number of objects,
are segmented at 256×384 with 22 image slots. Their descriptions and the trained stages are kept in DIR.

The criterion of "auto" was chosen on the held-out scenes, with the image stage of seed 0. The rows "calibration" are
training scenes, whose masks were not used for this choice. The rows "fresh" are other held-out scenes, which were
evaluated once. The error of the count compares two numbers: that of the segments which cover at least 0.1 % of the
video's pixels, minus one for the background, and that of the visible objects.

The command prints the table and writes profiling/results/counting-cpu.json.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import average, fcluster
from scipy.spatial.distance import squareform
from slotkernels import cluster_slots, propagate_labels
from torch import Tensor

from interpreter.data import VideoDataset, open_dataset
from interpreter.data.scenes import generate_scenes
from interpreter.engine.randomness import torch_generator
from interpreter.methods.interpreter.association import group_by_features, slot_descriptions
from interpreter.methods.interpreter.counting import MOST, SHARE, alike, merge_alike, segment_distances
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.interpreter.token_means import TokenMeans
from interpreter.methods.interpreter.video_stage import VideoSlots, VideoStage
from interpreter.metrics import PROTOCOLS, score_video, summarise
from interpreter.models.autocast import autocast
from interpreter.models.clustering import weighted_kmeans
from interpreter.store.features import encode
from profiling.association import (
    BEST,
    CPU,
    Held,
    Variant,
    _segmenter,
    describe,
    inputs_of,
    new_stage,
    train,
    training_set,
)
from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS

RESULT = RESULTS / "counting-cpu.json"
OBJECTS, SCENES, FRAMES, IMAGE_SLOTS = 12, 4, 24, 22
CALIBRATION = 36  # training scenes
PROTOCOL = replace(PROTOCOLS["interpreter"], metrics=("fg_ari_video", "miou_video"), size=None, square_size=None)
LEAST_AREA = 1e-3  # of a segment that counts, as a share of the video's pixels
GROUPS = {"all": (1, 12), "1": (1, 1), "2-3": (2, 3), "4-6": (4, 6), "7-9": (7, 9), "10-12": (10, 12)}
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3)
SHARES = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65)
OBSERVATIONS = (30, 50, 75, 100, 150, 300)  # independent ones of a video, for the description length
CHOSEN_OBSERVATIONS = 75
LADDER = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)
VARIANTS = {
    "learned": Variant("9 slots", BEST, 1e-3, 500, 16),
    "gate 0.1": Variant("16 slots, gate of weight 0.1", replace(BEST, num_slots=16, gate=0.1), 1e-3, 500, 16),
    "gate 0.3": Variant("16 slots, gate of weight 0.3", replace(BEST, num_slots=16, gate=0.3), 1e-3, 500, 16),
}
Group = Callable[[Held, int], Tensor]  # a scene and a seed -> [T, N, K], slots over segments
_done: dict[tuple[Any, ...], Any] = {}  # what several rows start from


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remember the results of a function of objects that live as long as the study."""

    def remembered(*arguments: Any, **options: Any) -> Any:
        values = (*arguments, *options.values())
        key = (function.__name__, *(value if isinstance(value, int) else id(value) for value in values))
        if key not in _done:
            _done[key] = function(*arguments, **options)
        return _done[key]

    return remembered


def scenes_of(folder: Path, seed: int, kind: str) -> tuple[tuple[int, int], list[Held]]:
    """Patch grid, and descriptions of the held-out or of the training scenes, by the best draws; computed once."""
    path = folder / f"{kind}-{seed}.pt"
    if not path.is_file():
        segmenter = _segmenter(folder / f"seed{seed}", Settings(stage="image", image_slots=IMAGE_SLOTS), (256, 384))
        scenes, generator = [], torch_generator(CPU, seed, 7)
        for dataset, count in _datasets(folder, seed, kind):
            for index, video in enumerate(dataset.videos[:count]):
                parts = []
                for features in encode(segmenter.backbone, video.frames(segmenter.frame_size), segmenter.precision):
                    found = segmenter.find_image_slots(features, generator)
                    described = describe(features, found.slots, found.attention, segmenter.grid)
                    parts.append(described | {"attention": found.attention.half()})
                truth = {"truth": torch.from_numpy(dataset.masks(index))}
                scenes.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]} | truth)
        torch.save({"grid": segmenter.grid, "videos": scenes}, path)
    stored = torch.load(path)
    return stored["grid"], stored["videos"]


def _datasets(folder: Path, seed: int, kind: str) -> list[tuple[VideoDataset, int]]:
    """Data sets, and how many of the videos of each are used."""
    if kind == "calibration":
        return [(open_dataset("synthetic", folder / f"seed{seed}/scenes", "train"), CALIBRATION)]
    splits = {count: f"{'val' if kind == 'held' else kind}-{count}" for count in range(1, OBJECTS + 1)}
    for count, split in splits.items():
        generate_scenes(folder / "val", SCENES, num_frames=FRAMES, split=split, objects=(count, count))
    return [(open_dataset("synthetic", folder / "val", split), SCENES) for split in splits.values()]


def trained(name: str, folder: Path, seed: int) -> VideoStage:
    """A video stage, trained once."""
    path, variant = folder / f"{name.replace(' ', '-')}-{seed}.pt", VARIANTS[name]
    scenes = training_set(folder, seed, FRAMES)
    if not path.is_file():
        torch.save(train(variant, scenes, seed)[0].state_dict(), path)
    stage = new_stage(variant, inputs_of({key: value[:1] for key, value in scenes.items()}, variant).shape[-1])
    stage.load_state_dict(torch.load(path))
    return stage.eval()


def visible(scene: Held) -> int:
    """Objects that a scene shows."""
    return int((scene["truth"].unique() > 0).sum())


def described(scene: Held) -> TokenMeans:
    """Means of the tokens of the image slots."""
    return TokenMeans(scene["means"].float(), scene["places"].float(), scene["masses"].float())


@once
def by_features(scene: Held, seed: int, count: int) -> Tensor:
    """K-means, one-hot [T, N, count]."""
    return F.one_hot(group_by_features(described(scene), count, seed), count).float()


@once
@torch.no_grad()
def by_stage(stage: VideoStage, scene: Held, seed: int, count: int) -> tuple[VideoSlots, float]:
    """The draw of least loss of the video stage's slots, and its loss."""
    inputs, generator, draws = inputs_of(scene, VARIANTS["learned"])[None], torch.Generator().manual_seed(seed), []
    config = stage.config
    with autocast(CPU, "bf16"):
        context = stage.encode_slots(inputs)
        for _ in range(config.restarts):
            noise = torch.randn(1, count, config.dim, generator=generator)
            initial = stage.slot_attention.sample_slots(1, noise=noise)
            video = stage.group(context, initial, None, config.inference_iterations, config.inference_sharpness)
            draws.append((stage.error(video, inputs).item(), video))
    loss, best = min(draws, key=lambda draw: draw[0])
    return best, loss


def attention_of(video: VideoSlots) -> Tensor:
    """[T, N, C] of the slots that are left."""
    return video.attention[0, ..., video.valid[0]].float()


def merged(across: Tensor, labels: Tensor) -> Tensor:
    """Attention [T, N, C] over segments, of that over their K parts and the segment [K] of each."""
    return across @ F.one_hot(labels).float()


def auto(scene: Held, across: Tensor, share: float = SHARE) -> Tensor:
    """Segments merged as ``--num-slots auto`` does."""
    return across @ alike(described(scene), across, share)


def longest_interval(scene: Held, across: Tensor) -> Tensor:
    """Segments merged up to the longest interval of thresholds, as a ratio, that leaves their number as it is."""
    means = described(scene)
    distances = segment_distances(means.features.flatten(0, 1), across.flatten(0, 1), means.masses.sqrt().flatten())
    merges = average(squareform(distances.numpy(), checks=False))
    ratios = merges[1:, 2] / merges[:-1, 2].clip(1e-12)
    count = len(merges) - int(ratios.argmax())  # after merge i of 0, 1, … the number is K - 1 - i
    labels = fcluster(merges, count, "maxclust") - 1
    return merged(across, torch.from_numpy(labels.astype(np.int64)))


def by_threshold(scene: Held, across: Tensor, threshold: float) -> Tensor:
    """Segments whose descriptions are closer than a cosine distance are merged, by complete linkage."""
    means = described(scene)
    shares = across.flatten(0, 1) * means.masses.sqrt().flatten()[:, None]
    centres = shares.mT @ slot_descriptions(means).flatten(0, 1) / shares.sum(0)[:, None].clamp_min(1e-9)
    return merged(across, cluster_slots(centres[None], threshold)[0][0])


def shortest(losses: Sequence[float], observations: float) -> int:
    """The number of segments of least description length ``n/2 · log(loss) + K/2 · log(n)``, per dimension."""
    lengths = [
        observations / 2 * math.log(max(loss, 1e-30)) + count / 2 * math.log(observations)
        for loss, count in zip(losses, LADDER, strict=True)
    ]
    return LADDER[int(np.argmin(lengths))]


@once
def inertias(scene: Held, seed: int) -> list[float]:
    """Losses of k-means along the ladder."""
    means = described(scene)
    points, weights = slot_descriptions(means).flatten(0, 1), means.masses.sqrt().flatten()
    return [weighted_kmeans(points, count, weights=weights, seed=seed).inertia for count in LADDER]


def _of_groups(merge: Callable[..., Tensor], scene: Held, seed: int, **options: float) -> Tensor:
    """Merge the most segments that k-means starts from."""
    return merge(scene, by_features(scene, seed, MOST), **options)


def of_least_length(scene: Held, seed: int, observations: float) -> Tensor:
    """K-means with the number of segments of least description length."""
    return by_features(scene, seed, shortest(inertias(scene, seed), observations))


def rows_of_features() -> dict[str, Group]:
    """Ways to choose the number of segments of k-means."""
    rows: dict[str, Group] = {f"fixed {k}": partial(by_features, count=k) for k in (5, 7, 9, 11)}
    rows["true number"] = lambda s, seed: by_features(s, seed, visible(s) + 1)
    for t in THRESHOLDS:
        rows[f"threshold {t}"] = partial(_of_groups, by_threshold, threshold=t)
    rows["auto: description length"] = partial(of_least_length, observations=CHOSEN_OBSERVATIONS)
    rows["auto: longest interval"] = partial(_of_groups, longest_interval)
    rows["auto"] = partial(_of_groups, auto)
    rows["auto, true number"] = partial(_of_groups, true_number)
    return {f"features: {name}": row for name, row in rows.items()}


def true_number(scene: Held, across: Tensor) -> Tensor:
    """Segments merged as in :func:`auto`, down to the true number: what its merges would be worth."""
    means = described(scene)
    distances = segment_distances(means.features.flatten(0, 1), across.flatten(0, 1), means.masses.sqrt().flatten())
    left = [merge_alike(distances, share) for share in np.linspace(0, 1, 201)]
    return merged(across, min(left, key=lambda labels: abs(int(labels.max()) - visible(scene))))


def rows_of_stages(folder: Path, seed: int) -> dict[str, Group]:
    """Ways to choose the number of segments of the video stage."""
    stage = trained("learned", folder, seed)

    def slots(scene: Held, seed: int, count: int = MOST) -> Tensor:
        return attention_of(by_stage(stage, scene, seed, count)[0])

    def length(scene: Held, seed: int) -> Tensor:
        losses = [by_stage(stage, scene, seed, count)[1] for count in LADDER]
        return slots(scene, seed, shortest(losses, CHOSEN_OBSERVATIONS))

    def threshold(scene: Held, seed: int, t: float) -> Tensor:
        best, _ = by_stage(stage, scene, seed, MOST)
        return merged(attention_of(best), cluster_slots(best.unmerged.float(), t)[0][0])

    def gated(stage: VideoStage, scene: Held, seed: int) -> Tensor:
        return attention_of(by_stage(stage, scene, seed, MOST)[0])

    rows: dict[str, Group] = {"fixed 9": lambda s, seed: slots(s, seed, 9)}
    rows["true number"] = lambda s, seed: slots(s, seed, visible(s) + 1)
    for t in THRESHOLDS:
        rows[f"threshold {t}"] = partial(threshold, t=t)
    rows["auto: description length"] = length
    rows["auto: longest interval"] = lambda s, seed: longest_interval(s, slots(s, seed))
    rows["auto"] = lambda s, seed: auto(s, slots(s, seed))
    for name in ("gate 0.1", "gate 0.3"):
        rows[name] = partial(gated, trained(name, folder, seed))
    return {f"learned: {name}": row for name, row in rows.items()}


def rows_of_confirmation(folder: Path, seed: int) -> dict[str, Group]:
    """The chosen criterion and fixed numbers, for scenes that nothing was chosen on."""
    named = {**rows_of_features(), **rows_of_stages(folder, seed)}
    chosen = [*(f"features: fixed {k}" for k in (7, 9, 11)), "features: auto", "learned: fixed 9", "learned: auto"]
    return {f"fresh {name}": named[name] for name in chosen}


def rows_of_calibration() -> dict[str, Group]:
    """The criteria with several constants, and fixed numbers, for training scenes."""
    rows: dict[str, Group] = {f"fixed {k}": partial(by_features, count=k) for k in (7, 9)}
    for share in SHARES:
        rows[f"share {share}"] = partial(_of_groups, auto, share=share)
    for n in OBSERVATIONS:
        rows[f"observations {n}"] = partial(of_least_length, observations=n)
    return {f"calibration: {name}": row for name, row in rows.items()}


def score(grid: tuple[int, int], scenes: Sequence[Held], group: Group, seed: int) -> dict[str, dict[str, float]]:
    """Numbers by group of scenes: error of the count, its mean, FG-ARI and mIoU of videos."""
    videos = []
    for scene in scenes:
        across = group(scene, seed)[None].contiguous()
        height, width = scene["truth"].shape[1:]
        labels = propagate_labels(scene["attention"][None], across, grid, (height, width))[0].numpy()
        areas = np.bincount(labels.ravel()) / labels.size
        found = int((areas >= LEAST_AREA).sum()) - 1
        videos.append((visible(scene), found, score_video(PROTOCOL, labels, scene["truth"].numpy())))
    numbers = {}
    for name, (fewest, most) in GROUPS.items():
        chosen = [video for video in videos if fewest <= video[0] <= most]
        if chosen:
            means = summarise(PROTOCOL, (scores for _, _, scores in chosen))
            numbers[name] = {
                "count_error": statistics.fmean(abs(found - true) for true, found, _ in chosen),
                "count_bias": statistics.fmean(found - true for true, found, _ in chosen),
                "fg_ari": means["fg_ari_video"],
                "miou": means["miou_video"],
            }
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in numbers.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean over seeds of the error of the count, FG-ARI and mIoU, for each group of scenes."""
    lines = ["| | seeds | " + " | ".join(GROUPS) + " |", "|---|" + "---|" * (1 + len(GROUPS))]
    for name in dict.fromkeys(row["row"] for row in rows):
        mine = [row["scores"] for row in rows if row["row"] == name]
        cells = [
            " / ".join(
                f"{statistics.fmean(scores[group][key] for scores in mine):.{digits}f}"
                for key, digits in (("count_error", 2), ("fg_ari", 3), ("miou", 3))
            )
            for group in GROUPS
        ]
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the runs, seed0, seed1 and so on, and of what is computed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs, and of all training here")
    text = "of scenes: of the training; held out; held out and not looked at when the criterion was found"
    kinds = ("calibration", "held", "fresh")
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help=text)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        of_features, of_stages = rows_of_features(), partial(rows_of_stages, options.folder, seed)
        for kind in options.kinds:
            if kind == "calibration":
                groups = {} if seed else rows_of_calibration()
            else:
                groups = of_features | of_stages() if kind == "held" else rows_of_confirmation(options.folder, seed)
            grid, scenes = scenes_of(options.folder, seed, kind) if groups else ((0, 0), [])
            for name, group in groups.items():
                keep({"row": name, "seed": seed, "scores": score(grid, scenes, group, seed)})
    print(table(json.loads(RESULT.read_text())["rows"]))


def keep(result: dict[str, Any]) -> None:
    """Add a row to the results; it replaces an older one."""
    stored = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    rows = [row for row in stored if (row["row"], row["seed"]) != (result["row"], result["seed"])] + [result]
    save(
        RESULT,
        {
            "what": "choosing the number of segments of scenes with 1 to 12 objects",
            **machine("cpu"),
            "command": "python -m profiling.counting DIR",  # rows may come from several calls
            "constants": {"most": MOST, "share": SHARE, "observations": CHOSEN_OBSERVATIONS},
            "rows": sorted(rows, key=lambda row: (row["row"].split(":")[0], row["seed"])),
        },
    )


if __name__ == "__main__":
    main()
