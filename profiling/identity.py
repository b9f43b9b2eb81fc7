"""Measure how well objects keep their segments in a long video, by the video's length.

    python -m profiling.identity DIR            # trains DIR/run, renders DIR/scenes, writes the results
    python -m profiling.identity DIR --draw     # only draws docs/pictures/identity.png from the results

The numbers are identity switches, fragmentations, and whether objects get their old segment when they return. Rerun an
interrupted command to resume: what was trained, rendered, encoded or scored is not computed again. A row is computed
again if a stage that it depends on was trained again.
"""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from slotkernels import propagate_labels
from torch import Tensor

from interpreter.commands import cli, run_command
from interpreter.data import open_dataset
from interpreter.data.scenes import generate_scenes
from interpreter.engine.run import load_stage_state, weights_hash
from interpreter.files import write_text
from interpreter.methods.base import Encoded
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter.association import group_by_features
from interpreter.methods.interpreter.hierarchy import Level, propagate
from interpreter.methods.interpreter.image_slots import EncodedVideo
from interpreter.methods.interpreter.segmenter import InterpreterSegmenter
from interpreter.methods.interpreter.settings import Settings
from interpreter.methods.interpreter.token_means import TokenMeans
from interpreter.methods.runs import open_segmenter
from interpreter.metrics.assignment import partners
from interpreter.models.linking import link_frames
from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS, ROOT
from profiling.identity_scores import PROTOCOL, RETURNS, row_of, scores_of, summary
from profiling.report.draw_identity import draw

WHAT = "identity over a long video: switches, fragments and returns of objects against length"
RESULT, PICTURE = RESULTS / "identity-cpu.json", ROOT / "docs" / "pictures" / "identity.png"
LENGTHS = (24, 48, 96, 192, 384, 600)
SCENES, SIZE = 6, (256, 384)  # held out, and the size that their frames are resized to
SPLIT = "val"
WINDOW, OVERLAP = 12, 4  # frames of a window of level 2
TRAINING = {  # options of each stage
    "image": "--stage image --num-videos 24 --scene-frames 120 --scene-absences --steps 1200",
    "video": "--stage video --steps 600",
    "video-3": f"--stage video --level 3 --window {WINDOW} --overlap {OVERLAP} --num-frames 16",
}
RANDOM = f"{TRAINING['video-3']} --start random"  # another level 3, in the run DIR/random

Labels = Callable[["Case"], np.ndarray]


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    folder: tyro.conf.Positional[Path]
    """Folder for the run, the scenes and intermediate results."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds for drawing the slots."""
    lengths: tuple[int, ...] = LENGTHS
    """Lengths of the videos, in frames."""
    ways: tuple[str, ...] = ()
    """Which rows to compute. Default: all."""
    draw: bool = False
    """Only draw the picture from the results file."""
    out: Path = RESULT
    """File for the results, as JSON."""


@dataclass(frozen=True)
class Segmenters:
    """The trained run, with two levels, with three, with another level 3, and with association by features."""

    two: InterpreterSegmenter
    three: InterpreterSegmenter
    random: InterpreterSegmenter
    features: InterpreterSegmenter


@dataclass(frozen=True)
class Case:
    """A scene cut to a length, for one seed."""

    segmenters: Segmenters
    encoded: Encoded
    seed: int
    truth: np.ndarray  # uint8 [T, H, W]

    @property
    def attention(self) -> Tensor:
        """Of the patches over the image slots, [T, M, N]."""
        return self.encoded.by_seed[self.seed].attention

    @cached_property
    def windows(self) -> Level:
        """Level 2 in windows."""
        segmenter = self.segmenters.three
        return segmenter.find_levels(self.encoded.by_seed[self.seed], self.seed, segmenter.settings)[0]

    def labels(self, across: Tensor, size: tuple[int, int] | None = None) -> np.ndarray:
        """Segment of each pixel, uint8 [T, H, W], of slots over segments [T, N, K]."""
        grid = self.segmenters.two.grid
        return propagate_labels(self.attention.float()[None], across[None].contiguous(), grid, size)[0].numpy()

    def segmented(self, segmenter: InterpreterSegmenter) -> np.ndarray:
        """Label maps of a segmenter."""
        segmentation = segmenter.segment(self.encoded, self.seed)
        assert segmentation.across is not None
        return self.labels(segmentation.across, self.truth.shape[1:])

    def joined(self, level: Level, ids: Tensor) -> np.ndarray:
        """Label maps of windows whose segments have the ids [W, K]."""
        frames = len(self.truth)
        owner = level.owners(frames)
        named = F.one_hot(ids[owner], int(ids.max()) + 1).float()  # [T, K, ids]
        return self.labels(propagate([level], frames) @ named, self.truth.shape[1:])


def whole(case: Case) -> np.ndarray:
    """The whole video in one level."""
    return case.segmented(case.segmenters.two)


def three_levels(case: Case) -> np.ndarray:
    """Level 2 in windows, level 3 over all windows."""
    return case.segmented(case.segmenters.three)


def three_levels_random(case: Case) -> np.ndarray:
    """The same, with a level 3 that was trained from random weights."""
    return case.segmented(case.segmenters.random)


def by_features(case: Case) -> np.ndarray:
    """K-means of the image slots of the whole video."""
    return case.segmented(case.segmenters.features)


def linked_slots(case: Case) -> np.ndarray:
    """Slots of consecutive windows matched by their cosine similarity."""
    level = case.windows
    return case.joined(level, link_frames(level.slots.slots[0]))


def linked_masks(case: Case) -> np.ndarray:
    """Segments of consecutive windows matched by the IoU of their masks in the frames that both have."""
    level, grid = case.windows, case.segmenters.two.grid
    length = level.attention.shape[1]
    count = level.attention.shape[3]
    masks, ids = [], torch.arange(count).expand(len(level.starts), -1).clone()
    for window, start in enumerate(level.starts):
        attention = case.attention[start : start + length].float()
        labels = propagate_labels(attention[None], level.attention[window][None].contiguous(), grid)[0]
        masks.append(F.one_hot(labels.long().flatten(1), count).float())  # [L, M, K]
        if window:
            common = level.starts[window - 1] + length - start
            now, before = masks[-1][:common].flatten(0, 1), masks[-2][-common:].flatten(0, 1)
            shared = now.mT @ before
            either = now.sum(0)[:, None] + before.sum(0) - shared
            ids[window] = ids[window - 1, partners((shared / either.clamp_min(1)).numpy())]
    return case.joined(level, ids)


def grouped_windows(case: Case) -> np.ndarray:
    """K-means of the segments of all windows, in place of level 3."""
    level = case.windows
    means = level.slots.means
    assert means is not None, "the preset demo reads means"
    features, places = means[0].split([means.shape[-1] - 2, 2], -1)
    described = TokenMeans(features, places, level.slots.masses[0])
    segments = min(case.segmenters.three.num_segments, described.masses.numel())
    return case.joined(level, group_by_features(described, segments, case.seed))


@dataclass(frozen=True)
class Way:
    """A way to give segments an identity.

    Attributes:
        what: it does.
        labels: function of a case.
        stages: that it depends on.
    """

    what: str
    labels: Labels
    stages: tuple[str, ...]


WAYS = {
    "whole": Way("the whole video in one level: two levels, association learned", whole, ("image", "video")),
    "levels": Way("three levels: level 2 in windows, level 3 over all windows", three_levels, tuple(TRAINING)),
    "levels-random": Way(
        "the same, but level 3 was trained from random weights instead of those of level 2",
        three_levels_random,
        ("image", "video", "random"),
    ),
    "linked-slots": Way(
        "level 2 in the same windows; a Hungarian match of the slots of consecutive windows by cosine similarity, as "
        "SOLV does from frame to frame (Aydemir et al. 2023)",
        linked_slots,
        ("image", "video"),
    ),
    "linked-masks": Way(
        "level 2 in the same windows; a Hungarian match of the segments of consecutive windows by the IoU of their "
        "masks in the frames that both have, as STEm-Seg does (Athar et al. 2020)",
        linked_masks,
        ("image", "video"),
    ),
    "features": Way("association by features: k-means of the image slots of the whole video", by_features, ("image",)),
    "grouped-windows": Way(
        "level 2 in the same windows, and k-means of the segments of all windows in place of level 3",
        grouped_windows,
        ("image", "video"),
    ),
}


def cut(encoded: Encoded, start: int, frames: int) -> Encoded:
    """Some of the frames of an encoded video."""
    part = slice(start, start + frames)
    by_seed = {}
    for seed, video in encoded.by_seed.items():
        assert video.described is not None
        described = TokenMeans(*(tensor[part] for tensor in video.described))
        by_seed[seed] = EncodedVideo(video.slots[part], video.attention[part], described)
    return Encoded(len(by_seed[seed].slots), by_seed)


def train(folder: Path) -> dict[str, str]:
    """Train the stages of the run that are not trained yet; returns the hash of the weights of each."""
    run, random = folder / "run", folder / "random"
    for arguments in TRAINING.values():
        _train(run, arguments)
    if not random.is_dir():
        part = folder / "random.part"
        shutil.rmtree(part, ignore_errors=True)
        for key in ("scenes", "image", "video"):
            shutil.copytree(run / key, part / key)
        config = json.loads((run / "config.json").read_text())
        for entries in (config["stages"], config["trained_on"]):
            del entries["video-3"]
        write_text(part / "config.json", json.dumps(config, indent=1))
        part.rename(random)
    _train(random, f"{RANDOM} --cache {run / 'cache'}")
    of = {**dict.fromkeys(TRAINING, run), "random": random}
    return {
        name: weights_hash(load_stage_state(where, "video-3" if name == "random" else name, INTERPRETER.name))
        for name, where in of.items()
    }


def _train(run: Path, arguments: str) -> None:
    command = [sys.executable, "-m", "interpreter.train", "--run", str(run), *arguments.split()]
    subprocess.run(command, check=True)


def segmenters_of(folder: Path) -> Segmenters:
    """Open the runs."""

    def opened(run: str, settings: Settings) -> InterpreterSegmenter:
        segmenter = open_segmenter(INTERPRETER, folder / run, settings, SIZE)
        assert isinstance(segmenter, InterpreterSegmenter)
        return segmenter

    return Segmenters(
        two=opened("run", Settings(association="learned")),
        three=opened("run", Settings(level=3)),
        random=opened("random", Settings(level=3)),
        features=opened("run", Settings()),
    )


def encoded_scenes(
    folder: Path, segmenter: InterpreterSegmenter, seeds: Sequence[int], image: str
) -> list[tuple[Encoded, np.ndarray]]:
    """The held-out scenes with their true masks; encoded once."""
    root = folder / "scenes"
    generate_scenes(root, SCENES, num_frames=max(LENGTHS), split=SPLIT, absences=True, workers=1)
    dataset, scenes = open_dataset("synthetic", root, SPLIT), []
    for number, video in enumerate(dataset.videos):
        by_seed = {}
        for seed in seeds:
            path = folder / "encoded" / f"{image}-{number}-{seed}.pt"
            if not path.is_file():
                path.parent.mkdir(exist_ok=True)
                missing = [s for s in seeds if not path.with_name(f"{image}-{number}-{s}.pt").is_file()]
                encoded = segmenter.encode(video, missing)
                for one in missing:
                    file = path.with_name(f"{image}-{number}-{one}.pt")
                    kept = encoded.by_seed[one]
                    torch.save((kept.slots, kept.attention, *kept.described), file.with_suffix(".part"))
                    file.with_suffix(".part").rename(file)
            slots, attention, *described = torch.load(path)
            by_seed[seed] = EncodedVideo(slots, attention, TokenMeans(*described))
        scenes.append((Encoded(len(slots), by_seed), np.asarray(dataset.masks(number))))
    return scenes


def main() -> int:
    """The command."""
    options = cli(Options, prog="python -m profiling.identity", description=__doc__)
    if options.draw:
        draw(json.loads(options.out.read_text()), PICTURE)
        return 0
    torch.set_num_threads(1)
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = train(folder)
    segmenters = segmenters_of(folder)

    @cache
    def scenes() -> list[tuple[Encoded, np.ndarray]]:
        return encoded_scenes(folder, segmenters.two, options.seeds, weights["image"])

    rows = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    for seed, frames in itertools.product(options.seeds, options.lengths):
        missing = {}
        for name in options.ways or tuple(WAYS):
            key = {"way": name, "frames": frames, "seed": seed}
            key["weights"] = " ".join(weights[stage] for stage in WAYS[name].stages)
            if not any(all(row[part] == value for part, value in key.items()) for row in rows):
                missing[name] = key
        if not missing:
            continue
        videos: dict[str, list[dict[str, Any]]] = {name: [] for name in missing}
        for encoded, truth in scenes():
            case = Case(segmenters, cut(encoded, 0, frames), seed, truth[:frames])
            for name, scores in videos.items():
                scores.append(scores_of(WAYS[name].labels(case), case.truth))
        for name, key in missing.items():
            rows = [row for row in rows if (row["way"], row["frames"], row["seed"]) != (name, frames, seed)]
            rows.append({**key, **row_of(videos[name])})
        write(options.out, rows)
    draw(json.loads(options.out.read_text()), PICTURE)
    return 0


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write the results, with rows in the order of the ways."""
    rows.sort(key=lambda row: (list(WAYS).index(row["way"]), row["frames"], row["seed"]))
    save(
        out,
        {
            "what": WHAT,
            **machine("cpu"),
            "command": "python -m profiling.identity DIR",  # rows may come from several calls
            "ways": {name: way.what for name, way in WAYS.items()},
            "training": {**TRAINING, "levels-random": RANDOM},
            "scenes": f"{SCENES} held-out scenes of {max(LENGTHS)} frames of 128x192 with absences, which the backbone "
            f"gets as {SIZE[0]}x{SIZE[1]}; shorter videos are their starts",
            "seeds": "of the slots' draws, of one trained run",
            "scored": f"protocol {PROTOCOL.name}, at the scenes' own size, with edges from the soft masks",
            "returns": RETURNS,
            "summary": summary(rows, WAYS),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    run_command(main)
