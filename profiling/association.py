"""Compare ways of grouping the image slots of a video: the learned video stage and its variants, and k-means.

    for s in 0 1 2; do
        python -m interpreter.train --stage image --run DIR/seed$s --num-videos 120 --steps 2000 --seed $s
    done
    python -m profiling.association DIR                       # all rows: half an hour for each seed on one core
    python -m profiling.association DIR --seeds 0 --rows means-masks features

The slots of 120 training scenes at 128×192 and of the held-out scenes at 256×384 are computed once and kept in DIR.
The held-out scenes are 40 scenes of 24 frames, with as many slots as in training (11) and with 24, and 10 scenes each
of 100 and 200 frames. Every variant of the video stage is trained on the same clips, except means-masks-long and
means-masks-longer, which are trained on 60 scenes of 100 frames. The command prints the table, and writes its rows to
profiling/results/association-cpu.json; a new row replaces the older row of the same name.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from slotkernels import propagate_labels
from torch import Tensor

from interpreter.data import open_dataset
from interpreter.data.scenes import generate_scenes
from interpreter.engine.randomness import torch_generator
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter.association import RESTARTS, group_by_features, slot_descriptions
from interpreter.methods.interpreter.config import VideoModelConfig
from interpreter.methods.interpreter.image_slots import encode_slots
from interpreter.methods.interpreter.segmenter import InterpreterSegmenter
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.interpreter.token_means import TokenMeans, means_as_inputs, token_means
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.methods.runs import open_segmenter
from interpreter.metrics import PROTOCOLS, resize_labels, score_video, summarise
from interpreter.models.autocast import autocast
from interpreter.models.clustering import weighted_kmeans
from interpreter.store.features import encode
from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS
from profiling.weighted_video_stage import WeightedVideoStage

CPU = torch.device("cpu")
DRAWS, FRAMES, SEGMENTS = 4, 24, 9
LONG_SCENES = 60  # of training, of 100 frames
SIZE = (336, 504)  # that the protocols compare masks at
# Name of a held-out set: number of scenes, their frames, and image slots of each frame.
SETS = {"24 frames, N=11": (40, 24, 11), "24 frames, N=24": (40, 24, 24)}
SETS |= {"100 frames, N=11": (10, 100, 11), "200 frames, N=11": (10, 200, 11)}
METRICS = ("fg_ari_video", "fg_ari_frame", "miou_video", "identity_switches", "identity_switches_per_100")
BY_MATCH = ("interpreter", "interpreter-spatio-temporal")
RESULT = RESULTS / "association-cpu.json"

Held = dict[str, Tensor]  # slots, means, places, masses, attention and true masks of a scene
Grouping = Callable[[Held, int], Tensor]  # a scene and a seed -> [T, N, K], slots over segments


@dataclass(frozen=True)
class Variant:
    """A variant of the video stage and its training.

    Attributes:
        what: what is changed.
        model: of the stage.
        lr: learning rate after warm-up.
        steps, batch_size, frames: of the training, and of its clips.
        weights: power of the masses that weigh image slots, in slot attention and in the loss; 0 weighs all the same.
    """

    what: str
    model: VideoModelConfig
    lr: float = 4e-4
    steps: int = 500
    batch_size: int = 8
    frames: int = FRAMES
    weights: float = 0.0


PAPER = VideoModelConfig()
MASKS = replace(PAPER, decoder="masks", merge_threshold=0.0)
MEANS = replace(MASKS, inputs="means")
ALONE = replace(MEANS, encoder_layers=0)
LONGER = replace(ALONE, inference_iterations=12, restarts=16)
BEST = replace(LONGER, inference_sharpness=2.0)

VARIANTS = {
    "paper": Variant("slots, transformer decoder, Sinkhorn divergence, merging at 0.05", PAPER),
    "no-merging": Variant("without merging", replace(PAPER, merge_threshold=0.0)),
    "masks": Variant("mask decoder, without merging", MASKS),
    "means-transformer": Variant("means, transformer decoder, no merging", replace(MEANS, decoder="transformer")),
    "means-masks-encoder": Variant("means, mask decoder", MEANS),
    "means-masks-slow": Variant("means, mask decoder, no encoder", ALONE),
    "means-masks-fast": Variant("the same, learning rate 1e-3, 1000 steps of 16 clips", ALONE, 1e-3, 1000, 16),
    "means-masks-soft": Variant("the same, 12 iterations and 16 draws at inference", LONGER, 1e-3, 1000, 16),
    "means-masks": Variant("the same, sharpness 2 at inference", BEST, 1e-3, 1000, 16),
    "slots-masks": Variant("as means-masks, but slots", replace(BEST, inputs="slots"), 1e-3, 1000, 16),
    "means-masks-roots": Variant("as means-masks, weighted by roots of masses", BEST, 1e-3, 1000, 16, weights=0.5),
    "means-masks-masses": Variant("as means-masks, weighted by masses", BEST, 1e-3, 1000, 16, weights=1.0),
    "means-transformer-masses": Variant(
        "as means-transformer, weighted by masses", replace(MEANS, decoder="transformer"), weights=1.0
    ),
    "paper-masses": Variant("as no-merging, weighted by masses", replace(PAPER, merge_threshold=0.0), weights=1.0),
    "means-masks-long": Variant("as means-masks, 4 clips of 100 frames", BEST, 1e-3, 1000, 4, frames=100),
    "means-masks-longer": Variant("the same, 3000 steps of 8 clips", BEST, 1e-3, 3000, 8, frames=100),
}
UNTRAINED = {
    "features": "association by features: k-means weighted by the square root of masses",
    "features-masses": "the same, weighted by masses",
    "features-unweighted": "the same, all slots weigh the same",
    "ceiling": "each slot takes the object that most of its tokens show",
}


def describe(features: Tensor, slots: Tensor, attention: Tensor, grid: tuple[int, int]) -> Held:
    """Slots and the means of their tokens, of t frames."""
    means, places, masses = token_means(features, attention, grid)
    return {"slots": slots.half(), "means": means.half(), "places": places.half(), "masses": masses.half()}


def training_set(folder: Path, seed: int, length: int) -> Held:
    """Descriptions [V, 2, R, T, N, …] of scenes of a length, both flips and all draws; computed once.

    Scenes of 24 frames come from the run; longer ones are generated for all runs.
    """
    run = folder / f"seed{seed}"
    path = folder / (f"train{seed}.pt" if length == FRAMES else f"train{length}-{seed}.pt")
    root = run / "scenes" if length == FRAMES else folder / f"train{length}"
    if path.is_file():
        return torch.load(path)
    if length != FRAMES:
        generate_scenes(root, LONG_SCENES, num_frames=length, split="train")
    segmenter = _segmenter(run)
    stage, generator = segmenter.image_stage, torch_generator(CPU, seed, 99)
    scenes = []
    for video in open_dataset("synthetic", root, "train").videos:
        frames, flips = list(video.frames(segmenter.frame_size)), []
        for flip in (False, True):
            pixels = [frame[:, ::-1].copy() if flip else frame for frame in frames]
            features, draws = torch.cat(list(encode(segmenter.backbone, pixels, segmenter.precision))), []
            for _ in range(DRAWS):
                shape = (len(features), stage.config.num_slots, stage.config.dim)
                noise = list(torch.randn(shape, generator=generator).numpy())
                encoded = encode_slots(stage, features, noise, segmenter.precision)
                draws.append(describe(features, encoded.slots, encoded.attention, segmenter.grid))
            flips.append(_stack(draws))
        scenes.append(_stack(flips))
    torch.save(_stack(scenes), path)
    return torch.load(path)


def held_out_set(folder: Path, name: str, seed: int) -> tuple[tuple[int, int], list[Held]]:
    """Patch grid and descriptions of the scenes of a set, each frame by the best of its draws; computed once."""
    count, length, slots = SETS[name]
    root = folder / ("val" if length == FRAMES else f"long{length}")
    path = folder / f"{root.name}-{slots}-{seed}.pt"
    if not path.is_file():
        generate_scenes(root, count, num_frames=length, split="val")
        settings = Settings(stage="image", image_slots=slots)
        segmenter = _segmenter(folder / f"seed{seed}", settings, (256, 384))
        dataset, generator, scenes = open_dataset("synthetic", root, "val"), torch_generator(CPU, seed, 7, slots), []
        for index, video in enumerate(dataset.videos):
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


def _segmenter(
    run: Path, settings: Settings | None = None, size: tuple[int, int] | None = None
) -> InterpreterSegmenter:
    segmenter = open_segmenter(INTERPRETER, run, settings or Settings(stage="image"), size)
    assert isinstance(segmenter, InterpreterSegmenter)
    return segmenter


def _stack(parts: Sequence[Held]) -> Held:
    return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}


def inputs_of(described: Held, variant: Variant) -> Tensor:
    """What the video stage gets of each slot."""
    if variant.model.inputs == "slots":
        inputs = described["slots"].float()
    else:
        inputs = means_as_inputs(torch.cat([described["means"], described["places"]], -1).float())
    return torch.cat([inputs, described["masses"].float()[..., None]], -1) if variant.weights else inputs


def new_stage(variant: Variant, width: int) -> VideoStage:
    """An untrained stage for inputs of a width."""
    if variant.weights:
        return WeightedVideoStage(variant.model, width - 1, variant.frames, variant.weights)
    return VideoStage(variant.model, width, variant.frames)


def train(variant: Variant, scenes: Held, seed: int) -> tuple[VideoStage, float, float]:
    """A trained stage, the seconds that it took, and the mean loss of its last 20 steps."""
    torch.manual_seed(1000 + seed)
    stage = new_stage(variant, inputs_of({k: v[:1] for k, v in scenes.items()}, variant).shape[-1])
    optimizer = torch.optim.AdamW(stage.parameters(), lr=variant.lr, weight_decay=0.005)
    generator, warmup, begin = torch.Generator().manual_seed(seed), variant.steps // 10, time.perf_counter()
    order, losses = torch.empty(0, dtype=torch.long), []
    for step in range(variant.steps):
        if len(order) < variant.batch_size:
            order = torch.cat([order, torch.randperm(len(scenes["slots"]), generator=generator)])
        chosen, order = order[: variant.batch_size, None], order[variant.batch_size :]
        flips = torch.randint(2, chosen.shape, generator=generator)
        draws = torch.randint(DRAWS, (len(chosen), variant.frames), generator=generator)
        times = torch.arange(variant.frames)
        inputs = inputs_of({k: v[chosen, flips, draws, times] for k, v in scenes.items()}, variant)
        noise = torch.randn(len(chosen), variant.model.num_slots, variant.model.dim, generator=generator)
        of_gate = {} if stage.gate is None else {"gate_noise": torch.randn(noise.shape[:2], generator=generator)}
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (variant.steps - warmup))
        optimizer.param_groups[0]["lr"] = variant.lr * ((step + 1) / warmup if step < warmup else cosine)
        with autocast(CPU, "bf16"):
            loss, _ = stage(inputs, stage.slot_attention.sample_slots(len(chosen), noise=noise), **of_gate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return stage.eval(), time.perf_counter() - begin, statistics.fmean(losses[-20:])


@torch.no_grad()
def learned(variant: Variant, stage: VideoStage, scene: Held, seed: int) -> Tensor:
    """Attention [T, N, C] of the draw of least loss, as the product segments."""
    inputs, generator, draws = inputs_of(scene, variant)[None], torch.Generator().manual_seed(seed), []
    with autocast(CPU, "bf16"):
        context = stage.encode_slots(inputs)
        for _ in range(stage.config.restarts):
            initial = stage.slot_attention.sample_slots(1, generator)
            iterations, sharpness = stage.config.inference_iterations, stage.config.inference_sharpness
            video = stage.group(context, initial, None, iterations, sharpness)
            draws.append((stage.error(video, inputs).item(), video))
    best = min(draws, key=lambda draw: draw[0])[1]
    return best.attention[0, ..., best.valid[0]].float()


def by_features(scene: Held, seed: int, power: float = 0.5) -> Tensor:
    """One-hot segments [T, N, K] by k-means, weighted by a power of the masses; the product's is a half."""
    described = TokenMeans(scene["means"].float(), scene["places"].float(), scene["masses"].float())
    if power == 0.5:
        labels = group_by_features(described, SEGMENTS, seed)
    else:
        points, weights = slot_descriptions(described).flatten(0, 1), described.masses.flatten() ** power
        labels = weighted_kmeans(points, SEGMENTS, weights=weights, restarts=RESTARTS, seed=seed).labels
    return F.one_hot(labels.view(described.masses.shape), SEGMENTS).float()


def ceiling(scene: Held, grid: tuple[int, int]) -> Tensor:
    """One-hot objects [T, N, objects]: of each slot the object, or the background, that most of its tokens show."""
    truth = scene["truth"].long()
    shares = F.adaptive_avg_pool2d(F.one_hot(truth).permute(0, 3, 1, 2).float(), grid).flatten(2).mT  # [T, M, objects]
    attention = scene["attention"]
    hard = F.one_hot(attention.argmax(-1), attention.shape[-1]).float()
    return F.one_hot((hard.mT @ shares).argmax(-1), shares.shape[-1]).float()


def score(grid: tuple[int, int], scenes: Sequence[Held], group: Grouping, seed: int) -> dict[str, float]:
    """Numbers of a held-out set, without void pixels and refined edges."""
    videos: dict[str, list[Any]] = {name: [] for name in BY_MATCH}
    for scene in scenes:
        across = group(scene, seed)[None].contiguous()
        labels = propagate_labels(scene["attention"][None], across, grid, SIZE)[0].numpy()
        true = resize_labels(scene["truth"].numpy(), SIZE)
        for name, scores in videos.items():
            scores.append(score_video(PROTOCOLS[name], labels, true))
    means = {name: summarise(PROTOCOLS[name], scores) for name, scores in videos.items()}
    numbers = {metric: means["interpreter"][metric] for metric in METRICS}
    return numbers | {"miou_video_spatio_temporal": means["interpreter-spatio-temporal"]["miou_video"]}


def run_row(name: str, folder: Path, seed: int, sets: Sequence[str]) -> dict[str, Any]:
    """Train if there is something to train, and score on every set."""
    training: dict[str, Any] = {}
    if name in VARIANTS:
        variant = VARIANTS[name]
        stage, seconds, loss = train(variant, training_set(folder, seed, variant.frames), seed)
        parameters = sum(parameter.numel() for parameter in stage.parameters())
        training = {"seconds": round(seconds, 1), "loss": round(loss, 4), "parameters": parameters}
    scores = {}
    for held in sets:
        grid, scenes = held_out_set(folder, held, seed)
        group: dict[str, Grouping] = {
            "features": by_features,
            "features-masses": lambda scene, seed: by_features(scene, seed, power=1.0),
            "features-unweighted": lambda scene, seed: by_features(scene, seed, power=0.0),
            "ceiling": lambda scene, seed, grid=grid: ceiling(scene, grid),  # type: ignore[misc]
        }
        chosen = group[name] if name in UNTRAINED else lambda scene, seed: learned(variant, stage, scene, seed)
        scores[held] = {metric: round(value, 4) for metric, value in score(grid, scenes, chosen, seed).items()}
    return {"row": name, "seed": seed, **training, "scores": scores}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean ± sample standard deviation over seeds of video FG-ARI, video mIoU and identity switches."""
    lines = ["| | seeds | s | " + " | ".join(SETS) + " |", "|---|" + "---|" * (2 + len(SETS))]
    for name in {**VARIANTS, **UNTRAINED}:
        mine = [row for row in rows if row["row"] == name]
        if not mine:
            continue
        cells = []
        for held in SETS:
            scores = [row["scores"][held] for row in mine if held in row["scores"]]
            metrics = ("fg_ari_video", "miou_video", "identity_switches")
            cells.append(" / ".join(_cell([one[metric] for one in scores]) for metric in metrics))
        seconds = f"{statistics.fmean(row['seconds'] for row in mine):.0f}" if "seconds" in mine[0] else ""
        lines.append(f"| {name} | {len(mine)} | {seconds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the runs, seed0, seed1 and so on, and of what is computed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs, and of all training here")
    everything = [*VARIANTS, *UNTRAINED]
    parser.add_argument("--rows", nargs="+", default=everything, choices=everything, help="which rows to compute")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), help="held-out scenes to score on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for name in options.rows:
            result = run_row(name, options.folder, seed, options.sets)
            stored = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
            rows = [row for row in stored if (row["row"], row["seed"]) != (name, seed)] + [result]
            save(
                RESULT,
                {
                    "what": "grouping image slots over time: variants of the learned video stage, and k-means",
                    **machine("cpu"),
                    "command": "python -m profiling.association DIR",  # rows may come from several calls
                    "variants": {key: asdict(variant) for key, variant in VARIANTS.items()} | UNTRAINED,
                    "rows": sorted(rows, key=lambda row: (everything.index(row["row"]), row["seed"])),
                },
            )
            print(table(rows), flush=True)


if __name__ == "__main__":
    main()
