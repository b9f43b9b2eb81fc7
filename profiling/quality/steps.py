"""Steps of a plan: commands that write one folder. Each is run once, and its time is recorded."""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from subprocess import Popen, TimeoutExpired
from typing import Any, Literal

from profiling.common.revision import revision

Kind = Literal["train", "evaluate", "strips"]
RECORD = "record.json"
NOTED_EVERY = 10.0  # seconds; a kill loses at most that much of the time that is recorded


@dataclass(frozen=True)
class Command:
    """A module with its arguments.

    Attributes:
        title: what it does, such as "image stage".
        arguments: what follows ``python -m``.
    """

    title: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"python -m {shlex.join(self.arguments)}"

    @property
    def portable(self) -> str:
        """The command with the names of files and directories in place of their absolute paths."""
        return str(Command(self.title, tuple(Path(a).name if Path(a).is_absolute() else a for a in self.arguments)))


@dataclass(frozen=True)
class Step:
    """Commands that write one folder together.

    Attributes:
        kind: what they do.
        method: title of the method, as the page's tables name it.
        seed: of the training; of a step that belongs to no training, the one that it is run with.
        folder: what they write to; no other step does.
        commands: run in this order; an interrupted one is run again, and resumes by itself.
        needs: steps that come first. If one of them is run again, so is this one.
        table: the page's table that an evaluation belongs to.
        size: height and width of the frames before the backbone.
    """

    kind: Kind
    method: str
    seed: int
    folder: Path
    commands: tuple[Command, ...]
    needs: tuple["Step", ...] = ()
    table: str = ""
    size: tuple[int, int] | None = None

    def read(self) -> dict[str, Any]:
        """What is recorded of it; empty if it was never run."""
        path = self.folder / RECORD
        return json.loads(path.read_text()) if path.is_file() else {}

    def _fits(self, record: dict[str, Any]) -> bool:
        """Whether a record is of these commands, on what the needed steps made."""
        commands = [list(command.arguments) for command in self.commands]
        return [entry["arguments"] for entry in record.get("commands", [])] == commands and record["needs"] == [
            step.read().get("finished") for step in self.needs
        ]

    @property
    def done(self) -> bool:
        """Whether it was run to its end, with these commands, on what the needed steps made."""
        record = self.read()
        return self._fits(record) and record["finished"] is not None

    def run(self) -> None:
        """Run what is left of it; from nothing, if its folder was written by other commands.

        Raises:
            SystemExit: if a command fails, or the folder is not from here.
        """
        record = self.read()
        if not self._fits(record):
            if not record and self.folder.exists():
                sys.exit(
                    f"{self.folder} exists, but this command did not write it: move it away, or give another --out"
                )
            shutil.rmtree(self.folder, ignore_errors=True)
            begun = {"seconds": 0.0, "cpu_seconds": 0.0, "done": False}
            entries = [
                {"title": c.title, "arguments": list(c.arguments), "command": c.portable, **begun}
                for c in self.commands
            ]
            needs = [step.read()["finished"] for step in self.needs]
            record = {"needs": needs, "finished": None, "commands": entries}
        for command, entry in zip(self.commands, record["commands"], strict=True):
            if not entry["done"]:
                print(f"== {command}", flush=True)
                self._run(command, entry, record)
        record["finished"] = datetime.now().isoformat(timespec="microseconds")
        self._write(record)

    def _run(self, command: Command, entry: dict[str, Any], record: dict[str, Any]) -> None:
        begun, before = time.monotonic(), entry["seconds"]
        entry["commit"] = revision()

        def note() -> None:
            entry["seconds"] = round(before + time.monotonic() - begun, 1)
            self._write(record)

        note()
        cpu = _cpu_of_children()
        process = Popen([sys.executable, "-m", *command.arguments])
        try:
            while True:
                try:
                    process.wait(NOTED_EVERY)
                    break
                except TimeoutExpired:
                    note()
        except KeyboardInterrupt:  # the command also gets the signal, saves its state and ends
            process.wait()
            raise
        finally:
            entry["cpu_seconds"] = round(entry["cpu_seconds"] + _cpu_of_children() - cpu, 1)
            note()
        if process.returncode:
            sys.exit(f"exit status {process.returncode}: {command}")
        entry["done"] = True
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{RECORD}.tmp"
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(self.folder / RECORD)


def _cpu_of_children() -> float:
    """Seconds that all cores spent on commands that have ended; a busy machine changes them little."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def forget(steps: Sequence[Step], kinds: Sequence[Kind]) -> None:
    """Delete what steps of some kinds wrote, so that these are run again, and all steps that need them."""
    for step in steps:
        if step.kind in kinds:
            shutil.rmtree(step.folder, ignore_errors=True)
