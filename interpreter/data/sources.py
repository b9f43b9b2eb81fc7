"""What every reader of a published layout returns: where each video is, and how to open it with its masks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from interpreter.data.annotations import Annotation
from interpreter.data.video import Video


@dataclass(frozen=True)
class Source:
    """One video of a data set, not opened yet.

    Attributes:
        name: what to call it; unique in the data set.
        path: its file or folder, for messages.
        open: opens it, with its masks or None; raises `VideoError` or `OSError` if it is damaged or missing.
        files: its frames, if they are files that can be looked at one by one.
        id: what the release's own index calls it, if that is not the name.
    """

    name: str
    path: Path
    open: Callable[[], tuple[Video, Annotation | None]]
    files: Sequence[Path] = ()
    id: int | str | None = None


def listing(folder: Path, limit: int = 8) -> str:
    """Names in a folder, for error messages."""
    if not folder.is_dir():
        return "nothing (no such folder)"
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    return ", ".join(names[:limit] + ["…"] * (len(names) > limit)) or "nothing"


def folders(parent: Path) -> list[Path]:
    """The visible folders directly below ``parent``, by name; none if it does not exist."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))
