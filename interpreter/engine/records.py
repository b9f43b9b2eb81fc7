"""Records of a training run: metrics.jsonl, sample pictures, the progress bar, and the trackers of ``--log-to``."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from interpreter.console import console, progress_bar
from interpreter.engine.trackers import TrackedStage, Trackers
from interpreter.files import read_text, write_text, written_whole
from interpreter.render import plot_curves


def truncate_records(path: Path, step: int) -> None:
    """Drop records after ``step``, which were written by a process that ended before its next checkpoint."""
    if path.exists():
        write_text(path, "".join(line + "\n" for line, record in _records(path) if record["step"] <= step))


def read_records(run: Path) -> list[dict[str, Any]]:
    """Records of all stages of a run."""
    return [record for path in sorted(run.glob("*/metrics.jsonl")) for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a file and their records, without a last line that was not written completely."""
    for line in read_text(path).splitlines():
        with suppress(json.JSONDecodeError):
            yield line, json.loads(line)


class RunLog:
    """Log of one stage; a context manager.

    Args:
        directory: RUN/STAGE, for metrics.jsonl. Picture grids go to RUN/samples, curves of all stages to
            RUN/curves.png.
        step: step that training resumes from; later records of an earlier process are dropped.
        steps: last step.
        frames_per_step: number of frames in a step, for the rate in the progress bar.
        log_to: names of the trackers.
        options: options of the stage, which trackers record (:class:`TrackedStage`).

    Raises:
        ValueError: if a tracker cannot be started.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        steps: int,
        frames_per_step: int,
        log_to: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.stage, self.directory = directory.name, directory
        self.frames_per_step, self.first = frames_per_step, step
        directory.mkdir(parents=True, exist_ok=True)
        metrics = directory / "metrics.jsonl"
        truncate_records(metrics, step)
        self.trackers = Trackers(log_to, TrackedStage(directory, step, options or {}))
        try:
            earlier = _records(metrics) if metrics.exists() else ()
            self.trackers.replay((record for _, record in earlier), self._pictures(step))
            self.file = metrics.open("a", encoding="utf-8")
        except BaseException:
            self.trackers.close(failed=True)
            raise
        self.progress = progress_bar("steps")
        self.bar = self.progress.add_task(f"{self.stage} stage", total=steps, completed=step, status="")
        self.loss: float | None = None  # until the first record
        self.started, self.waited = time.perf_counter(), 0.0

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        self.file.close()
        self.trackers.close(failed=error[0] is not None)
        records = read_records(self.directory.parent)
        if records:
            plot_curves(records, self.directory.parent / "curves.png")

    def advance(self, step: int, waited: float) -> None:
        """Move the progress bar; ``waited`` is the seconds that the step waited for its batch."""
        elapsed = time.perf_counter() - self.started
        self.waited += waited
        rate = (step - self.first) / elapsed
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        status = (
            f"{loss}{rate:.1f} steps/s  {rate * self.frames_per_step:.0f} frames/s  "
            f"batch {self.waited / elapsed:.0%}  {memory()}"
        )
        self.progress.update(self.bar, completed=step, status=status)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write one record. If there is no terminal, also print a line of text."""
        self.loss = values["loss"]
        record = {"stage": self.stage, "step": step, **values}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.trackers.scalars(step, values)
        if not console.is_terminal:
            console.print(f"{self.stage} step {step} " + " ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def picture(self, step: int, image: np.ndarray) -> None:
        """Save a picture grid uint8 [H, W, 3]."""
        with written_whole(self._picture(step)) as temporary:
            Image.fromarray(image).save(temporary, format="png")
        self.trackers.picture(step, image)

    def has_picture(self, step: int) -> bool:
        """Whether :meth:`picture` saved a picture grid for this step."""
        return self._picture(step).exists()

    def _pictures(self, last: int) -> dict[int, Path]:
        """Picture grids of this stage up to a step."""
        names = re.compile(rf"{re.escape(self.stage)}-(\d+)\.png")
        found = ((names.fullmatch(path.name), path) for path in self._picture(0).parent.glob("*.png"))
        return {int(match[1]): path for match, path in found if match and int(match[1]) <= last}

    def _picture(self, step: int) -> Path:
        return self.directory.parent / "samples" / f"{self.stage}-{step:06d}.png"


class NoLog:
    """The log of all processes but the first: it writes nothing."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, step: int, waited: float) -> None:
        """See :meth:`RunLog.advance`."""

    def record(self, step: int, values: dict[str, float]) -> None:
        """See :meth:`RunLog.record`."""

    def has_picture(self, step: int) -> bool:
        """See :meth:`RunLog.has_picture`."""
        return True


def memory() -> str:
    """Memory in use: of the GPU if there is one, else resident."""
    used = torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
    return f"{used / 2**30:.1f} GB"
