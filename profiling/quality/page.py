"""docs/results.md: its tables stand between markers and are made of profiling/results; the prose is written by hand."""

import json
import re
from pathlib import Path

from profiling.common.paths import RESULTS
from profiling.quality import tables

PAGE = "docs/results.md"
SCENES, DAVIS = "scenes.json", "davis.json"
PICTURE = "docs/results-scenes.png"
BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def blocks(folder: Path = RESULTS) -> dict[str, tables.Lines]:
    """The lines of every table, by name."""
    files = {name: json.loads((folder / name).read_text()) for name in (SCENES, DAVIS) if (folder / name).exists()}
    scenes, davis = files.get(SCENES), files.get(DAVIS)
    not_run = [tables.NOT_RUN]
    return {
        "scenes": tables.scores(scenes, "scenes") if scenes else not_run,
        "davis-2016": tables.scores(davis, "davis-2016") if davis else not_run,
        "davis-2016-sequences": tables.sequences(davis) if davis else not_run,
        "davis-2017": tables.scores(davis, "davis-2017") if davis else not_run,
        "costs": tables.costs(files),
    }


def with_tables(text: str, folder: Path = RESULTS) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: if the page lacks a table, or has one that does not exist.
    """
    made = blocks(folder)
    names = [name for _, name, _ in BLOCK.findall(text)]
    if sorted(names) != sorted(made):
        raise ValueError(f"{PAGE} has the tables {', '.join(names)}; it needs each of {', '.join(made)} once")
    return BLOCK.sub(lambda match: f"{match[1]}\n" + "\n".join(made[match[2]]) + f"\n\n{match[3]}", text)
