"""Trackers send records and pictures of a training to other programs, one small class for each ``--log-to``.

Each tracker is a module of this folder with the tracker's name and a class ``TRACKER``. It is imported only if it is
used.
"""

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from interpreter.console import console
from interpreter.files import read_text, write_text
from interpreter.versions import require_package


class Tracker(Protocol):
    """The interface of a tracker. Its class gets a :class:`TrackedStage`, and may raise any exception of its package.

    Attributes:
        last_step: the last step that it has when it is opened; -1 if it has none. It gets only later steps.
        whole: whether it has all steps before this process. Set after it got them.
    """

    last_step: int
    whole: bool

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log one record, with the names of metrics.jsonl."""

    def picture(self, step: int, image: np.ndarray) -> None:
        """Log one picture grid, uint8 [H, W, 3]."""

    def close(self, failed: bool) -> None:
        """Write remaining records. ``failed``: whether an error ended the training."""


@dataclass(frozen=True)
class TrackedStage:
    """The stage whose training is tracked.

    Attributes:
        directory: RUN/STAGE.
        step: step that training starts or resumes from.
        options: all options of the stage (nested ones as ``optim.peak_lr``), with method, stage and version of the
            code.
    """

    directory: Path
    step: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.directory.parent

    @property
    def name(self) -> str:
        """The stage's key, such as ``image`` or ``video-3``."""
        return self.directory.name

    def read_id(self, tracker: str) -> str | None:
        """What a tracker stored about this stage, such as its id there; None if it did not track this stage before.

        Raises:
            ValueError: if the file of ids is damaged; says what to do.
        """
        return self._ids().get(tracker)

    def write_id(self, tracker: str, number: str) -> None:
        """Store what a tracker needs about this stage, for processes that resume it."""
        write_text(self._file, json.dumps({**self._ids(), tracker: number}, indent=2) + "\n")

    @property
    def _file(self) -> Path:
        return self.directory / "trackers.json"

    def _ids(self) -> dict[str, str]:
        if not self._file.exists():
            return {}
        try:
            return dict(json.loads(read_text(self._file)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{self._file} is damaged ({error}); delete it, and the trackers get this stage as a new run"
            ) from error


class Trackers:
    """All trackers of a stage. If one fails during training, a message is printed once, and it is no longer used.

    Args:
        names: names of the trackers.
        stage: the stage that is tracked.

    Raises:
        ValueError: if a tracker cannot be started; gives the reason.
    """

    def __init__(self, names: Sequence[str], stage: TrackedStage) -> None:
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            try:
                self._open[name] = import_module(f"{__name__}.{name}").TRACKER(stage)
            except Exception as error:  # each package has other exceptions
                self.close(failed=True)
                raise ValueError(
                    f"--log-to {name} cannot be started: {_one_line(error)}. Mend that, or leave {name} out of --log-to"
                ) from error

    def replay(self, records: Iterable[Mapping[str, Any]], pictures: Mapping[int, Path]) -> None:
        """Send each tracker the earlier records that it does not have, in the order of the steps.

        Args:
            records: lines of metrics.jsonl.
            pictures: files of picture grids by step.
        """
        events: list[tuple[int, Mapping[str, Any] | Path]] = [(record["step"], record) for record in records]
        for step, event in sorted([*events, *pictures.items()], key=lambda item: item[0]):
            if any(step > tracker.last_step for tracker in self._open.values()):
                self._replay(step, event)
        for tracker in self._open.values():
            tracker.whole = True

    def _replay(self, step: int, event: Mapping[str, Any] | Path) -> None:
        if isinstance(event, Path):
            image = _read_picture(event)
            if image is not None:
                self._each(lambda tracker: tracker.picture(step, image), step)
        else:
            values = {name: value for name, value in event.items() if name not in ("stage", "step")}
            self._each(lambda tracker: tracker.scalars(step, values), step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :meth:`Tracker.scalars`."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def picture(self, step: int, image: np.ndarray) -> None:
        """See :meth:`Tracker.picture`."""
        self._each(lambda tracker: tracker.picture(step, image))

    def close(self, failed: bool) -> None:
        """See :meth:`Tracker.close`."""
        self._each(lambda tracker: tracker.close(failed))
        self._open.clear()

    def _each(self, call: Callable[[Tracker], None], missing: int | None = None) -> None:
        """Call all trackers, or those that do not have the step ``missing``."""
        for name, tracker in list(self._open.items()):
            if missing is not None and missing <= tracker.last_step:
                continue
            try:
                call(tracker)
            except Exception as error:  # a server that fails must not end days of training
                del self._open[name]
                _warn(
                    f"{name} failed and is left out from now on: {_one_line(error)}. Training continues, and "
                    f"metrics.jsonl has all records"
                )


def require_trackers(names: Sequence[str]) -> None:
    """Raise an error for trackers whose package is not installed. Nothing is imported.

    Raises:
        ValueError: if a package is missing; names the command that installs it.
    """
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # no file: a folder of this name, such as W&B's ./wandb
            raise ValueError(
                f"--log-to {name} needs the package {name}: pip install {name}, or leave {name} out of --log-to"
            )
        require_package(name)


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as one dictionary.

    >>> flat({"run": "runs/mine", "optim": {"steps": 10, "seed": 0}})
    {'run': 'runs/mine', 'optim.steps': 10, 'optim.seed': 0}
    """
    result: dict[str, Any] = {}
    for name, value in options.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


def _read_picture(path: Path) -> np.ndarray | None:
    """A picture grid uint8 [H, W, 3]; None if the file is damaged, which is reported."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises each of them for some damage
        _warn(f"{path} is damaged, and the trackers do not get it: {_one_line(error)}")
        return None


def _warn(text: str) -> None:
    console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _one_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return textwrap.shorten(text.splitlines()[0], 300, placeholder=" …").rstrip(".")
