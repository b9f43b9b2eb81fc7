"""Options of ``python -m interpreter.evaluate``, and checks that they fit together."""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from interpreter.configs import VideosConfig, option
from interpreter.engine.run import check_ranges, flag
from interpreter.evaluation.candidates import MAX_GUIDED, ON_FEATURES, Baseline, Sweep
from interpreter.methods.base import Method
from interpreter.metrics import PROTOCOLS, Protocol
from interpreter.segmentation import Edges


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Score a run (--run) or saved masks of any method (--masks) under named protocols, together with baselines.

    Prints a table for each protocol. Writes to OUT: table.txt, scores.json (all numbers, also of each video and seed),
    videos.csv, pictures of the best and worst videos, and report.html, one file with all of this and plots. Every
    number is saved with its protocol, split and commit. docs/results/protocols.md describes the protocols.

    Examples:
      python -m interpreter.evaluate --run runs/demo
      python -m interpreter.evaluate --masks MASKS --data davis --year 2017 --root DAVIS --baselines one-segment grid
    """

    run: Path | None = None
    """Directory of a trained run, or hub:OWNER/NAME[@REVISION] for a run on the Hugging Face hub."""
    masks: Path | None = None
    """Saved masks to score instead of a run. One of: a folder DIR/VIDEO/00000.png … of palette or gray PNGs, in which
    0 means no segment; a YouTube-VIS result JSON; .npz files, one for each video or one for all, in which every id is
    a segment, also 0."""
    method: str | None = None
    """A method without training to score instead of a run. Default: the method of the run."""
    data: VideosConfig = field(default_factory=lambda: VideosConfig(split="val", num_videos=40))
    protocol: Annotated[tuple[str, ...], tyro.conf.arg(metavar="{" + ",".join(PROTOCOLS) + "}")] = ()
    """One or several protocols. Default: davis-2016 or davis-2017-unsupervised for DAVIS, else interpreter.
    davis-2017 (semi-supervised) must be the only one. It scores --masks in which objects keep the ids of frame 0."""
    out: Path | None = None
    """Directory to write to. Default for a run: RUN/evaluation/DATA-SPLIT-STAGE, such as synthetic-val-video-features;
    for a run on the hub: evaluation/OWNER-NAME/DATA-SPLIT-STAGE; for masks: evaluation/DATA-SPLIT-MASKS."""
    strict: bool = False
    """Exit with status 1 if a video could not be scored. Such videos are listed, and left out of all numbers."""
    frame_size: tuple[int, int] | None = option(None, at_least=1)
    """Height and width that frames are resized to before the backbone. Default: as in training."""
    clip_frames: int | None = option(None, at_least=1)
    """Use exactly this many frames of each video, as published evaluations do (36 on YouTube-VIS). Default: all.
    Longer videos are cut. Shorter ones are repeated if the method uses all frames together, as --association learned
    does; the repeats are not scored."""
    seeds: tuple[int, ...] = option((0, 1, 2), at_least=0)
    """Seeds of the slot prior and of random baselines. Tables show mean and sample standard deviation over seeds."""
    edges: tuple[Edges, ...] = ("none",)
    """none: upsample the soft masks of the patches bilinearly, as published evaluations do.
    guided: sharpen the edges of the segments with the frames, as `segment` does.
    With both, the run and baselines on features have a row for each; the first value is used in the main row."""
    sweep_merge: tuple[float, ...] = ()
    """Merge thresholds to try. Frames are encoded only once."""
    sweep_slots: tuple[int, ...] = option((), at_least=1)
    """Numbers of video slots to try. Frames are encoded only once."""
    baselines: tuple[Baseline, ...] | None = None
    """Baselines to score as well. Without features: one-segment and grid (regular blocks).
    On the run's features: k-means (of the whole video), k-means-positions (patch positions appended), k-means-frame
    and spectral (each frame separately, then linked over time).
    Default: one-segment, grid and k-means; with --masks one-segment and grid; with davis-2017 none."""
    clusters: tuple[int, ...] = option((), at_least=1)
    """Numbers of segments of the baselines. Default: as many as the run has slots; 8 with --masks."""
    pictures: int = option(3, at_least=0)
    """How many of the best videos, and how many of the worst, to draw."""
    settings: Any = None  # the dataclass of the method's settings, set by parse_with_settings

    @property
    def sweeps(self) -> dict[str, Sweep]:
        """Settings to try, by the name of the option."""
        return {
            "--sweep-merge": Sweep("merge_threshold", "merge threshold", "merge {:g}", self.sweep_merge),
            "--sweep-slots": Sweep("num_slots", "number of slots", "{} slots", self.sweep_slots),
        }


def check_options(config: Evaluation, method: Method) -> None:
    """Check options before anything is computed.

    Raises:
        ValueError: if an option is out of range or contradicts another. The message names it.
    """
    check_ranges(config)
    saved, sweeps = config.masks is not None, config.sweeps
    on_features = sorted(set(config.baselines or ()) & set(ON_FEATURES))
    default = asdict(method.settings())
    changed = [flag(name) for name, value in asdict(config.settings).items() if value != default[name]]
    refused = {
        "give either --run DIR, a run to score, or --masks PATH, saved masks to score": saved
        == bool(config.run or config.method),
        "--masks needs --root DIR, the data set with the ground truth": saved and config.data.root is None,
        "--method needs --root DIR, the data set": not (saved or config.run or config.data.root),
        f"--baselines {' '.join(on_features)} need a run's features; with --masks: one-segment, grid": saved
        and on_features,
        f"{' '.join(changed)} needs --run: saved masks have no settings": saved and changed,
        "--frame-size needs --run: saved masks have no backbone": saved and config.frame_size,
        "--clip-frames needs --run: saved masks have as many frames as the video": saved and config.clip_frames,
        "--outlines is an option of segment: evaluate draws no overlay": getattr(config.settings, "outlines", None),
        "--edges needs --run: saved masks have no soft masks": saved and config.edges != ("none",),
        f"--edges must be none, guided or both, got {list(config.edges)}": not config.edges
        or len(set(config.edges)) < len(config.edges),
        f"--edges guided needs --clusters of at most {MAX_GUIDED}, got {list(config.clusters)}": "guided"
        in config.edges
        and max(config.clusters, default=0) > MAX_GUIDED,
        f"--seeds must be one or more different numbers, got {list(config.seeds)}": not config.seeds
        or len(set(config.seeds)) < len(config.seeds),
        **{f"{name} needs --run: saved masks have no settings": saved and s.values for name, s in sweeps.items()},
        **{
            f"{name} names a value twice: {list(sweep.values)}": len(set(sweep.values)) < len(sweep.values)
            for name, sweep in sweeps.items()
        },
    }
    for message, wrong in refused.items():
        if wrong:
            raise ValueError(message)
    tried = {name: (sweep.setting, sweep.values) for name, sweep in sweeps.items()}
    repeats = config.clip_frames and getattr(config.settings, "sees_repeats", True)
    tried["--clip-frames"] = ("repeat_to", (config.clip_frames,) if config.clip_frames and repeats else ())
    for name, (setting, values) in tried.items():
        _check_setting(name, setting, values, config.settings, method)


def _check_setting(name: str, setting: str, values: Sequence[float], settings: Any, method: Method) -> None:
    """Raise ValueError for a setting that the method does not have, or a value that it does not accept."""
    if values and setting not in {field.name for field in dataclasses.fields(settings)}:
        raise ValueError(f"{name}: the method {method.name} has no setting {setting}")
    for value in values:
        try:
            replace(settings, **{setting: value})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def with_named_objects(config: Evaluation, protocols: Sequence[Protocol]) -> Evaluation:
    """The evaluation under a protocol in which methods get the ids of objects: saved masks alone, semi-supervised
    DAVIS.

    Raises:
        ValueError: for a run, for baselines or for other protocols, because none has such ids.
    """
    name = next(protocol.name for protocol in protocols if protocol.match == "same-id")
    rule = f"--protocol {name} scores masks in which objects keep their ids of the first frame"
    if not config.masks:
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
    """The protocols that the options name, or the default of the data set.

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
