"""A run for the tab Training: its progress, its curves, and its pictures of masks."""

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interpreter.engine.records import read_records
from interpreter.engine.run import read_config
from interpreter.locks import is_taken
from interpreter.render import plot_curves

PICTURE = re.compile(r"(?P<stage>[a-z]+(-\d+)?)-(?P<step>\d+)\.png")


@dataclass(frozen=True)
class TrainingRun:
    """A run directory, to which a training may be writing.

    Attributes:
        id: its name in requests; never a path.
        run: the directory. It need not exist yet.
        folder: folder for the picture of the curves.
    """

    id: str
    run: Path
    folder: Path

    def describe(self) -> dict[str, Any]:
        """Its entry in the list of runs."""
        return {"id": self.id, "label": str(self.run), "training": self._is_training()}

    def show(self) -> dict[str, Any]:
        """The progress of each stage, and the addresses of the pictures."""
        config, records, stages = read_config(self.run), read_records(self.run), []
        for key, options in config.stages.items():
            last = next((record for record in reversed(records) if record["stage"] == key), None)
            written = _modified(self.run / key / "metrics.jsonl")
            stages.append(
                {
                    "name": key,
                    "step": last["step"] if last else 0,
                    "steps": options["optim"]["steps"],
                    "loss": last["loss"] if last and math.isfinite(last["loss"]) else None,
                    "seconds_ago": round(max(0.0, time.time() - written)) if last else None,
                }
            )
        base = f"/api/runs/{self.id}"
        pictures = [
            {
                "stage": match["stage"],
                "step": int(match["step"]),
                "url": f"{base}/pictures/{path.name}?{_modified(path)}",
            }
            for path in sorted(self.run.glob("samples/*.png"), key=_modified)
            if (match := PICTURE.fullmatch(path.name)) and self._is_picture(path)
        ]
        curves = f"{base}/curves.png?{self._newest()}" if records else None
        return {"training": self._is_training(), "stages": stages, "pictures": pictures, "curves": curves}

    def picture(self, name: str) -> Path:
        """A picture of masks. Raises FileNotFoundError for any other name."""
        path = self.run / "samples" / name
        if not PICTURE.fullmatch(name) or not self._is_picture(path):
            raise FileNotFoundError(f"no picture {name}")
        return path

    def curves(self) -> Path:
        """Curves of all records so far. Raises FileNotFoundError without records."""
        records, path = read_records(self.run), self.folder / f"{self.id}-curves.png"
        if not records:
            raise FileNotFoundError("nothing is recorded yet")
        if _modified(path) <= self._newest():
            plot_curves(records, path)
        return path

    @staticmethod
    def _is_picture(path: Path) -> bool:
        return path.is_file() and not path.is_symlink()

    def _newest(self) -> float:
        """Time of the last record."""
        return max(map(_modified, self.run.glob("*/metrics.jsonl")), default=0.0)

    def _is_training(self) -> bool:
        return is_taken(self.run / ".lock")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
