"""Score a run, or anybody's saved masks, against ground truth: ``python -m interpreter.evaluate --help``."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from interpreter.commands import cli, run_command
from interpreter.configs import WITHOUT_SPLITS, VideosConfig
from interpreter.data.predictions import open_predictions
from interpreter.engine.videos import open_videos, published_ids
from interpreter.evaluation.gallery import Gallery
from interpreter.evaluation.methods import ON_FEATURES, Baseline, MasksSource, RunSource, Source
from interpreter.evaluation.provenance import code_version
from interpreter.evaluation.record import Provenance, format_tables, write_scores, write_videos
from interpreter.evaluation.report import write_report
from interpreter.evaluation.scoring import Scores, score_dataset
from interpreter.files import remove_leftovers, write_text
from interpreter.interrupts import Interrupted, StopRequest
from interpreter.locks import waiting_for
from interpreter.methods.interpreter.config import StageName
from interpreter.methods.interpreter.segmenter import Segmenter
from interpreter.metrics import PROTOCOLS, Protocol

CLUSTERS_OF_MASKS = (8,)


@dataclass(frozen=True)
class Evaluation:
    """Score a run (--run) or saved masks (--masks) under named protocols, next to baselines.

    Prints a table for each protocol. Writes below OUT: table.txt, scores.json (all numbers, of each video and seed
    too), videos.csv, pictures of the best and worst videos, and report.html, one file with all of it and plots. Every
    number carries its protocol, split and commit. docs/protocols.md says what each protocol is.
    """

    run: Path | None = None
    """Run directory, as interpreter.train leaves it."""
    masks: Path | None = None
    """Masks of any method instead of a run: DIR/VIDEO/00000.png … (palette or gray; id 0 is no segment), a YouTube-VIS
    result JSON, or .npz: a file for each video, or one of all (every id is a segment)."""
    data: VideosConfig = field(default_factory=lambda: VideosConfig(split="val", num_videos=40))
    protocol: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{" + ",".join(PROTOCOLS) + "}")] = ()
    """Protocols, one or several. Default: davis-2016 or davis-2017-unsupervised for DAVIS, else interpreter. davis-2017
    (semi-supervised) must be the only one, and scores --masks in which objects keep their ids of the first frame."""
    out: Path | None = None
    """Directory to write to. Default: RUN/evaluation/DATA-SPLIT-STAGE, or evaluation/DATA-SPLIT-MASKS."""
    strict: bool = False
    """Exit with status 1 if any video could not be scored. They are left out of all numbers and named either way."""
    stage: StageName = "video"
    """video: segments keep their identity. image: each frame by itself (its per-video numbers mean little)."""
    frame_size: tuple[int, int] | None = None
    """Height and width that frames are resized to before the backbone. Default: as in training."""
    clip_frames: int | None = None
    """Frames of a video that the run sees, where a published evaluation has a fixed clip length (36 on YouTube-VIS):
    shorter videos repeat, and the repeats are cut off before scoring; longer ones are cut. Default: all frames."""
    merge_threshold: float | None = None
    """Cosine distance below which video slots are merged: higher gives fewer segments. Default: as in training."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the slot prior and of baselines that start at random; tables show mean and sample standard deviation."""
    sweep_merge: tuple[float, ...] = ()
    """Merge thresholds to try, on the same features and image slots."""
    sweep_slots: tuple[int, ...] = ()
    """Numbers of video slots to draw from the prior, to try on the same features and image slots."""
    baselines: tuple[Baseline, ...] | None = None
    """What to show beside the run, on its features: one-segment, grid (regular blocks), k-means of the whole video,
    k-means-positions (patch positions appended), k-means-frame and spectral (each frame by itself, linked over time).
    Default: the first three; with --masks, which have no features, the first two; none under davis-2017."""
    clusters: tuple[int, ...] = ()
    """Numbers of segments of the baselines. Default: as many as the run has slots; 8 with --masks."""
    pictures: int = 3
    """How many of the best and of the worst videos to draw."""


def evaluate(config: Evaluation) -> Scores:
    """Score a run or saved masks, and their baselines; writes the files that :class:`Evaluation` names.

    Raises:
        ValueError, FileNotFoundError: if options contradict each other, or the run, the masks or the data are missing,
            damaged beyond single videos, or without ground truth.
    """
    _check(config)
    protocols = choose_protocols(config)
    if any(protocol.match == "same-id" for protocol in protocols):
        config = _with_named_objects(config, protocols)
    commit = code_version()  # before anything is written into the checkout
    home = config.run or config.masks
    assert home is not None
    if config.masks and config.data.root is None:
        raise ValueError("--masks needs --root DIR, the data set with the ground truth")
    dataset = open_videos(config.data, home)
    source = run_source(config) if config.run else masks_source(config)
    name = f"{config.data.data}{'-' + config.data.year if config.data.data == 'davis' else ''}"
    split = "all" if config.data.data in WITHOUT_SPLITS else config.data.split or "all"
    provenance = Provenance(name, split, home.resolve().name, commit)
    gallery = Gallery(config.pictures)
    scores = score_dataset(dataset, source, protocols, gallery, config.clip_frames)
    _write(config, scores, provenance, gallery)
    return scores


def _check(config: Evaluation) -> None:
    """Refuse options that contradict each other before anything is computed."""
    if (config.run is None) == (config.masks is None):
        raise ValueError("give either --run DIR, a run to score, or --masks PATH, saved masks to score")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise ValueError(f"--seeds must be one or more different numbers from 0, got {list(config.seeds)}")
    sweeps = {"--sweep-merge": config.sweep_merge, "--sweep-slots": config.sweep_slots}
    for option, values in sweeps.items():
        if values and (config.masks or config.stage == "image"):
            raise ValueError(f"{option} needs a run's video stage: it has no meaning with --masks or --stage image")
        if len(set(values)) < len(values):
            raise ValueError(f"{option} names a value twice: {list(values)}")
    if any(not 1 <= slots <= 255 for slots in config.sweep_slots):
        raise ValueError(f"--sweep-slots must be in 1..255, got {list(config.sweep_slots)}")
    on_features = sorted(set(config.baselines or ()) & set(ON_FEATURES))
    if config.masks and on_features:
        raise ValueError(f"--baselines {' '.join(on_features)} need a run's features; with --masks: one-segment, grid")
    if config.clip_frames is not None and (config.masks or config.clip_frames < 1):
        raise ValueError(f"--clip-frames needs --run and a number from 1, got {config.clip_frames}")
    if config.pictures < 0:
        raise ValueError(f"--pictures must be 0 or more, got {config.pictures}")


def _with_named_objects(config: Evaluation, protocols: Sequence[Protocol]) -> Evaluation:
    """The evaluation under a protocol that gives every object its id: saved masks alone, DAVIS with that track's masks.

    Raises:
        ValueError: for a run, baselines or other protocols, which have no such ids.
    """
    name = next(protocol.name for protocol in protocols if protocol.match == "same-id")
    rule = f"--protocol {name} scores masks in which objects keep their ids of the first frame"
    if config.run:
        raise ValueError(f"{rule}, and a run numbers its segments by itself; choose davis-2017-unsupervised for a run")
    if config.baselines:
        raise ValueError(f"{rule}, and baselines have no such ids; leave --baselines {' '.join(config.baselines)} out")
    if len(protocols) > 1:
        others = " ".join(protocol.name for protocol in protocols if protocol.name != name)
        raise ValueError(f"{rule}, and other protocols need other masks; evaluate {others} in another command")
    data = config.data
    if data.data == "davis":
        data = replace(data, year="2017", annotations="semi-supervised")
    return replace(config, baselines=(), data=data)


def choose_protocols(config: Evaluation) -> list[Protocol]:
    """The protocols that were asked for, or those of the data set.

    Raises:
        ValueError: if a name is not in :data:`interpreter.metrics.PROTOCOLS`.
    """
    names = list(dict.fromkeys(config.protocol))
    if not names:
        years = {"2016": "davis-2016", "2017": "davis-2017-unsupervised"}
        names = [years[config.data.year] if config.data.data == "davis" else "interpreter"]
    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown:
        raise ValueError(f"unknown --protocol {', '.join(unknown)}; choose from {', '.join(PROTOCOLS)}")
    return [PROTOCOLS[name] for name in names]


def run_source(config: Evaluation) -> Source:
    """Masks of a run, its sweeps and its baselines."""
    assert config.run is not None
    segmenter = Segmenter.from_run(
        config.run, config.stage, config.frame_size, config.seeds[0], merge_threshold=config.merge_threshold
    )
    stage = segmenter.video_stage or segmenter.image_stage
    return RunSource(
        segmenter,
        f"{config.stage} stage",
        config.seeds,
        config.sweep_merge,
        config.sweep_slots,
        ("one-segment", "grid", "k-means") if config.baselines is None else config.baselines,
        config.clusters or (stage.config.num_slots,),
        config.clip_frames,
    )


def masks_source(config: Evaluation) -> Source:
    """Saved masks, and the baselines that need no features."""
    assert config.masks is not None
    baselines = ("one-segment", "grid") if config.baselines is None else config.baselines
    predictions = open_predictions(config.masks, video_ids=published_ids(config.data) or None)
    return MasksSource(predictions, config.masks.resolve().name, baselines, config.clusters or CLUSTERS_OF_MASKS)


def _write(config: Evaluation, scores: Scores, provenance: Provenance, gallery: Gallery) -> None:
    name = f"{provenance.data}-{provenance.split}"
    if config.run:
        home = config.out or config.run / "evaluation" / f"{name}-{config.stage}"
    else:
        home = config.out or Path("evaluation") / f"{name}-{provenance.subject}"
    pictures = gallery.pictures()
    table = format_tables(scores, provenance)
    # The files of one evaluation stay together, whoever else writes there and whatever signal comes.
    with waiting_for(home / ".lock", str(home)) as lock, StopRequest() as stop:
        if lock.exclusive:
            remove_leftovers(home)
        for picture in pictures:
            picture.save(home)
        write_text(home / "table.txt", table)
        write_scores(home / "scores.json", scores, provenance, asdict(config))
        write_videos(home / "videos.csv", scores, provenance)
        write_report(home / "report.html", scores, provenance, asdict(config), pictures)
    if stop.number:
        raise Interrupted(stop.number)
    print(table)
    for title, file in {"report": "report.html", "scores": "scores.json", "videos": "videos.csv"}.items():
        print(f"{title}: {home / file}")
    print(f"table: {home / 'table.txt'}\npictures: {home}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    given = sys.argv[1:] if arguments is None else arguments
    config = cli(Evaluation, given, prog="python -m interpreter.evaluate")
    scores = evaluate(config)
    return 1 if config.strict and scores.skipped else 0


if __name__ == "__main__":
    run_command(main)
