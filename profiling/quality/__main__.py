"""Train and evaluate the models of the pages of results, and write the tables of these pages.

    python -m profiling.quality scenes                                  # generated scenes
    python -m profiling.quality davis --root DAVIS --backbone WEIGHTS   # DAVIS, with the weights of a ViT-S/14
    python -m profiling.quality solv-ablation                           # SOLV's components, on generated scenes
    python -m profiling.quality smtc                                    # SMTC, on generated scenes
    python -m profiling.quality page                                    # the tables of docs/results, from the results

If a command is interrupted, rerun it to resume: what the same command has trained or evaluated is not computed again.
The results of finished steps are in profiling/results.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from profiling.common.machine import save
from profiling.common.paths import RESULTS, ROOT
from profiling.quality import plans
from profiling.quality.join import joined, pictures
from profiling.quality.page import DAVIS, PAGES, PICTURE, SCENES, SMTC, SOLV, with_tables
from profiling.quality.smtc import smtc_scenes
from profiling.quality.solv import solv_ablation
from profiling.quality.steps import Command, Kind, Step, forget


@dataclass
class Run:
    """Options of all plans."""

    again: tuple[Kind, ...] = ()
    """Do these again, although they are done: train, evaluate or strips. With train, everything that uses the trained
    models is done again too."""
    dry_run: bool = False
    """Print the commands and whether each is done; run nothing."""


@dataclass
class Scenes(Run):
    """Train and evaluate on generated scenes."""

    out: Path = Path("runs/quality/scenes")
    """Directory of runs, evaluations and pictures."""


@dataclass
class Davis(Run):
    """Train and evaluate on DAVIS-2016, and evaluate on DAVIS-2017."""

    root: Path = tyro.MISSING
    """The data set."""
    backbone: str = tyro.MISSING
    """Weights of a DINOv2 ViT-S/14, as `--backbone` of training."""
    out: Path = Path("runs/quality/davis")
    """Directory of runs, evaluations and pictures."""


@dataclass
class SolvAblation(Run):
    """Train SOLV's components and other numbers of slots on generated scenes, and evaluate each."""

    out: Path = Path("runs/quality/scenes")
    """Directory of runs, evaluations and pictures; scenes and features may be those of `scenes`."""
    seeds: tuple[int, ...] = plans.SEEDS
    """Seeds of the trainings."""


@dataclass
class Smtc(Run):
    """Train SMTC on generated scenes, and evaluate it."""

    out: Path = Path("runs/quality/scenes")
    """Directory of runs, evaluations and pictures; scenes and features may be those of `scenes`."""
    seeds: tuple[int, ...] = plans.SEEDS
    """Seeds of the trainings."""


@dataclass
class Page:
    """Write the tables of the pages of results from profiling/results."""

    check: bool = False
    """Write nothing; fail if a page would change."""


def run(options: Run, steps: Sequence[Step], what: str, command: str, results: Path) -> None:
    """Run what is not done of a plan, and save the results after every step."""
    if options.dry_run:
        for step in steps:
            again = any(one.kind in options.again for one in (step, *step.needs))
            state = "done" if step.done and not again else "to do"
            print(*(f"[{state}] {one}" for one in step.commands), sep="\n")
        return
    forget(steps, options.again)
    for step in steps:
        if not step.done:
            step.run()
            save(results, joined(what, command, steps))
    save(results, joined(what, command, steps))
    print("pictures:", *pictures(steps), sep="\n  ")


def write_pages(check: bool, root: Path = ROOT, folder: Path = RESULTS) -> list[str]:
    """Write the tables of all pages, unless ``check``; returns the pages that differed from the results."""
    changed = []
    for page in PAGES:
        path = root / page
        old = path.read_text()
        new = with_tables(page, old, root, folder)
        if old != new:
            changed.append(page)
            if not check:
                path.write_text(new)
    return changed


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = Command("quality", ("profiling.quality", *arguments)).portable
    plan = Scenes | Davis | SolvAblation | Smtc | Page
    options = tyro.cli(plan, prog="python -m profiling.quality", description=__doc__, args=arguments)
    if isinstance(options, Page):
        changed = write_pages(options.check)
        if options.check and changed:
            sys.exit(f"{', '.join(changed)} disagree with profiling/results: run `python -m profiling.quality page`")
        print("\n".join(f"wrote {page}" for page in changed) or "nothing to do")
    elif isinstance(options, Scenes):
        steps = list(plans.scenes(options.out))
        run(options, steps, "scores and costs on generated scenes", command, RESULTS / SCENES)
        drawn = sorted((options.out / "strips-interpreter").glob("*.png"))
        if drawn:
            shutil.copy(drawn[0], ROOT / PICTURE)
    elif isinstance(options, SolvAblation):
        steps = list(solv_ablation(options.out, options.seeds))
        run(options, steps, "scores and costs of SOLV on generated scenes", command, RESULTS / SOLV)
    elif isinstance(options, Smtc):
        steps = list(smtc_scenes(options.out, options.seeds))
        run(options, steps, "scores and costs of SMTC on generated scenes", command, RESULTS / SMTC)
    else:
        steps = list(plans.davis(options.out, options.root, options.backbone))
        what = "scores and costs on DAVIS-2016 and two sequences of DAVIS-2017"
        run(options, steps, what, command, RESULTS / DAVIS)


if __name__ == "__main__":
    main()
