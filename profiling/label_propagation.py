"""Score label propagation on DAVIS: J&F of masks propagated from the first frame, and of copies of the first mask.

    python -m profiling.label_propagation davis --root DAVIS --backbone WEIGHTS --feature-layer 8 --no-feature-norm
    python -m profiling.label_propagation page     # the tables of docs/use/propagate_results.md from the results

It writes profiling/results/label-propagation-block-8-cpu.json (or -cuda), one file for each layer. Every video is
propagated once, and the same soft labels are scored with both kinds of edges.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from profiling.quality.tables import NOT_RUN, Lines, Results
from profiling.report.markdown import bullet, paragraph, table

PAGE, RESULT = "docs/use/propagate_results.md", "label-propagation-{}-{}.json"
PROTOCOL = PROTOCOLS["davis-2017"]
EDGES: tuple[Edges, ...] = ("none", "guided")
EDGES_GUIDED = ", guided edges"
COLUMNS = {"jf": "J&F", "j": "J", "j_recall": "J recall", "f": "F", "f_recall": "F recall"}
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Davis:
    """Propagate the first masks of DAVIS and score them."""

    root: Path
    """The data set."""
    backbone: str
    """Weights of a ViT, as `--backbone` of interpreter.propagate."""
    feature_layer: int = -1
    """Block whose output is used."""
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
    """Write the tables of docs/use/propagate_results.md from profiling/results."""

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
class BothEdges:
    """The masks that are scored: propagated ones with both edges, and copies of the first mask.

    Attributes:
        title: of the rows.
        encoder: gives the features.
        how: numbers of the protocol.
        masks: of the first frames, by video.
        seconds: processor time of all videos without the backbone: decoding and propagation.
    """

    title: str
    encoder: TimedEncoder
    how: Propagation
    masks: dict[str, FirstMask] = field(default_factory=dict)
    seconds: float = 0.0

    def candidates(self, video: Video, status: Callable[[str], None]) -> Iterator[Candidate]:
        """See :class:`interpreter.evaluation.candidates.CandidateMasks`."""
        mask = self.masks[video.name]
        maps = self._propagated(video, mask)
        for edges in EDGES:
            entry = Entry(self.title, "main" if edges == EDGES[0] else "baseline").with_edges(edges)
            yield Candidate(entry, None, partial(resize_labels, maps[edges]), 0)
        yield Candidate(COPIED, None, partial(copies, mask.pixels[None], video.num_frames), 0)

    def _propagated(self, video: Video, mask: FirstMask) -> dict[Edges, np.ndarray]:
        """Ids of all pixels, uint8 [T, H, W], by edges."""
        maps: dict[Edges, list[np.ndarray]] = {edges: [] for edges in EDGES}
        size, before, begin = (video.height, video.width), sum(self.encoder.seconds), time.process_time()
        for frames, soft in soft_labels(video, mask, self.encoder, self.how):
            self.seconds += time.process_time() - begin
            for edges in EDGES:
                labelled = soft.label_maps(size, frames if edges == "guided" else None)
                maps[edges] += [mask.ids[one.labels] for one in labelled]
            begin = time.process_time()
        self.seconds -= sum(self.encoder.seconds) - before
        return {edges: np.stack([mask.pixels, *parts[1:]]) for edges, parts in maps.items()}


def measure(options: Davis, command: str, results: Path) -> None:
    """Propagate, score, save and print."""
    title = "last block" if options.feature_layer == -1 else f"block {options.feature_layer}"
    config = BackboneConfig(options.backbone, options.feature_layer, options.feature_norm)
    opened = open_encoder(None, config, options.frame_size)
    encoder = TimedEncoder(opened.backbone, opened.precision, opened.frame_size, opened.name)
    masks, rows, frames = BothEdges(title, encoder, options.propagation), [], 0
    for year in options.years:
        dataset = open_dataset("davis", options.root, "val", year=year, annotations=options.annotations)
        for index, video in enumerate(dataset.videos):
            masks.masks[video.name] = first_mask(dataset.mask(index, 0), video.name)
        gallery = Gallery(len(dataset) if options.pictures else 0)
        scores = score_dataset(dataset, masks, [PROTOCOL], gallery)
        for picture in gallery.pictures():
            picture.save(Path(options.pictures or ""))
        rows += _rows(scores, f"DAVIS-{year}")
        frames += sum(scores.videos.values())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = {
        "what": (
            f"J&F of label propagation on DAVIS with features of the {title}, compared with copies of the first mask"
        ),
        **machine(device),
        "command": command,
        "protocol": PROTOCOL.name,
        "version": PROTOCOL.version,
        "frame_size": options.frame_size,
        "grid": encoder.backbone.grid(options.frame_size),
        "propagation": vars(options.propagation),
        "annotations": options.annotations,
        "features": title,
        "rows": rows,
        "processor_seconds_per_frame": {
            "backbone": sum(encoder.seconds) / frames,
            "decoding and propagation": masks.seconds / frames,
        },
    }
    save(results / RESULT.format(title.replace(" ", "-"), device), content)
    print("\n".join([*scores_table([content]), "", *sequences_table([content]), "", *costs_table([content])]))


def _rows(scores: Scores, data: str) -> list[dict[str, Any]]:
    """A row for each entry, with J&F of every video."""
    rows = []
    for row in scores.rows():
        videos = scores.per_video(PROTOCOL, row.entry, "jf")
        counts = {name: int(row.per_seed[0][name]) for name in ("videos", "objects", "frames")}
        about = {"data": data, "masks": row.entry.name, "edges": row.entry.edges, **counts}
        rows.append({**about, "mean": {name: row.mean[name] for name in COLUMNS}, "jf": videos})
    return rows


def scores_table(results: Sequence[Results]) -> Lines:
    """Numbers of every row, and what they were measured with."""
    rows = [
        [row["data"], row["masks"].removesuffix(EDGES_GUIDED), row["edges"] if row["masks"] != COPIED.name else "–"]
        + [f"{row['mean'][name]:.3f}" for name in COLUMNS]
        for row in _rows_of(results)
    ]
    counts = {row["data"]: f"{row['videos']} sequences with {row['objects']} objects" for row in _rows_of(results)}
    first = results[0]
    height, width = first["frame_size"]
    lines = [
        *table(["data", "masks", "edges", *COLUMNS.values()], rows),
        "",
        *paragraph(
            f"{'; '.join(f'{data}: {count}' for data, count in counts.items())}. Protocol `{first['protocol']}`, "
            f"frames of {height}×{width}, {first['grid'][0]}×{first['grid'][1]} patches, "
            f"annotations {first['annotations']}."
        ),
        "",
    ]
    for one in results:
        lines += bullet(f"{one['features']}: `{one['command']}`, commit {one['commit']}, {one['date']}")
    return lines


def sequences_table(results: Sequence[Results]) -> Lines:
    """J&F of every sequence; a dash where it was not measured."""
    values: dict[tuple[str, str], dict[str, float]] = {}
    for row in _rows_of(results):
        for video, value in row["jf"].items():
            values.setdefault((row["data"], video), {})[row["masks"]] = value
    names = list(dict.fromkeys(row["masks"] for row in _rows_of(results)))
    names.sort(key=COPIED.name.__eq__)  # last
    body = [
        [data, video, *(f"{of[name]:.2f}" if name in of else "–" for name in names)]
        for (data, video), of in values.items()
    ]
    return table(["data", "sequence", *names], body)


def costs_table(results: Sequence[Results]) -> Lines:
    """Processor time of a frame."""
    parts = list(results[0]["processor_seconds_per_frame"])
    body = [
        [one["features"], *(f"{1e3 * one['processor_seconds_per_frame'][part]:.0f}" for part in parts)]
        for one in results
    ]
    device = results[0]["device"]
    return [f"Milliseconds of processor time per frame ({device}):", "", *table(["features", *parts], body)]


def _rows_of(results: Sequence[Results]) -> list[dict[str, Any]]:
    """Rows of all files by data set; copies of the first mask, which are in every file, once and last."""
    rows = {(row["data"], row["masks"]): row for one in results for row in one["rows"]}
    return sorted(rows.values(), key=lambda row: (row["data"], row["masks"] == COPIED.name))


def blocks(folder: Path = RESULTS) -> dict[str, Lines]:
    """The lines of every table of the page, by name."""
    paths = sorted(folder.glob(RESULT.format("*", "cpu")))
    if not paths:
        return {name: [NOT_RUN] for name in ("scores", "sequences", "costs")}
    results = [json.loads(path.read_text()) for path in paths]
    links = ", ".join(f"[{path.name}](../../profiling/results/{path.name})" for path in paths)
    return {
        "scores": [*scores_table(results), "", *paragraph(f"Data: {links}.")],
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
        arguments = ("profiling.label_propagation", *(sys.argv[1:] if arguments is None else arguments))
        measure(options, Command("", arguments).portable, RESULTS)
        return
    changed = write_page(options.check)
    if options.check and changed:
        sys.exit(f"{PAGE} disagrees with profiling/results: run `python -m profiling.label_propagation page`")
    print(f"wrote {PAGE}" if changed else "nothing to do")


if __name__ == "__main__":
    main()
