"""Label propagation on DAVIS: J&F of masks carried on from the first frame, beside copies of the first mask.

    python -m profiling.label_propagation davis --root DAVIS --backbone WEIGHTS --feature-layers 8 --no-feature-norm
    python -m profiling.label_propagation page     # the tables of docs/propagate.md from the results

Writes profiling/results/label-propagation-cpu.json (or -cuda). Every video is propagated once for each layer, and the
same soft labels are scored with both kinds of edges.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from interpreter.configs import BackboneConfig
from interpreter.data import Video, open_dataset
from interpreter.data.options import DavisAnnotations
from interpreter.evaluation.candidates import Candidate, Entry
from interpreter.evaluation.first_masks import COPIED, copies
from interpreter.evaluation.gallery import Gallery
from interpreter.evaluation.scoring import Scores, score_dataset
from interpreter.metrics import PROTOCOLS, resize_labels
from interpreter.models.label_propagation import Propagation
from interpreter.propagation import Encoder, FirstMask, first_mask, open_encoder, soft_labels
from interpreter.segmentation import Edges
from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS, ROOT
from profiling.quality.steps import Command
from profiling.quality.tables import NOT_RUN, Lines, table

PAGE, RESULT = "docs/propagate.md", "label-propagation-{}.json"
PROTOCOL = PROTOCOLS["davis-2017"]
EDGES: tuple[Edges, ...] = ("none", "guided")
COLUMNS = {"jf": "J&F", "j": "J", "j_recall": "J recall", "f": "F", "f_recall": "F recall"}
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Davis:
    """Propagate the first masks of DAVIS and score them."""

    root: Path
    """The data set."""
    backbone: str
    """Weights of a ViT, as `--backbone` of interpreter.propagate."""
    feature_layers: tuple[int, ...] = (-1,)
    """Blocks whose output is used, each in turn."""
    feature_norm: bool = True
    """Apply the ViT's final norm."""
    frame_size: tuple[int, int] = (336, 504)
    """Height and width that frames are resized to."""
    years: tuple[int, ...] = (2016, 2017)
    """Editions, split val."""
    annotations: DavisAnnotations = "semi-supervised"
    """Masks of DAVIS-2017."""
    pictures: Path | None = None
    """Folder for pictures of all sequences with both edges and the truth."""
    propagation: Propagation = field(default_factory=Propagation)


@dataclass
class Page:
    """Write the tables of docs/propagate.md from profiling/results."""

    check: bool = False
    """Write nothing; fail if the page would change."""


@dataclass(frozen=True)
class TimedEncoder(Encoder):
    """An encoder that adds up the processor time of its backbone."""

    seconds: list[float] = field(default_factory=list)

    def encode(self, frames: Sequence[np.ndarray], size: tuple[int, int]) -> torch.Tensor:
        """See :class:`Encoder`."""
        begin = time.process_time()
        features = super().encode(frames, size)
        self.seconds.append(time.process_time() - begin)
        return features


@dataclass
class Layers:
    """The masks that are scored: of every layer with both edges, and copies of the first mask.

    Attributes:
        encoders: by the title of their layer.
        masks: of the first frames, by video.
        how: numbers of the protocol.
        seconds: processor time of each layer on all videos: decoding and propagation, without the backbone.
    """

    encoders: Mapping[str, TimedEncoder]
    masks: Mapping[str, FirstMask]
    how: Propagation
    seconds: dict[str, float] = field(default_factory=dict)

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """See :class:`interpreter.evaluation.candidates.CandidateMasks`."""
        for number, (title, encoder) in enumerate(self.encoders.items()):
            status(title)
            maps = self._propagated(video, title, encoder)
            for edges in EDGES:
                entry = Entry(title, "baseline" if number or edges != "none" else "main").with_edges(edges)
                yield Candidate(entry, None, partial(resize_labels, maps[edges]), 0)
        yield Candidate(COPIED, None, partial(copies, self.masks[video.name].pixels[None], video.num_frames), 0)

    def _propagated(self, video: Video, title: str, encoder: TimedEncoder) -> dict[Edges, np.ndarray]:
        """Ids of all pixels, uint8 [T, H, W], by edges."""
        mask, size = self.masks[video.name], (video.height, video.width)
        maps: dict[Edges, list[np.ndarray]] = {edges: [] for edges in EDGES}
        stream, begin, before = soft_labels(video, mask, encoder, self.how), time.process_time(), sum(encoder.seconds)
        spent = 0.0
        for frames, soft in stream:
            spent += time.process_time() - begin
            for edges in EDGES:
                labelled = soft.label_maps(size, frames if edges == "guided" else None)
                maps[edges] += [mask.ids[one.labels] for one in labelled]
            begin = time.process_time()
        self.seconds[title] = self.seconds.get(title, 0.0) + spent - (sum(encoder.seconds) - before)
        return {edges: np.stack([mask.pixels, *parts[1:]]) for edges, parts in maps.items()}


def measure(options: Davis, results: Path) -> None:
    """Propagate, score, save and print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoders = {}
    for layer in options.feature_layers:
        config = BackboneConfig(options.backbone, layer, options.feature_norm)
        opened = open_encoder(None, config, options.frame_size)
        encoders[_title(layer)] = TimedEncoder(opened.backbone, opened.precision, opened.frame_size, opened.name)
    rows, frames = [], 0
    layers = Layers(encoders, {}, options.propagation)
    for year in options.years:
        dataset = open_dataset("davis", options.root, "val", year=year, annotations=options.annotations)
        masks = {video.name: first_mask(dataset.mask(i, 0), video.name) for i, video in enumerate(dataset.videos)}
        layers.masks = {**layers.masks, **masks}
        gallery = Gallery(len(dataset) if options.pictures else 0)
        scores = score_dataset(dataset, layers, [PROTOCOL], gallery)
        for picture in gallery.pictures():
            picture.save(Path(options.pictures or ""))
        rows += _rows(scores, f"DAVIS-{year}")
        frames += sum(scores.videos.values())
    costs = {
        title: {
            "backbone": sum(encoder.seconds) / frames,
            "decoding and propagation": layers.seconds[title] / frames,
        }
        for title, encoder in encoders.items()
    }
    arguments = ["profiling.label_propagation", *sys.argv[1:]]
    content = {
        "what": "J&F of label propagation on DAVIS, beside copies of the first mask",
        **machine(device),
        "command": Command("", tuple(arguments)).portable,
        "protocol": PROTOCOL.name,
        "version": PROTOCOL.version,
        "frame_size": options.frame_size,
        "grid": next(iter(encoders.values())).backbone.grid(options.frame_size),
        "propagation": vars(options.propagation),
        "annotations": options.annotations,
        "rows": rows,
        "processor_seconds_per_frame": costs,
    }
    save(results / RESULT.format(device), content)
    print("\n".join([*scores_table(content), "", *sequences_table(content), "", *costs_table(content)]))


def _title(layer: int) -> str:
    return "last block" if layer == -1 else f"block {layer}"


def _rows(scores: Scores, data: str) -> list[dict[str, Any]]:
    """A row for each entry, with J&F of every video."""
    rows = []
    for row in scores.rows():
        videos = scores.per_video(PROTOCOL, row.entry, "jf")
        counts = {name: int(row.per_seed[0][name]) for name in ("videos", "objects", "frames")}
        about = {"data": data, "masks": row.entry.name, "edges": row.entry.edges, **counts}
        rows.append({**about, "mean": {name: row.mean[name] for name in COLUMNS}, "jf": videos})
    return rows


def scores_table(results: Mapping[str, Any]) -> Lines:
    """Numbers of every row."""
    rows = [
        [row["data"], row["masks"].removesuffix(", guided edges"), row["edges"] if row["masks"] != COPIED.name else "–"]
        + [f"{row['mean'][name]:.3f}" for name in COLUMNS]
        for row in results["rows"]
    ]
    first = {row["data"]: row for row in results["rows"]}.values()
    counts = (f"{one['data']}: {one['videos']} sequences, {one['objects']} objects" for one in first)
    height, width = results["frame_size"]
    return [
        *table(["data", "masks", "edges", *COLUMNS.values()], rows),
        "",
        f"{'; '.join(counts)}. Protocol `{results['protocol']}`, frames of {height}×{width}, "
        f"{results['grid'][0]}×{results['grid'][1]} patches; commit {results['commit']}, {results['date']}; "
        f"`{results['command']}`.",
    ]


def sequences_table(results: Mapping[str, Any]) -> Lines:
    """J&F of every sequence."""
    names = list(dict.fromkeys(row["masks"] for row in results["rows"]))
    values: dict[tuple[str, str], dict[str, float]] = {}
    for row in results["rows"]:
        for video, value in row["jf"].items():
            values.setdefault((row["data"], video), {})[row["masks"]] = value
    body = [[data, video, *(f"{of[name]:.2f}" for name in names)] for (data, video), of in values.items()]
    return table(["data", "sequence", *names], body)


def costs_table(results: Mapping[str, Any]) -> Lines:
    """Processor time of a frame."""
    costs = results["processor_seconds_per_frame"]
    parts = list(next(iter(costs.values())))
    body = [[title, *(f"{1e3 * of[part]:.0f}" for part in parts)] for title, of in costs.items()]
    return [f"Milliseconds of processor time per frame ({results['device']}):", "", *table(["features", *parts], body)]


def blocks(folder: Path = RESULTS) -> dict[str, Lines]:
    """The lines of every table of the page, by name."""
    path = folder / RESULT.format("cpu")
    if not path.exists():
        return {name: [NOT_RUN] for name in ("scores", "sequences", "costs")}
    results = json.loads(path.read_text())
    source = f"Data: [{path.name}](../profiling/results/{path.name})."
    return {
        "scores": [*scores_table(results), source],
        "sequences": sequences_table(results),
        "costs": costs_table(results),
    }


def write_page(check: bool, root: Path = ROOT, folder: Path = RESULTS) -> bool:
    """Write the page's tables, unless ``check``; returns whether they differ from the results."""
    path, made = root / PAGE, blocks(folder)
    old = path.read_text()
    new = BLOCK.sub(lambda match: f"{match[1]}\n" + "\n".join(made[match[2]]) + f"\n\n{match[3]}", old)
    if not check:
        path.write_text(new)
    return old != new


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    config = (tyro.conf.OmitArgPrefixes,)
    options = tyro.cli(
        Davis | Page, prog="python -m profiling.label_propagation", description=__doc__, args=arguments, config=config
    )
    if isinstance(options, Davis):
        measure(options, RESULTS)
        return
    changed = write_page(options.check)
    if options.check and changed:
        sys.exit(f"{PAGE} disagrees with profiling/results: run `python -m profiling.label_propagation page`")
    print(f"wrote {PAGE}" if changed else "nothing to do")


if __name__ == "__main__":
    main()
