"""Writes the report of profiling/common/parts.sh: REPORT.json and REPORT.md, both complete after each call.

It uses only the standard library, because a part may break any installed package.
"""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from profiling.common.revision import revision

LINES = 60  # of a part's output that are kept
TIMED_OUT = (124, 137)  # exit statuses of timeout(1)
KILLED = 137
RUNNING = "under way"
PACKAGES = ("torch", "triton", "numpy", "transformers", "geomloss", "pykeops", "nvtx", "scikit-learn", "av")


def begin(title: str, device: str) -> dict[str, Any]:
    """A report without parts."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    now = datetime.now(UTC)
    return {
        "what": f"report of {title}: which parts passed, how long they took and what they printed last",
        "command": title,
        "date": now.date().isoformat(),
        "title": title,
        "device": device,
        "versions": versions,
        "commit": revision(),
        "begun": now.isoformat(timespec="seconds"),
        "finished": False,
        "parts": [],
    }


def change(report: dict[str, Any], action: str, rest: Sequence[str]) -> None:
    """Apply one call to the report."""
    parts = report["parts"]
    if action == "start":
        parts.append({"name": rest[0], "limit": int(rest[1]), "fate": RUNNING})
    elif action == "end":
        # Files are named by their paths in the repository, not on this machine.
        text = Path(rest[3]).read_text(errors="replace").replace(f"{Path.cwd()}/", "")
        code, log = int(rest[1]), text.splitlines()
        (part,) = (part for part in parts if part["name"] == rest[0] and part["fate"] == RUNNING)
        timed_out = code in TIMED_OUT and int(rest[2]) >= part["limit"]
        fate = "passed" if code == 0 else "out of time" if timed_out else f"failed ({code})"
        if code == KILLED and not timed_out:
            fate = f"killed ({code}), perhaps for its memory"
        part |= {"fate": fate, "seconds": int(rest[2]), "output": log[-LINES:]}
    elif action == "skip":
        parts.append({"name": rest[0], "fate": "left out", "output": [rest[1]]})
    elif action == "finish":
        report["finished"] = True
    else:
        raise ValueError(f"unknown action {action!r}")


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    state = "" if report["finished"] else "\n**Not finished**: it is still running, or was killed.\n"
    lines = [
        f"# {report['title']}",
        "",
        f"{report['device']}; {versions}; commit {report['commit']}; begun {report['begun']}.",
        state,
        "| part | fate | seconds |",
        "|---|---|---|",
        *(f"| {part['name']} | {part['fate']} | {part.get('seconds', '')} |" for part in report["parts"]),
    ]
    for part in report["parts"]:
        # Indented, so that nothing in the output can end the block.
        lines += ["", f"## {part['name']}: {part['fate']}", "", *("    " + line for line in part.get("output", ()))]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Replace a file in one step, so that it is never incomplete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> None:
    """``python -m profiling.common.parts ACTION REPORT …``, as parts.sh calls it."""
    action, path, *rest = sys.argv[1:]
    file = Path(f"{path}.json")
    if action == "begin":
        report = begin(*rest)
    else:
        report = json.loads(file.read_text())
        change(report, action, rest)
    write(file, json.dumps(report, indent=1) + "\n")
    write(Path(f"{path}.md"), markdown(report))


if __name__ == "__main__":
    main()
