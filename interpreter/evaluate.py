"""Score a run, or saved masks of any method, against ground truth: ``python -m interpreter.evaluate --help``."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from interpreter.commands import run_command
from interpreter.configs import WITHOUT_SPLITS, require_square
from interpreter.data.predictions import open_predictions
from interpreter.engine.run import RunConfig
from interpreter.engine.videos import open_videos, published_ids
from interpreter.evaluation.candidates import CandidateMasks, SavedMasks, SegmenterMasks
from interpreter.evaluation.gallery import Gallery
from interpreter.evaluation.options import Evaluation, check_options, choose_protocols, with_named_objects
from interpreter.evaluation.output import write_evaluation
from interpreter.evaluation.provenance import code_version
from interpreter.evaluation.record import Provenance
from interpreter.evaluation.scoring import Scores, score_dataset
from interpreter.hub.fetching import local_run
from interpreter.hub.names import folder_to_write, run_name, title_name
from interpreter.method_options import Chosen, choose_method, parse_with_settings
from interpreter.methods.base import Method
from interpreter.methods.runs import open_segmenter

PROG = "python -m interpreter.evaluate"
CLUSTERS_OF_MASKS = (8,)


def evaluate(config: Evaluation, chosen: Chosen | None = None) -> Scores:
    """Score a run or saved masks, and baselines. Writes the files that :class:`Evaluation` lists.

    Args:
        config: options of the evaluation.
        chosen: the method. Default: that of the run, or the one that ``config`` names.

    Raises:
        ValueError, FileNotFoundError: if options contradict each other, or the run, the masks or the data are missing,
            damaged, or without ground truth. Single damaged videos are not an error.
    """
    config = replace(config, run=None if config.run is None else local_run(config.run))
    method, stored = chosen or choose_method(config.method, config.run)
    config = replace(config, settings=config.settings or method.settings())
    check_options(config, method)
    protocols = choose_protocols(config)
    if any(protocol.match == "same-id" for protocol in protocols):
        config = with_named_objects(config, protocols)
    commit = code_version()  # before anything is written to the checkout
    dataset = open_videos(config.data, folder_to_write(config.run or Path()))
    candidates = saved_masks(config) if config.masks else segmenter_masks(config, method, stored)
    name = f"{config.data.data}{'-' + config.data.year if config.data.data == 'davis' else ''}"
    split = "all" if config.data.data in WITHOUT_SPLITS else config.data.split or "all"
    subject = title_name(config.run or config.masks or Path(method.name))
    gallery = Gallery(config.pictures)
    scores = score_dataset(dataset, candidates, protocols, gallery, config.clip_frames)
    # Hashes of the opened files: a run that is still training can have newer checkpoints now.
    weights = dict(candidates.segmenter.weights) if isinstance(candidates, SegmenterMasks) else {}
    _write(config, scores, Provenance(name, split, subject, commit, weights), gallery)
    return scores


def segmenter_masks(config: Evaluation, method: Method, stored: RunConfig) -> CandidateMasks:
    """Masks of a run or of a method without training, with sweeps and baselines."""
    settings = config.settings
    if config.clip_frames and getattr(settings, "sees_repeats", True):
        settings = replace(settings, repeat_to=config.clip_frames)
    segmenter = open_segmenter(method, config.run, settings, config.frame_size, stored=stored)
    require_square(config.data.crop, segmenter.frame_size)
    baselines = ("one-segment", "grid", "k-means") if config.baselines is None else config.baselines
    clusters = config.clusters or (segmenter.num_segments,)
    sweeps = tuple(config.sweeps.values())
    return SegmenterMasks(segmenter, config.seeds, sweeps, baselines, clusters, config.edges)


def saved_masks(config: Evaluation) -> CandidateMasks:
    """Saved masks, and the baselines that need no features."""
    assert config.masks is not None
    baselines = ("one-segment", "grid") if config.baselines is None else config.baselines
    predictions = open_predictions(config.masks, video_ids=published_ids(config.data) or None)
    return SavedMasks(predictions, config.masks.resolve().name, baselines, config.clusters or CLUSTERS_OF_MASKS)


def _way(settings: Any) -> str:
    """The way in which a run segments, as a part of a folder name."""
    kind: str = getattr(settings, "kind", getattr(settings, "stage", "model"))
    return kind


def _write(config: Evaluation, scores: Scores, provenance: Provenance, gallery: Gallery) -> None:
    name = f"{provenance.data}-{provenance.split}"
    if config.run:
        folder = folder_to_write(config.run)
        folder = folder / "evaluation" if folder == config.run else folder
        home = config.out or folder / f"{name}-{_way(config.settings)}"
    else:
        home = config.out or Path("evaluation") / f"{name}-{provenance.subject}"
    options = asdict(config)
    settings = options.pop("settings")
    options |= {} if config.masks else settings
    options |= {"run": run_name(config.run)} if config.run else {}
    write_evaluation(home, scores, provenance, options, gallery)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    chosen, config = parse_with_settings(Evaluation, sys.argv[1:] if arguments is None else arguments, PROG)
    scores = evaluate(config, chosen)
    return 1 if config.strict and scores.skipped else 0


if __name__ == "__main__":
    run_command(main)
