"""Train the video stage on videos of different lengths: repeated, padded, or padded without a part of the masking.

    python -m interpreter.train --stage image --run DIR/run --num-videos 64 --steps 1000 --dim 64 --num-slots 8
    python -m profiling.masking DIR                              # all rows and the picture: 15 minutes on one core
    python -m profiling.masking DIR --rows repeat mask --seeds 0 --steps 400
    python -m profiling.masking DIR --rows                       # only the picture

The stage has the paper's form (slots, time encodings, transformers, Sinkhorn divergence, merging) at a small size. Its
clips are generated scenes of 24 frames, cut to lengths from 4 to 24; most of them are short. Trained stages are
compared on held-out scenes, whole and cut. These are segmented one at a time, so nothing is padded. The rows are
written to profiling/results/masking-cpu.json, where a new row replaces the older row of the same name. The command
also draws docs/pictures/masking.png.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from slotkernels import cluster_slots, merge_slots, propagate_labels, sinkhorn_divergence
from torch import Tensor

from interpreter.data import open_dataset
from interpreter.data.scenes import generate_scenes
from interpreter.engine.randomness import torch_generator
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter.config import VideoModelConfig
from interpreter.methods.interpreter.image_slots import encode_slots
from interpreter.methods.interpreter.segmenter import InterpreterSegmenter
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.interpreter.video_stage import VideoSlots, VideoStage
from interpreter.methods.runs import open_segmenter
from interpreter.metrics import PROTOCOLS, score_video, summarise
from interpreter.models.transformer import Attention, Block
from interpreter.store.features import encode
from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS, ROOT

CPU = torch.device("cpu")
FRAMES, SHORTEST, DRAWS, HELD_OUT, BATCH = 24, 4, 2, 12, 8
RESULT, PICTURE = RESULTS / "masking-cpu.json", ROOT / "docs" / "pictures" / "masking.png"
MODEL = VideoModelConfig(num_slots=8, dim=64, heads=4, encoder_layers=2, decoder_layers=2, time_scale=1.0)

Clips = dict[str, Tensor]


@dataclass(frozen=True)
class Variant:
    """A way to train on clips of uneven length.

    Attributes:
        what: what is done.
        undone: the part of the masking that is removed: encoder, additive, attention, clustering, loss, normaliser,
            box, or all; None for none.
        repeat: whether short clips are repeated; then nothing is padded.
        even: whether a batch has more clips, so that it has as many frames as 8 repeated clips.
        in_time: whether there are fewer steps, so that all steps together see as many clips as without ``even``.
    """

    what: str
    undone: str | None = None
    repeat: bool = False
    even: bool = False
    in_time: bool = False


VARIANTS = {
    "repeat": Variant("short clips repeat from their start, as in the paper", repeat=True),
    "repeat-even": Variant("the same, with as many clips as mask-even", repeat=True, even=True),
    "mask": Variant("short clips are padded, and the padding is masked everywhere"),
    "mask-even": Variant("the same, with so many clips that a batch has as many frames as that of repeat", even=True),
    "mask-in-time": Variant("the same, with so few steps that it takes as long as repeat", even=True, in_time=True),
    "loss": Variant("padding weighs in the loss: its targets are zeros, and the mean runs over all steps", "loss"),
    "normaliser": Variant("the sum over a clip's steps is divided by the length of the batch", "normaliser"),
    "encoder": Variant("inputs attend to padding in the encoder", "encoder"),
    "attention": Variant("video slots compete for padding, too", "attention"),
    "clustering": Variant("slots are merged by the distances of slots that padding has fed", "clustering"),
    "box": Variant("the annealing starts at the box around the batch with its padding", "box"),
    "nothing-masked": Variant("zeros are appended, and nothing is masked", "all"),
    "additive": Variant("the encoder adds -inf also to the rows of padding, which then have no key at all", "additive"),
}  # fmt: skip


class PartlyMasked(VideoStage):
    """A video stage without a part of the masking (see :class:`Variant`)."""

    def __init__(self, config: VideoModelConfig, input_dim: int, num_frames: int, undone: str | None) -> None:
        super().__init__(config, input_dim, num_frames)
        self.undone = undone
        if undone == "additive":
            for block in self.encoder.blocks:
                assert isinstance(block, Block)
                additive = AdditiveAttention(config.dim, config.heads)
                assert block.attend_self is not None
                additive.load_state_dict(block.attend_self.state_dict())
                block.attend_self = additive

    def encode_slots(self, inputs: Tensor, masses: Tensor | None = None) -> Tensor:
        """See :meth:`VideoStage.encode_slots`."""
        return super().encode_slots(inputs, None if self.undone in ("encoder", "all") else masses)

    def group(self, context: Tensor, slots: Tensor | None = None, *args: Any, **options: Any) -> VideoSlots:
        """See :meth:`VideoStage.group`."""
        masses = options.pop("masses", None)
        if self.undone in ("attention", "all"):
            return super().group(context, slots, *args, **options)
        if self.undone != "clustering":
            options["masses"] = masses
            return super().group(context, slots, *args, **options)
        fed = super().group(context, slots, 0.0, **options).unmerged
        labels, _ = cluster_slots(fed.detach(), self.config.merge_threshold)
        apart = super().group(context, slots, 0.0, masses=masses, **options)
        attention = apart.attention.flatten(1, 2)
        merged, attention, valid = merge_slots(apart.unmerged, attention, labels)
        return VideoSlots(merged, attention.unflatten(1, context.shape[1:3]), valid, apart.unmerged)

    def error(self, video: VideoSlots, inputs: Tensor, masses: Tensor | None = None) -> Tensor:
        """See :meth:`VideoStage.error`."""
        if masses is None or self.undone not in ("loss", "normaliser", "box", "all"):
            return super().error(video, inputs, masses)
        everything = self.undone in ("loss", "all")
        frames, count = inputs.shape[1:3]
        reconstructed = self.decode(video, frames, count, None if everything else masses)
        box = "batch" if self.undone == "box" else "problem"
        options = {"blur": self.config.blur, "scaling": self.config.scaling, "diameter": box}
        error = sinkhorn_divergence(reconstructed.flatten(0, 1), inputs.flatten(0, 1), **options)  # type: ignore[arg-type]
        error, present = error.unflatten(0, inputs.shape[:2]), masses[..., 0] > 0
        if everything:
            return error.mean(1)
        error = error.masked_fill(~present, 0.0).sum(1)
        return error / (frames if self.undone == "normaliser" else present.sum(1))


class AdditiveAttention(Attention):
    """Attention whose mask is added to the logits of keys and of queries: a row of padding is -inf throughout."""

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """See :class:`Attention`."""
        assert mask is not None
        k, v = self.to_kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        hidden = torch.zeros_like(logits).masked_fill(~(mask[:, None, :, None] & mask[:, None, None, :]), -torch.inf)
        return self.to_out(((logits + hidden).softmax(-1) @ v).transpose(1, 2).flatten(2))


def probes() -> dict[str, bool]:
    """Which ways to compute the attention of a query without any key give finite numbers, and finite gradients."""
    found = {}
    mask = torch.tensor([[True, True], [False, False]])
    hidden = torch.zeros(2, 2).masked_fill(~mask, -torch.inf)
    for name, attend in {
        "softmax of -inf": lambda q: (q @ q.mT + hidden).softmax(-1) @ q,
        "softmax of -inf, its row then set to 0": lambda q: (q @ q.mT + hidden).softmax(-1).masked_fill(~mask, 0.0) @ q,
        "scaled_dot_product_attention": lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=mask),
    }.items():
        q = torch.ones(1, 1, 2, 8, requires_grad=True)
        out = attend(q)
        out[..., 0, :].sum().backward()  # only the row that has keys
        assert q.grad is not None
        found[f"{name}: value"] = bool(out.isfinite().all())
        found[f"{name}: gradient"] = bool(q.grad.isfinite().all())
    return found


def image_slots(folder: Path, split: str) -> Clips:
    """Image slots [V, R, T, N, D] of a split, and of val attention [V, T, M, N] and true masks; computed once."""
    path, run = folder / f"slots-{split}.pt", folder / "run"
    if path.is_file():
        return torch.load(path)
    root, draws = (run / "scenes", DRAWS) if split == "train" else (folder / "val", 1)
    if split == "val":
        generate_scenes(root, HELD_OUT, num_frames=FRAMES, split="val")
    segmenter = open_segmenter(INTERPRETER, run, Settings(stage="image"), None)
    assert isinstance(segmenter, InterpreterSegmenter)
    stage, generator, scenes = segmenter.image_stage, torch_generator(CPU, 0, 99), []
    dataset = open_dataset("synthetic", root, split)
    for index, video in enumerate(dataset.videos):
        frames = list(video.frames(segmenter.frame_size))
        features = torch.cat(list(encode(segmenter.backbone, frames, segmenter.precision)))
        shape = (len(features), stage.config.num_slots, stage.config.dim)
        found = [
            encode_slots(stage, features, list(torch.randn(shape, generator=generator).numpy()), segmenter.precision)
            for _ in range(draws)
        ]
        scene = {"slots": torch.stack([one.slots for one in found]).half()}
        if split == "val":
            scene |= {"attention": found[0].attention.half(), "truth": torch.from_numpy(dataset.masks(index))}
        scenes.append(scene)
    clips = {key: torch.stack([scene[key] for scene in scenes]) for key in scenes[0]}
    torch.save(clips | ({"grid": torch.tensor(segmenter.grid)} if split == "val" else {}), path)
    return torch.load(path)


def cut(count: int) -> Tensor:
    """Lengths [count] from 4 to 24: half of them are at most 9."""
    share = (torch.arange(count) + 0.5) / count
    lengths = SHORTEST + ((FRAMES - SHORTEST + 1) * share**2).long()
    return lengths[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def train(variant: Variant, scenes: Clips, held: Clips, seed: int, steps: int, lr: float) -> dict[str, Any]:
    """Curves of a training, and the numbers of the trained stage."""
    torch.manual_seed(1000 + seed)
    slots = scenes["slots"].float()
    stage = PartlyMasked(MODEL, slots.shape[-1], FRAMES, variant.undone)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=lr, weight_decay=0.005)
    lengths = cut(len(slots))
    rows = round(BATCH * FRAMES / lengths.float().mean().item()) if variant.even else BATCH
    steps = round(steps * BATCH / rows) if variant.in_time else steps
    generator, warmup, every = torch.Generator().manual_seed(seed), max(1, steps // 10), max(1, steps // 10)
    norms, merged, curve, seconds, diverged, times = [], [], [], 0.0, False, torch.arange(FRAMES)
    for step in range(steps + 1):
        if step % every == 0:
            curve.append({"step": step, **evaluate(stage, held)})
        if step == steps:
            break
        begin = time.process_time()
        chosen = torch.randint(len(slots), (rows, 1), generator=generator)
        draws = torch.randint(DRAWS, (rows, FRAMES), generator=generator)
        present = times < lengths[chosen]
        inputs = slots[chosen, draws, times % lengths[chosen]]
        masses = None if variant.repeat else present.float().unsqueeze(2).expand(inputs.shape[:3])
        if masses is not None:
            inputs = inputs * masses.unsqueeze(3)
        noise = torch.randn(rows, MODEL.num_slots, MODEL.dim, generator=generator)
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup))
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, cosine)
        loss, video = stage(inputs, stage.slot_attention.sample_slots(rows, noise=noise), masses)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in stage.parameters() if p.grad is not None]).item()
        optimizer.step()
        seconds += time.process_time() - begin
        norms.append(norm)
        merged.append(video.valid.sum(1).float().mean().item())
        diverged = not math.isfinite(loss.item() + norm)
        if diverged:
            break
    diverged = diverged or max(norms) > 100 * statistics.median(norms[:warmup])
    last = max(1, len(norms) // 10)
    return {
        "diverged": diverged,
        "steps": len(norms),
        "clips": rows,
        "frames": round(rows * lengths.float().mean().item(), 1),  # of a batch, without padding and repeats
        "ms_per_step": round(1e3 * seconds / len(norms), 1),
        "merged_slots": round(statistics.fmean(merged[-last:]), 2),
        "largest_norm": _number(max(norms)),
        "norms": [_number(statistics.median(norms[i : i + last])) for i in range(0, len(norms), last)],
        "curve": [{key: _number(value) for key, value in point.items()} for point in curve],
        **({} if diverged else {key: _number(value) for key, value in scores(stage, held).items()}),
    }


def plain(stage: PartlyMasked) -> VideoStage:
    """The same weights in the product's stage."""
    copy = VideoStage(MODEL, stage.decoder.head.out_features, FRAMES)  # type: ignore[union-attr,arg-type]
    copy.load_state_dict(stage.state_dict())
    return copy.eval()


def held_lengths() -> Tensor:
    """Lengths [HELD_OUT] that held-out scenes are cut to: 4 to 9."""
    return SHORTEST + torch.arange(HELD_OUT) % 6


@torch.no_grad()
def evaluate(stage: PartlyMasked, held: Clips) -> dict[str, float]:
    """Loss of the held-out scenes, whole and cut to few frames; masses make the loss of a frame the same in both."""
    slots, copy = held["slots"][:, 0].float(), plain(stage)
    noise = torch.randn(HELD_OUT, MODEL.num_slots, MODEL.dim, generator=torch.Generator().manual_seed(7))
    initial, present = copy.slot_attention.sample_slots(HELD_OUT, noise=noise), torch.ones(slots.shape[:3])
    short = present * (torch.arange(FRAMES) < held_lengths()[:, None]).unsqueeze(2)
    most = int(held_lengths().max())
    return {
        "whole": copy(slots, initial, present)[0].item(),
        "short": copy(slots[:, :most], initial, short[:, :most])[0].item(),
    }


@torch.no_grad()
def scores(stage: PartlyMasked, held: Clips) -> dict[str, float]:
    """FG-ARI of the held-out scenes, whole and cut, and how many slots are left of each after merging."""
    copy, noise, found = plain(stage), torch.Generator().manual_seed(7), {}
    for name, lengths in {"whole": [FRAMES] * HELD_OUT, "short": held_lengths().tolist()}.items():
        videos, left = [], []
        for scene, length in enumerate(lengths):
            video = copy.encode(held["slots"][scene, :, :length].float(), copy.slot_attention.sample_slots(1, noise))
            across = video.attention[..., video.valid[0]].contiguous()
            truth = held["truth"][scene, :length].numpy()
            grid = (int(held["grid"][0]), int(held["grid"][1]))
            labels = propagate_labels(held["attention"][scene, None, :length].float(), across, grid, truth.shape[1:])
            videos.append(score_video(PROTOCOLS["interpreter"], labels[0].numpy(), truth))
            left.append(int(video.valid.sum()))
        found[f"fg_ari_{name}"] = summarise(PROTOCOLS["interpreter"], videos)["fg_ari_video"]
        found[f"slots_{name}"] = statistics.fmean(left)
    return found


def _number(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw curves: medians over seeds of the loss of held-out clips, whole and short, and of the gradient's norm."""
    from matplotlib.figure import Figure

    from interpreter.render.palette import LINE_COLOURS

    colours = (*LINE_COLOURS, "#7f7f7f", "#8c564b", "#17becf", "#bcbd22", "#9467bd", "#9edae5", "#222222")
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for colour, name in zip(colours, VARIANTS, strict=True):
        rows = [row for row in result["rows"] if row["row"] == name and not row["diverged"]]
        if not rows:
            panels[2].plot([], [], color=colour, label=f"{name}: not finite")
            continue
        style = {"color": colour, "linewidth": 2.2 if name in ("repeat", "mask") else 1.2, "label": name}
        for panel, key in zip(panels, ("whole", "short"), strict=False):
            points = zip(*(row["curve"] for row in rows), strict=True)
            pairs = [(point[0]["step"], statistics.median(one[key] for one in point)) for point in points]
            panel.plot(*zip(*pairs, strict=True), **style)
        norms = [statistics.median(values) for values in zip(*(row["norms"] for row in rows), strict=False)]
        last = rows[0]["steps"] / len(norms)
        panels[2].plot([(i + 0.5) * last for i in range(len(norms))], norms, **style)
    titles = ("loss of held-out clips of 24 frames", "loss of held-out clips of 4 to 9 frames", "gradient norm")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("step", fontsize=9)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8, which="both")
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[2].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    print(path)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over seeds."""
    heads = ("diverged", "whole", "short", "fg_ari_whole", "fg_ari_short", "slots_whole", "merged_slots", "ms_per_step")
    lines = [f"| | seeds | {' | '.join(heads)} |", "|---|" + "---|" * (1 + len(heads))]
    for name in VARIANTS:
        mine = [row for row in rows if row["row"] == name]
        numbers = [row | row["curve"][-1] for row in mine if not row["diverged"]]
        if mine:
            cells = [f"{statistics.fmean(one[head] for one in numbers):.3f}" if numbers else "–" for head in heads[1:]]
            lines.append(f"| {name} | {len(mine)} | {len(mine) - len(numbers)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the image stage's run, and of what is computed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, clips and noise")
    parser.add_argument("--rows", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), help="what to train")
    parser.add_argument("--steps", type=int, default=250, help="of each training")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate after warm-up")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scenes, held = image_slots(options.folder, "train"), image_slots(options.folder, "val")
    for seed in options.seeds:
        for name in options.rows:
            result = train(VARIANTS[name], scenes, held, seed, options.steps, options.lr)
            row = {"row": name, "seed": seed, "lr": options.lr, **result}
            stored = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
            rows = [one for one in stored if (one["row"], one["seed"]) != (name, seed)] + [row]
            save(
                RESULT,
                {
                    "what": "video stage trained on clips of 4 to 24 frames: repeated, padded, and partly masked",
                    **machine("cpu"),
                    "command": "python -m profiling.masking DIR",  # rows may come from several calls
                    "variants": {key: variant.what for key, variant in VARIANTS.items()},
                    "finite": probes(),
                    "rows": sorted(rows, key=lambda one: (list(VARIANTS).index(one["row"]), one["seed"])),
                },
            )
            print(table(rows), flush=True)
    draw(json.loads(RESULT.read_text()), PICTURE)


if __name__ == "__main__":
    main()
