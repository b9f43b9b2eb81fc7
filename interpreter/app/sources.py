"""Sources: the runs that the command names and the methods without training, with their sliders."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from interpreter.configs import BackboneConfig
from interpreter.engine.checkpoint import newest_step
from interpreter.engine.run import check_ranges, read_config
from interpreter.hub.names import run_name
from interpreter.method_options import choose_method
from interpreter.methods import METHODS
from interpreter.methods.base import Method, Segmenter
from interpreter.methods.runs import open_segmenter

OPENED = 2  # segmenters that are kept
MOST_SEGMENTS = 30  # of the sliders


@dataclass(frozen=True)
class Source:
    """A run, or a method without training.

    Attributes:
        id: its name in requests; never a path.
        label: its name on the page.
        method: name of a method without training; None for a run.
        run: directory of the run.
    """

    id: str
    label: str
    method: str | None = None
    run: Path | None = None

    def describe(self) -> dict[str, Any]:
        """Its data for the page."""
        chosen = choose_method(self.method, self.run)
        method = chosen.method
        detail = (
            method.summary
            if self.run is None
            else f"method {method.name}, trained stages: {', '.join(chosen.stored.stages)}"
        )
        return {"id": self.id, "label": self.label, "method": method.name, "detail": detail}


class Choice(NamedTuple):
    """A source with settings."""

    source: Source
    first: dict[str, Any]  # settings that the segmenter is opened with
    settings: dict[str, Any]  # settings of its method ``segment``
    key: tuple[Any, ...]  # equal for equal weights and equal opening settings


class Sources:
    """All sources of a server. The most recently used segmenters stay open.

    Args:
        runs: directories of runs.
        backbone: backbone of methods without training.
    """

    def __init__(self, runs: Sequence[Path], backbone: BackboneConfig) -> None:
        numbered = {f"run-{number}": run for number, run in enumerate(runs)}
        self.runs = {id: Source(id, run_name(run), run=run) for id, run in numbered.items()}
        self.untrained = {
            name: Source(name, f"{name} (no training)", method=name) for name, m in METHODS.items() if not m.stages
        }
        self._backbone = backbone
        self._lock = threading.Lock()
        self._opened: OrderedDict[tuple[Any, ...], Segmenter] = OrderedDict()

    def usable(self) -> list[Source]:
        """The sources that can segment now. Runs without training or with damaged files are left out."""
        ready = []
        for source in self.runs.values():
            with suppress(ValueError, OSError):
                if _checkpoints(source.run):
                    ready.append(source)
        return ready + list(self.untrained.values())

    def __getitem__(self, id: str) -> Source:
        """The source of an id. Raises ValueError if it does not exist."""
        for source in self.usable():
            if source.id == id:
                return source
        raise ValueError(f"there is no run or method {id!r} here; reload the page")

    def choose(self, source: Source, settings: Mapping[str, Any]) -> Choice:
        """The settings of the page for a source.

        Settings whose slider is hidden by other settings are left out, such as the number of slots at level 1.

        Raises:
            ValueError: if a setting is unknown, or its value is not on its slider.
        """
        method, stored = choose_method(source.method, source.run)
        given = checked(controls(method, stored.stages, None, settings), settings)
        first = {name: given.pop(name) for name in sorted(_slow(method) & given.keys())}
        return Choice(source, first, given, (source.id, tuple(first.items()), _checkpoints(source.run)))

    def opening(self, choice: Choice) -> str:
        """A message about what :meth:`open` is doing."""
        name = self._backbone.backbone
        is_on_hub = choice.source.run is None and "/" in name and not Path(name).exists()
        return "opening the model (the first time, it is downloaded)" if is_on_hub else "opening the model"

    def open(self, choice: Choice) -> Segmenter:
        """A segmenter. Raises ValueError or OSError as :func:`open_segmenter` does."""
        with self._lock:
            if choice.key not in self._opened:
                method, stored = choose_method(choice.source.method, choice.source.run)
                has_backbone = any(field.name == "backbone" for field in dataclasses.fields(method.settings))
                values = method.settings(**choice.first, **({"backbone": self._backbone} if has_backbone else {}))
                check_ranges(values)
                self._opened[choice.key] = open_segmenter(method, choice.source.run, values, stored=stored)
                if len(self._opened) > OPENED:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(choice.key)
            return self._opened[choice.key]

    def controls(self, choice: Choice, segmenter: Segmenter) -> list[dict[str, Any]]:
        """The sliders for a result with these settings."""
        method, stored = choose_method(choice.source.method, choice.source.run)
        return controls(method, stored.stages, segmenter, choice.first | choice.settings)


NAMES = {"association", "levels", "level", "num_segments", "num_slots", "merge_threshold"}
"""All settings that have a slider or a choice for some method."""


def controls(
    method: Method, stages: Mapping[str, Any], segmenter: Segmenter | None, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The sliders and choices of a method whose ``stages`` are trained, as the page shows them.

    Only the settings that are useful on the page, by their names in the methods.
    """
    value, result = settings.get, []
    fields = {field.name for field in dataclasses.fields(method.settings)}
    learned = value("association") == "learned"
    if "association" in fields and "video" in stages:
        result.append(
            _choice("association", "Grouping over time", value("association"), "features",
                    {"features": "by similarity of features", "learned": "by the trained video stage"},
                    "How the parts of each frame become segments of the video.")
        )  # fmt: skip
    top = max([int(key.removeprefix("video-")) for key in stages if key.startswith("video-")], default=2)
    levels = _one_of(value("levels"), 2, top) or 2
    if "levels" in fields and top > 2:
        result.append(
            _choice("levels", "Levels", value("levels"), 2, {n: str(n) for n in range(2, top + 1)},
                    "Levels of the hierarchy; above 2, trained stages group windows of the video.")
        )  # fmt: skip
    level = _one_of(value("level"), 1, levels) or levels
    if "level" in fields:
        words = {1: "1, parts of each frame", levels: f"{levels}, objects of the video"}
        result.append(
            _choice("level", "Level", value("level"), levels, {n: words.get(n, str(n)) for n in range(1, levels + 1)},
                    "Shows parts of single frames, or objects of the whole video.")
        )  # fmt: skip
    for name in ("num_segments", "num_slots"):
        if name in fields and level == levels:
            default = None if segmenter is None else segmenter.num_segments
            slots = name == "num_slots" and (learned or "association" not in fields)
            label, help = "Number of segments", "Fewer segments are larger."
            if slots:
                label, help = "Number of slots", "The model's candidates for objects; similar ones are merged."
            result.append(_range(name, label, value(name), default, 1, MOST_SEGMENTS, 1, help))
    merges = "merge_threshold" in fields and level == levels
    if merges and ("association" not in fields or learned or levels > 2):
        result.append(_range("merge_threshold", "Merge threshold", value("merge_threshold"), None, 0, 1, 0.01,
                             "Slots that are closer than this are merged; higher gives fewer segments."))  # fmt: skip
    return [control | {"slow": control["name"] in _slow(method)} for control in result]


def _slow(method: Method) -> set[str]:
    """Settings that a segmenter is opened with. Changing them encodes the video again."""
    return {field.name for field in dataclasses.fields(method.settings) if field.metadata.get("encodes")}


def checked(shown: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with a slider or a choice that differ from their default. Raises ValueError if a value is not on its
    slider or among its choices."""
    if unknown := settings.keys() - NAMES:
        raise ValueError(f"no setting is called {', '.join(map(repr, sorted(unknown)))}")
    result = {}
    for control in shown:
        name, value = control["name"], settings.get(control["name"])
        if value is None:
            continue
        if control["kind"] == "choice":
            fits = value in [choice["value"] for choice in control["choices"]]
        else:
            fits = isinstance(value, int | float) and control["min"] <= value <= control["max"]
        if not fits or isinstance(value, bool):
            raise ValueError(f"{control['label']}: {value!r} is not among its values")
        result[name] = int(value) if control["step"] == 1 else value
    return result


def _one_of(value: Any, low: int, high: int) -> int | None:
    """The value if it is one of these whole numbers. For other values, :func:`checked` raises the error."""
    return int(value) if isinstance(value, int | float) and value in range(low, high + 1) else None


def _range(
    name: str, label: str, value: Any, default: Any, low: float, high: float, step: float, help: str
) -> dict[str, Any]:
    return {"name": name, "label": label, "kind": "range", "value": value, "default": default, "min": low, "max": high,
            "step": step, "choices": [], "help": help}  # fmt: skip


def _choice(name: str, label: str, value: Any, default: Any, choices: Mapping[Any, str], help: str) -> dict[str, Any]:
    listed = [{"value": choice, "label": text} for choice, text in choices.items()]
    return {"name": name, "label": label, "kind": "choice", "value": value, "default": default, "min": None,
            "max": None, "step": None, "choices": listed, "help": help}  # fmt: skip


def _checkpoints(run: Path | None) -> tuple[tuple[str, int], ...]:
    """The newest checkpoint of each stage. With other weights, a new segmenter is opened."""
    if run is None:
        return ()
    steps = ((key, newest_step(run / key)) for key in read_config(run).stages)
    return tuple((key, step) for key, step in steps if step)
