"""SMTC on generated scenes, scored like the other methods there."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from profiling.quality.plans import (
    CLIPS_PROTOCOL,
    DEMO_IMAGE,
    EDGES,
    FEW,
    NO_BASELINES,
    SCENES_PROTOCOLS,
    SCENES_SIZE,
    SCENES_TRAINED,
    SEEDS,
    TITLES,
    Size,
    strips,
)
from profiling.quality.steps import Command, Step


def smtc_scenes(out: Path, seeds: Sequence[int] = SEEDS) -> Iterator[Step]:
    """Train the preset demo; segment by tracks, at the frame size of the training and at a larger one."""
    data, cache = ("--root", str(out / "data")), ("--cache", str(out / "cache"))

    def evaluate(run: Step, table: str, size: Size, *options: str) -> Step:
        folder = out / f"scores-{table}-{run.folder.name}"
        arguments = (
            *("interpreter.evaluate", "--run", str(run.folder), *data, "--seeds", str(run.seed)),
            *("--frame-size", *map(str, size), *options, *NO_BASELINES, "--out", str(folder)),
        )
        return Step("evaluate", run.method, run.seed, folder, (Command("evaluation", arguments),), (run,), table, size)

    for seed in seeds:
        folder = out / f"smtc-{seed}"
        where = ("--method", "smtc", "--run", str(folder), "--seed", str(seed), *data, *cache, *DEMO_IMAGE[:2])
        run = Step("train", TITLES["smtc"], seed, folder, (Command("model", ("interpreter.train", *where)),))
        yield run
        yield evaluate(run, "scenes", SCENES_SIZE, *SCENES_PROTOCOLS, *EDGES)
        yield evaluate(run, "scenes-clips", SCENES_TRAINED, *CLIPS_PROTOCOL)
        if seed == SEEDS[0]:
            yield strips(run, out / "strips-smtc", SCENES_SIZE, *data, "--first", str(FEW))
