"""What a tab shows beside its clip: segments, and the corrections before and after them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from interpreter.app import corrections
from interpreter.app.corrections import Corrected, TokenKeeper
from interpreter.app.sources import Source
from interpreter.methods.base import Encoded, Segmenter
from interpreter.render import DISPLAY_PALETTE

SEED = 0  # as `segment`
UNDO = 30  # corrections that can be undone
NOT_TIED = "Each frame is segmented separately, so a number may stand for a different object in each frame."
HIGHER = " To correct objects through the whole video, choose a higher level."


class Edit(NamedTuple):
    """A correction that somebody asks for."""

    kind: str  # "merge", "split", "hide", "show", "name", "undo" or "redo"
    segments: list[int]  # their numbers
    name: str = ""
    frame: int = 0  # that the page shows, for "split"


@dataclass
class Encoding:
    """A clip as a method encoded it."""

    segmenter: Segmenter
    encoded: Encoded
    keeper: TokenKeeper


@dataclass
class Pane:
    """Segments that the page shows, and the corrections before and after them."""

    source: Source
    settings: dict[str, Any]
    controls: list[dict[str, Any]]
    encoding: Encoding
    shown: Corrected
    version: int  # another one after each change
    made: int = field(init=False)  # its first version
    before: list[Corrected] = field(default_factory=list)
    after: list[Corrected] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.made = self.version

    def describe(self) -> dict[str, Any]:
        """What the page knows of it."""
        shown, has_levels = self.shown, any(control["name"] == "level" for control in self.controls)
        listed = [
            {
                "id": id,
                "name": shown.names.get(id, ""),
                "hidden": id in shown.hidden,
                "area": area,
                "colour": "#" + bytes(DISPLAY_PALETTE[id - 1]).hex(),
            }
            for id, area in sorted(zip(shown.ids, shown.areas, strict=True))
        ]
        return {
            "source": self.source.id,
            "label": self.source.label,
            "version": self.version,
            "made": self.made,
            "settings": self.settings,
            "controls": self.controls,
            "segments": listed,
            "undo": bool(self.before),
            "redo": bool(self.after),
            "note": None if shown.segmentation.tied_over_time else NOT_TIED + (HIGHER if has_levels else ""),
        }

    def correct(self, edit: Edit, version: int) -> None:
        """Correct the segments; ValueError says why that cannot be done."""
        kind = edit.kind
        if kind in ("undo", "redo"):
            source, target = (self.before, self.after) if kind == "undo" else (self.after, self.before)
            if not source:
                raise ValueError(f"there is nothing to {kind}")
            target.append(self.shown)
            self.shown = source.pop()
        else:
            corrected = self._corrected(edit)
            self.before = [*self.before, self.shown][-UNDO:]
            self.shown, self.after = corrected, []
        self.version = version

    def _corrected(self, edit: Edit) -> Corrected:
        kind, ids, shown = edit.kind, edit.segments, self.shown
        if kind == "merge":
            return corrections.merge(shown, ids)
        if kind in ("hide", "show"):
            return corrections.show(shown, ids, kind == "show")
        if kind not in ("split", "name"):
            raise ValueError(f"no correction is called {kind!r}")
        if len(ids) != 1:
            raise ValueError(f"select one segment to {kind} it")
        if kind == "name":
            return corrections.name(shown, ids[0], edit.name)
        return corrections.split(shown, ids[0], self.encoding.keeper.tokens, edit.frame, SEED)
