"""Searches folders: which images are frames, a walk over all folders, and a line about files that are not read."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from interpreter.data.images import hidden, is_folder, is_regular, natural_key, normal

LABELS = 8  # kinds of files that `LeftOut` names in its line
# Picture formats that are not read; the error lists those that are.
_PICTURES = frozenset({".tif", ".tiff", ".exr", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".ppm", ".pgm"})
_PICTURES |= {".tga", ".jfif", ".hdr", ".dpx", ".cr2", ".nef", ".arw", ".psd"}


class Frames(NamedTuple):
    """The images of one folder, sorted by their names.

    Attributes:
        frames: the images of the numbered sequence, in its order.
        others: images that are not part of it.
        problem: why the images are not one video; empty if they are.
    """

    frames: list[Path]
    others: list[Path]
    problem: str = ""


def split_frames(images: Sequence[Path]) -> Frames:
    """Find the frames among the images of a folder: images whose names differ only in their numbers.

    A single image is a sequence of one frame. Case, suffix and leading zeros are ignored.

    >>> [path.name for path in split_frames([Path("cover.jpg"), Path("f10.png"), Path("f9.png")]).frames]
    ['f9.png', 'f10.png']
    """
    if len(images) < 2:
        return Frames(list(images), [])
    groups: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        groups[re.sub(r"\d+", "#", _stem(image).casefold())].append(image)
    sequences = [group for pattern, group in groups.items() if "#" in pattern and len(group) > 1]
    if not sequences:
        problem = f"holds {len(images)} images that are not numbered alike ({_shown(images)}); name frames 00000.jpg …"
        return Frames([], list(images), problem)
    if len(sequences) > 1:
        shown = ", ".join(f"{group[0].name} …" for group in sequences[:3])
        problem = f"holds {len(sequences)} sequences of images ({shown}); put each into a separate folder"
        return Frames(list(images), [], problem)
    frames = sorted(sequences[0], key=lambda path: (numbers(path), natural_key(path.name)))
    frame_set = set(frames)
    others = [image for image in images if image not in frame_set]
    for first, second in pairwise(frames):
        if numbers(first) == numbers(second):
            problem = f"holds the same frame twice ({first.name}, {second.name}); keep one of them, and masks elsewhere"
            return Frames(frames, others, problem)
    return Frames(frames, others)


def numbers(path: Path) -> tuple[int, ...]:
    """The numbers in the name of a file, without its suffix."""
    return tuple(int(digits) for digits in re.findall(r"\d+", _stem(path)))


def _stem(path: Path) -> str:
    return normal(path.stem)


def _shown(paths: Sequence[Path]) -> str:
    return ", ".join([path.name for path in paths[:2]] + ["…"] * (len(paths) > 2))


@dataclass
class LeftOut:
    """The files that are not read, by kind and reason. ``str`` returns one short line, empty if there are none."""

    groups: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, path: Path, label: str) -> None:
        """Add a path under a label in the singular. A label that begins with a space follows the file's suffix."""
        if label.startswith(" "):
            label = (path.suffix.lower() or "file without suffix") + label
        self.groups.setdefault(label.strip(), []).append(path)

    def __str__(self) -> str:
        """For example ``left out: 3 .jpg beside video files (clip0.jpg, clip1.jpg, …), 1 broken link (a.mp4)``."""
        if not self.groups:
            return ""
        ordered = sorted(self.groups.items(), key=lambda item: -len(item[1]))
        parts = [_counted(paths, label) for label, paths in ordered[:LABELS]]
        if rest := sum(len(paths) for _, paths in ordered[LABELS:]):
            parts.append(f"{rest} of other kinds")
        pictures = any(path.suffix.lower() in _PICTURES for paths in self.groups.values() for path in paths)
        advice = "; frames are read from jpg, jpeg, png, bmp and webp, convert the others" if pictures else ""
        return f"left out: {', '.join(parts)}{advice}"


def _counted(paths: Sequence[Path], label: str) -> str:
    if len(paths) > 1:
        label = re.sub(r"^(file|folder|link|broken link)\b", r"\1s", label)
    return f"{len(paths)} {label} ({_shown(paths)})"


@dataclass
class Folder:
    """The content of one folder, in natural order and without hidden names.

    Attributes:
        path: the folder.
        folders: its subfolders, links included. A walk does not enter the ones that you remove from the list.
        files: its files, links included.
        odd: broken links, and entries that are neither file nor folder.
    """

    path: Path
    folders: list[Path]
    files: list[Path]
    odd: list[Path]


def look(path: Path) -> Folder:
    """List a folder.

    Raises:
        OSError: if there is no such folder, or it cannot be read.
    """
    folder = Folder(path, [], [], [])
    with os.scandir(path) as entries:
        for entry in entries:
            if not hidden(entry.name):
                kind = folder.folders if is_folder(entry) else folder.files if is_regular(entry) else folder.odd
                kind.append(path / entry.name)
    for paths in (folder.folders, folder.files, folder.odd):
        paths.sort(key=lambda one: natural_key(one.name))
    return folder


def walk(top: Path, left_out: LeftOut, without: Sequence[Path] = ()) -> Iterator[Folder]:
    """Visit a folder and all folders below it, each once: first without following links, then the targets of links.

    Links to a folder above ``top`` are not followed, because they lead out of it.

    Args:
        top: the folder to begin with.
        left_out: receives the links that are not followed, the folders that cannot be read, and entries that are
            neither file nor folder.
        without: folders not to enter.

    Raises:
        OSError: if ``top`` cannot be read.
    """
    seen = {_identity(path) for path in (*top.resolve().parents, *without) if path.is_dir()}
    todo: list[Path] = [top]
    links: list[Path] = []
    while todo or links:
        path = todo.pop() if todo else links.pop(0)
        try:
            if (identity := _identity(path)) in seen:
                if path.is_symlink() and path not in without:
                    left_out.add(path, "link to a folder above or one that was read already")
                continue
            folder = look(path)
        except OSError:
            if path == top:
                raise
            left_out.add(path, "folder that cannot be read")
            continue
        seen.add(identity)
        yield folder
        for odd in folder.odd:
            left_out.add(odd, "broken link" if odd.is_symlink() else "neither file nor folder")
        links += [below for below in folder.folders if below.is_symlink()]
        todo += [below for below in reversed(folder.folders) if not below.is_symlink()]


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def listing(folder: Path) -> str:
    """The first eight names in a folder, for error messages."""
    if not folder.is_dir():
        return "nothing (no such folder)"
    content = look(folder)
    names = [path.name for path in (*content.folders, *content.files, *content.odd)]
    return ", ".join(names[:8] + ["…"] * (len(names) > 8)) or "nothing"


def folders(parent: Path) -> list[Path]:
    """The visible folders directly below ``parent``, by name; none if it does not exist."""
    return sorted(look(parent).folders) if parent.is_dir() else []


def locate(parent: Path, name: str) -> Path:
    """The path of a name below a folder, also if the disk stores accents as separate characters.

    Returns:
        The existing path. If there is none, ``parent / name``, so that errors name the requested path.
    """
    if name.isascii():
        return parent / name
    path = parent
    for part in Path(name).parts:
        below = path / part
        if path.is_dir() and not below.exists():
            below = next((other for other in path.iterdir() if normal(other.name) == normal(part)), below)
        path = below
    return path
