"""SOLV on generated scenes: its components (Table 4 of the paper), other numbers of slots, and the whole method."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from profiling.quality.plans import (
    CLIPS_PROTOCOL,
    DEMO_IMAGE,
    EDGES,
    NO_BASELINES,
    SCENES_PROTOCOLS,
    SCENES_SIZE,
    SCENES_TRAINED,
    SEEDS,
    Size,
)
from profiling.quality.steps import Command, Step

PLAIN, ALONE, NO_MERGE = ("--binding", "plain"), ("--half-window", "0", "--temporal-layers", "0"), ("--no-merge",)
COMPONENTS = {
    "SOLV, A: plain slot attention on single frames": (*PLAIN, *ALONE, *NO_MERGE),
    "SOLV, B: A with merging": (*PLAIN, *ALONE),
    "SOLV, C: plain, merging, temporal binding": PLAIN,
    "SOLV, D: invariant, merging, single frames": ALONE,
    "SOLV, E: invariant, merging, temporal binding": (),
}
SLOTS = (6, 8, 12)
ABLATION = "solv-ablation"
PROTOCOL = ("--protocol", "solv")
AS_TRAINED, APART = (), ("--merge", "False")  # of segmenting


def solv_ablation(out: Path, seeds: Sequence[int] = SEEDS) -> Iterator[Step]:
    """Train the components and other numbers of slots; segment the whole method with merging and without."""
    data, cache = ("--root", str(out / "data")), ("--cache", str(out / "cache"))

    def train(name: str, title: str, seed: int, *options: str) -> Step:
        folder = out / f"solv-{name}-{seed}"
        where = ("--method", "solv", "--run", str(folder), "--seed", str(seed), *data, *cache, *DEMO_IMAGE[:2])
        return Step("train", title, seed, folder, (Command("model", ("interpreter.train", *where, *options)),))

    def evaluate(run: Step, title: str, table: str, size: Size, *options: str) -> Step:
        folder = out / f"scores-{table}-{run.folder.name}{'-apart' if options[: len(APART)] == APART else ''}"
        arguments = (
            *("interpreter.evaluate", "--run", str(run.folder), *data, "--seeds", str(run.seed)),
            *("--frame-size", *map(str, size), *options, *NO_BASELINES, "--out", str(folder)),
        )
        return Step("evaluate", title, run.seed, folder, (Command("evaluation", arguments),), (run,), table, size)

    for seed in seeds:
        for title, options in COMPONENTS.items():
            letter = title.removeprefix("SOLV, ")[0]
            run = train(letter.lower(), title, seed, *options)
            yield run
            yield evaluate(run, title, ABLATION, SCENES_TRAINED, *PROTOCOL)
            if letter == "E":
                for merging, name in ((AS_TRAINED, "SOLV"), (APART, "SOLV, slots not merged")):
                    yield evaluate(run, name, "scenes", SCENES_SIZE, *merging, *SCENES_PROTOCOLS, *EDGES)
                    yield evaluate(run, name, "scenes-clips", SCENES_TRAINED, *merging, *CLIPS_PROTOCOL)
        for slots in SLOTS:
            for end, options in (("", ()), (", never merged", NO_MERGE)):
                name = f"slots-{slots}{'-apart' * bool(options)}"
                run = train(name, f"SOLV, {slots} slots{end}", seed, "--num-slots", str(slots), *options)
                yield run
                yield evaluate(run, run.method, ABLATION, SCENES_TRAINED, *PROTOCOL)
