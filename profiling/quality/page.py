"""Tables between markers on the pages of results; people write the text around them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from profiling.common.paths import RESULTS, ROOT
from profiling.quality import tables
from profiling.report.markdown import paragraph

PAGES = {
    "docs/results/scenes.md": ("scenes",),
    "docs/results/scenes_video_methods.md": ("scenes-clips", "solv-ablation"),
    "docs/results/davis_2016.md": ("davis-2016", "davis-2016-sequences"),
    "docs/results/davis_2017.md": ("davis-2017",),
    "docs/results/costs.md": ("costs",),
}
"""The tables of each page."""
SCENES, DAVIS, SOLV, SMTC = "scenes.json", "davis.json", "solv-scenes.json", "smtc-scenes.json"
PICTURE = "docs/pictures/results-scenes.png"
ALTERNATIVE = "A held-out scene: frames, segments, truth"
CAPTION = (
    "A held-out scene. From top to bottom: frames; segments of Interpreter with association by features and guided "
    "edges; the truth."
)
BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def blocks(root: Path = ROOT, folder: Path = RESULTS) -> dict[str, tables.Lines]:
    """The lines of every table, by name, with the picture of a scene if there is one."""
    names = (SCENES, DAVIS, SOLV, SMTC)
    files = {name: json.loads((folder / name).read_text()) for name in names if (folder / name).exists()}
    davis = files.get(DAVIS)
    scenes = together([files[name] for name in (SCENES, SOLV, SMTC) if name in files])
    not_run, picture = [tables.NOT_RUN], root / PICTURE
    drawn = ["", f"![{ALTERNATIVE}](../pictures/{picture.name})", "", *paragraph(CAPTION)] if picture.exists() else []
    return {
        "scenes": [*tables.scores(scenes, "scenes"), *drawn] if scenes else not_run,
        "scenes-clips": tables.scores(scenes, "scenes-clips") if scenes else not_run,
        "solv-ablation": tables.scores(scenes, "solv-ablation") if scenes else not_run,
        "davis-2016": tables.scores(davis, "davis-2016") if davis else not_run,
        "davis-2016-sequences": tables.sequences(davis) if davis else not_run,
        "davis-2017": tables.scores(davis, "davis-2017") if davis else not_run,
        "costs": tables.costs(files),
    }


def together(results: Sequence[tables.Results]) -> tables.Results:
    """Scores and evaluations of several files as those of one; empty if there are none."""
    return {key: [row for one in results for row in one[key]] for key in ("scores", "evaluations")} if results else {}


def with_tables(page: str, text: str, root: Path = ROOT, folder: Path = RESULTS) -> str:
    """The text of a page with its tables made anew.

    Raises:
        ValueError: if the page lacks a table, or has one that does not belong to it.
    """
    made = blocks(root, folder)
    names = tuple(name for _, name, _ in BLOCK.findall(text))
    if names != PAGES[page]:
        raise ValueError(f"{page} has the tables {names}, expected {PAGES[page]}, each between its markers")
    return BLOCK.sub(lambda match: f"{match[1]}\n" + "\n".join(made[match[2]]) + f"\n\n{match[3]}", text)
