"""Check and convert data sets: ``python -m interpreter.data --help``."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from interpreter.commands import RESUME, cli, described, run_command
from interpreter.data.convert import convert_dataset
from interpreter.data.datasets import find_sources, open_dataset, split_parts
from interpreter.data.datasets.movi import convert_movi
from interpreter.data.datasets.releases import RELEASES
from interpreter.data.datasets.unopened import UnopenedVideo, UnopenedVideos
from interpreter.data.datasets.ytvis import TRAINING_FOR
from interpreter.data.options import DatasetKind, DavisAnnotations
from interpreter.data.verify import check_videos, find_leaks
from interpreter.files import write_text

VERIFY_EXAMPLES = """Examples:
  python -m interpreter.data verify folder --root VIDEOS
  python -m interpreter.data verify ytvis --root YTVIS19 --split train"""
CONVERT_EXAMPLES = """Examples:
  python -m interpreter.data convert movi --root DOWNLOAD --out MOVi-E
  python -m interpreter.data convert folder --root VIDEOS --out COPY --crop-borders"""


@dataclass(frozen=True)
class Verify:
    """Check every file of a data set. If files are missing, print where to download them.

    Decodes every frame and mask. Prints the number of videos, the missing and damaged files, and the files that are not
    read. For YouTube-VIS it also checks that training and evaluation videos do not overlap: train and holdout, or with
    --split last-300, without-last-300 and last-300. The exit status is 0 if at least one split exists and no file is
    damaged.
    """

    dataset: tyro.conf.Positional[DatasetKind]
    """Kind of data set."""
    root: Path
    """Folder of the data set. It need not exist yet."""
    split: str | None = None
    """Split to check, or several joined by +. Default: all that exist.
    ytvis splits: train (without the hold-out), holdout (entries 600–899 of train.json), last-300 (its 300 largest
    ids), without-last-300 (the others), all (the whole train.json), valid, test.
    ytvos splits: train, valid, test, and the same with all 30 frames per second, such as train_all_frames."""
    year: Literal[2016, 2017] = 2017
    """Edition of DAVIS; only for davis."""
    annotations: DavisAnnotations = "unsupervised"
    """Masks of DAVIS 2017; only for davis."""
    manifest: Path | None = None
    """Write the ids of the YouTube-VIS hold-out (or of last-300) to this JSON file; only for ytvis."""


@dataclass(frozen=True)
class Convert:
    """Write a data set in the layout of DAVIS 2017 with unsupervised masks.

    Only MOVi needs this. Its release for TensorFlow Datasets is read with TensorFlow (pip install tensorflow-cpu
    tensorflow-datasets); use the result with --data movi. All other data sets are read as published. Convert them only
    for tools that expect DAVIS; use the copy with --data davis --year 2017. If interrupted, rerun the same command to
    resume.
    """

    dataset: tyro.conf.Positional[DatasetKind]
    """Kind of data set."""
    root: Path
    """Data set root."""
    out: Path
    """Directory to write to; several splits can share it."""
    split: str | None = None
    """Split to convert, or several joined by +. Default: all.
    movi: each under its name. Others: all together, as the split "all", or as train-valid of train+valid."""
    year: Literal[2016, 2017] = 2017
    """Edition of DAVIS; only for davis."""
    annotations: DavisAnnotations = "unsupervised"
    """Masks of DAVIS 2017; only for davis."""
    crop_borders: bool = False
    """Crop black borders off frames and masks. Not for movi, which has none."""


def verify(config: Verify) -> int:
    """Print the videos and the missing and damaged files. Returns the exit status."""
    release = RELEASES[config.dataset]
    splits = split_parts(config.split) if config.split else release.splits
    existing: dict[str | None, UnopenedVideos] = {}
    missing = []
    for split in splits:
        try:
            existing[split] = find_sources(
                config.dataset, config.root, split, year=config.year, annotations=config.annotations
            )
        except (FileNotFoundError, ValueError) as error:
            missing.append(f"{split or config.dataset}: {error}")
    failed = not existing or bool(config.split and missing)
    for split, videos in existing.items():
        findings = check_videos(videos)
        failed |= bool(findings.problems)
        print(
            f"{split or config.dataset}: {findings.videos} videos, {findings.frames} frames, {findings.masks} of them "
            f"with masks, {len(findings.problems)} problems"
        )
        for problem in findings.problems:
            print(f"  {problem}")
        if videos.left_out.groups:
            print(f"  {videos.left_out}")
    for line in missing:
        print(f"missing: {line}")
    for split in TRAINING_FOR.keys() & existing.keys() if config.dataset == "ytvis" else ():
        failed |= _report_leaks(config, split, existing[split])
    if not existing or missing:
        print(f"\n{release.instructions()}")
    return int(failed)


def _report_leaks(config: Verify, split: str, held_out: list[UnopenedVideo]) -> bool:
    """Compare the videos for evaluation with the videos for training. Returns whether they share any."""
    training = find_sources("ytvis", config.root, TRAINING_FOR[split])
    leaks, name = find_leaks(training, held_out), "hold-out" if split == "holdout" else split
    print(
        f"{name}: {len(held_out)} videos; training: {len(training)} videos, of which {len(leaks)} are in the "
        f"{name} by id, folder of frames or bytes of the first frame"
    )
    for leak in leaks:
        print(f"  {leak}")
    if config.manifest:
        videos = [{"id": video.id, "name": video.name} for video in held_out]
        write_text(config.manifest, json.dumps({"split": split, "videos": videos}, indent=1) + "\n")
        print(f"ids of the {name}: {config.manifest}")
    return bool(leaks)


def convert(config: Convert) -> int:
    """Write the copy; returns the exit status: 1 if damaged videos were skipped."""
    if config.dataset == "movi":
        if config.crop_borders:
            raise ValueError("MOVi has no black borders; leave --crop-borders out")
        wanted = split_parts(config.split) if config.split else [None]
        splits = [name for split in wanted for name in convert_movi(config.root, config.out, split)]
        print(f"{config.out}: splits {', '.join(splits)}. Read them with --data movi --root {config.out}")
        return 0
    dataset = open_dataset(
        config.dataset,
        config.root,
        config.split,
        year=config.year,
        annotations=config.annotations,
        crop_borders=config.crop_borders,
    )
    split = "-".join(split_parts(config.split)) if config.split else "all"
    year = f" {config.year} {config.annotations}" if config.dataset == "davis" else ""
    convert_dataset(dataset, f"{config.dataset}{year}{' cropped' if config.crop_borders else ''}", config.out, split)
    for line in filter(None, (dataset.report(), dataset.left_out)):
        print(line)
    print(
        f"{config.out}: {len(dataset)} videos. Read them with --data davis --year 2017 --root {config.out} "
        f"--split {split}"
    )
    return int(bool(dataset.skipped))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    command = (
        Annotated[Verify, tyro.conf.subcommand("verify", description=described(Verify, VERIFY_EXAMPLES))]
        | Annotated[Convert, tyro.conf.subcommand("convert", description=described(Convert, CONVERT_EXAMPLES))]
    )
    config: Verify | Convert = cli(
        command,  # type: ignore[arg-type]
        sys.argv[1:] if arguments is None else arguments,
        prog="python -m interpreter.data",
        description="Check and convert data sets.",
    )
    return verify(config) if isinstance(config, Verify) else convert(config)


if __name__ == "__main__":
    run_command(main, (RuntimeError,), RESUME)
