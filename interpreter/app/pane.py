"""The segments that a tab shows, with corrections that can be undone and redone."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from interpreter.app import corrections
from interpreter.app.corrections import Corrected, TokenKeeper
from interpreter.app.sources import Source
from interpreter.methods.base import Encoded, Segmenter
from interpreter.render import DISPLAY_PALETTE

SEED = 0  # the default of `segment`
UNDO, UNDO_BYTES = 30, 256 * 10**6  # at most this many corrections, with masks of at most so many bytes
NOT_TIED = "Each frame is segmented separately, so a number may stand for a different object in each frame."
HIGHER = " To correct objects through the whole video, choose a higher level."


class Edit(NamedTuple):
    """A correction that a user requests."""

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
    """Segments that the page shows, and corrections to undo and redo."""

    source: Source
    settings: dict[str, Any]
    controls: list[dict[str, Any]]
    encoding: Encoding
    shown: Corrected
    version: int  # changes after each correction
    made: int = field(init=False)  # its first version
    before: list[Corrected] = field(default_factory=list)
    after: list[Corrected] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.made = self.version

    def describe(self) -> dict[str, Any]:
        """Its data for the page."""
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

    def corrected(self, edit: Edit) -> Corrected:
        """The segments after a correction. Raises ValueError if the correction is impossible."""
        if edit.kind not in ("undo", "redo"):
            return self._corrected(edit)
        earlier = self.before if edit.kind == "undo" else self.after
        if not earlier:
            raise ValueError(f"there is nothing to {edit.kind}")
        return earlier[-1]

    def take(self, edit: Edit, after: Corrected, version: int) -> None:
        """Show the segments after a correction."""
        if edit.kind == "undo":
            self.before.pop()
            self.after.append(self.shown)
        elif edit.kind == "redo":
            self.after.pop()
            self.before.append(self.shown)
        else:
            self.before, self.after = [*self.before, self.shown][-UNDO:], []
            while len(self.before) > 1 and _bytes_of(self.before) > UNDO_BYTES:
                self.before.pop(0)
        self.shown = after
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
        if not 0 <= edit.frame < len(shown.segmentation):
            raise ValueError(f"frame: {edit.frame} is not a frame of the clip")
        return corrections.split(shown, ids[0], self.encoding.keeper.tokens, edit.frame, SEED)


def _bytes_of(corrections: list[Corrected]) -> int:
    """Memory of the masks. Corrections that only name or hide segments share their masks."""
    tensors = [t for c in corrections for t in (c.segmentation.attention, c.segmentation.across) if t is not None]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
