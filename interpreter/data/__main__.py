"""Check and convert data sets: ``python -m interpreter.data --help``."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from interpreter.commands import RESUME, cli, run_command
from interpreter.data.convert import convert_dataset
from interpreter.data.datasets import find_sources, open_dataset
from interpreter.data.datasets.movi import convert_movi
from interpreter.data.datasets.releases import RELEASES
from interpreter.data.datasets.unopened import UnopenedVideo, UnopenedVideos
from interpreter.data.options import DatasetKind, DavisAnnotations
from interpreter.data.verify import check_sources, find_leaks
from interpreter.files import write_text


@dataclass(frozen=True)
class Verify:
    """Look at every file of a data set, and say where to get what is missing.

    Decodes every frame and mask. Lists the videos found, the missing files and the corrupt ones, and which
    files are not read; of YouTube-VIS also whether training excludes the hold-out. Exit status 0: all is well; 1:
    nothing is there, or something is corrupt.
    """

    dataset: tyro.conf.Positional[DatasetKind]
    """Which data set."""
    root: Path
    """Directory that it is, or shall be, in."""
    split: str | None = None
    """Split to look at. Default: every split that is there."""
    year: Literal[2016, 2017] = 2017
    """Edition of DAVIS."""
    annotations: DavisAnnotations = "unsupervised"
    """Masks of DAVIS 2017."""
    manifest: Path | None = None
    """Write the ids of the YouTube-VIS hold-out to this JSON file."""


@dataclass(frozen=True)
class Convert:
    """Write a data set in the one internal layout, that of DAVIS 2017 with unsupervised masks.

    Read the result with --data davis --year 2017, and MOVi with --data movi. If interrupted, rerun the same command to
    continue. movi reads the release for TensorFlow Datasets (pip install tensorflow-cpu tensorflow-datasets); all
    others are read by training and evaluation as they are, and need no conversion.
    """

    dataset: tyro.conf.Positional[DatasetKind]
    """Which data set."""
    root: Path
    """Directory that it is in."""
    out: Path
    """Directory to write to; splits can share it."""
    split: str | None = None
    """Split to convert. Default: all of them (movi: each as itself; others: together, as the split all)."""
    year: Literal[2016, 2017] = 2017
    """Edition of DAVIS."""
    annotations: DavisAnnotations = "unsupervised"
    """Masks of DAVIS 2017."""
    crop_borders: bool = False
    """Crop black borders off frames and masks. Not for movi, which has none."""


def verify(config: Verify) -> int:
    """Print the videos found, the missing and the corrupt files; returns the exit status."""
    release = RELEASES[config.dataset]
    splits = (config.split,) if config.split else release.splits
    found: dict[str | None, UnopenedVideos] = {}
    missing = []
    for split in splits:
        try:
            found[split] = find_sources(
                config.dataset, config.root, split, year=config.year, annotations=config.annotations
            )
        except (FileNotFoundError, ValueError) as error:
            missing.append(f"{split or config.dataset}: {error}")
    failed = not found
    for split, sources in found.items():
        result = check_sources(sources)
        failed |= bool(result.problems)
        print(
            f"{split or config.dataset}: {result.videos} videos, {result.frames} frames, {result.masks} of them with "
            f"masks, {len(result.problems)} problems"
        )
        for problem in result.problems:
            print(f"  {problem}")
        if sources.left_out.groups:
            print(f"  {sources.left_out}")
    for line in missing:
        print(f"not there: {line}")
    if config.dataset == "ytvis" and "holdout" in found:
        failed |= _report_leaks(config, found["holdout"])
    if not found or missing:
        print(f"\n{release.instructions()}")
    return int(failed)


def _report_leaks(config: Verify, held_out: list[UnopenedVideo]) -> bool:
    training = find_sources("ytvis", config.root, "train")
    leaks = find_leaks(training, held_out)
    print(
        f"hold-out: {len(held_out)} videos; training: {len(training)} videos, of which {len(leaks)} are in the "
        "hold-out by id, folder of frames or bytes of the first frame"
    )
    for leak in leaks:
        print(f"  {leak}")
    if config.manifest:
        videos = [{"id": source.id, "name": source.name} for source in held_out]
        write_text(config.manifest, json.dumps({"split": "holdout", "videos": videos}, indent=1) + "\n")
        print(f"ids of the hold-out: {config.manifest}")
    return bool(leaks)


def convert(config: Convert) -> int:
    """Write the internal layout; returns the exit status: 1 if videos were left out because they are damaged."""
    if config.dataset == "movi":
        if config.crop_borders:
            raise ValueError("MOVi has no black borders; leave --crop-borders out")
        splits = convert_movi(config.root, config.out, config.split)
        print(f"{config.out} holds {', '.join(splits)}. Read it with --data movi --root {config.out}")
        return 0
    dataset = open_dataset(
        config.dataset,
        config.root,
        config.split,
        year=config.year,
        annotations=config.annotations,
        crop_borders=config.crop_borders,
    )
    split = config.split or "all"
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
    command = Annotated[Verify, tyro.conf.subcommand("verify")] | Annotated[Convert, tyro.conf.subcommand("convert")]
    config: Verify | Convert = cli(
        command,  # type: ignore[arg-type]
        sys.argv[1:] if arguments is None else arguments,
        prog="python -m interpreter.data",
        description="Check and convert data sets.",
    )
    return verify(config) if isinstance(config, Verify) else convert(config)


if __name__ == "__main__":
    run_command(main, (RuntimeError,), RESUME)
