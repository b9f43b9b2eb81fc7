"""A tab of a browser: its clip, the segments, one task at a time, and its own folder."""

import itertools
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from interpreter.app import corrections
from interpreter.app.clip import Clip, WatchedVideo
from interpreter.app.corrections import TokenKeeper
from interpreter.app.downloads import FORMATS, Format, write_download
from interpreter.app.matching import overlaps, renumbered
from interpreter.app.pane import SEED, Edit, Encoding, Pane
from interpreter.app.sources import Choice, Source, Sources
from interpreter.app.work import Kind, Task, WorkQueue, explain
from interpreter.metrics.ari import adjusted_rand_index

KEPT_ENCODINGS = 2  # encoded clips that a tab keeps besides the shown ones, to return to a setting quickly
DOWNLOADS = {"png": "PNG masks", "rle": "RLE", "cutout": "cut-out", "overlay": "overlay"}


_numbers = itertools.count(secrets.randbelow(1 << 40))


def number() -> int:
    """A number that was not used before, also by an earlier server, because browsers cache pictures by it."""
    return next(_numbers)


class Gone(ValueError):
    """The tab or file of a request no longer exists."""


class Shared:
    """Shared by all tabs: the sources, and two worker threads.

    Args:
        folder: of the server.
        sources: runs and methods that can segment.
    """

    def __init__(self, folder: Path, sources: Sources) -> None:
        self.folder, self.sources = folder, sources
        self.long, self.short = WorkQueue("long work"), WorkQueue("short work")
        # One label map or correction at a time, because each uses all cores.
        self.drawing, self.correcting = threading.Lock(), threading.Lock()

    def shortened(self, text: str) -> str:
        """The message of an error, without the path of the tab's folder."""
        return " ".join(re.sub(rf"{re.escape(str(self.folder))}/[0-9a-f]+/(clip-\d+/)?", "", text).split())


class Session:
    """One tab.

    Args:
        token: its secret name in requests.
        folder: folder for its clip and its downloads.
        shared: data that all tabs share.
    """

    def __init__(self, token: str, folder: Path, shared: "Shared") -> None:
        self.token, self.folder, self.shared = token, folder, shared
        self.clip: Clip | None = None
        self.task: Task | None = None
        self.error: dict[str, Any] | None = None
        self.panes: dict[str, Pane | None] = dict.fromkeys(("main", "left", "right"))
        self.agreement: float | None = None
        self.downloads: dict[str, dict[str, Any]] = {}
        self.connections, self.left = 0, time.monotonic()  # open event streams, and since when there is none
        self.closed = False
        self._encodings: dict[tuple[Any, ...], Encoding] = {}
        self._lock = threading.RLock()

    # -- the clip

    @contextmanager
    def uploading(self) -> Iterator[Path]:
        """A new folder for an upload. It is removed unless its clip is used afterwards."""
        folder = self.folder / f"clip-{number()}"
        folder.mkdir()
        try:
            yield folder
        finally:
            if self.clip is None or self.clip.path.parent != folder:
                shutil.rmtree(folder, ignore_errors=True)

    def use(self, clip: Clip) -> None:
        """Show another clip, and remove everything of the earlier one."""
        with self._lock:
            if self.closed:
                raise Gone("this page was closed")
            self.remove_clip()
            self.clip = clip

    def remove_clip(self) -> None:
        """Stop the work on the clip, and remove the clip and all its results."""
        with self._lock:
            self.cancel()
            if self.clip is not None:
                shutil.rmtree(self.clip.path.parent, ignore_errors=True)
            self.clip, self.error, self.agreement = None, None, None
            self.panes = dict.fromkeys(self.panes)
            self._encodings.clear()
            self._forget_downloads()

    def require_clip(self) -> Clip:
        """The clip. Raises ValueError without a clip."""
        if self.clip is None:
            raise ValueError("there is no clip yet: choose a video first")
        return self.clip

    def require_pane(self, name: str) -> Pane:
        """A pane with segments. Raises ValueError if it is empty."""
        pane = self.panes.get(name)
        if pane is None:
            raise Gone("there are no segments yet: segment the clip first")
        return pane

    # -- long work

    def segment(self, source: Source, settings: Mapping[str, Any]) -> None:
        """Segment the clip for the tab Segment."""
        clip, choice = self.require_clip(), self.shared.sources.choose(source, settings)

        def run(task: Task) -> None:
            pane = self._segmented(task, clip, choice)
            with self._lock:
                if not task.cancelled:
                    self._show({"main": pane})

        queue = self.shared.short if choice.key in self._encodings else self.shared.long
        self._start(queue, "segment", f"segments of {clip.path.name}", run)

    def compare(self, left: Source, right: Source) -> None:
        """Segment the clip with two sources for the tab Compare. The right one gets the numbers of the left one."""
        clip, choices = self.require_clip(), [self.shared.sources.choose(source, {}) for source in (left, right)]

        def run(task: Task) -> None:
            panes = [self._segmented(task, clip, choice) for choice in choices]
            task.begin("comparing")
            first, second = (pane.shown for pane in panes)
            table = overlaps(first, second)
            agreement = adjusted_rand_index(table)
            panes[1].shown = renumbered(second, first, table)
            with self._lock:
                if not task.cancelled:
                    self.agreement = agreement
                    self._show({"left": panes[0], "right": panes[1]})

        self._start(self.shared.long, "compare", f"comparison of {clip.path.name}", run)

    def download(self, format: Format, opacity: float) -> None:
        """Write a file of the segments of the tab Segment."""
        if format not in FORMATS:
            raise ValueError(f"format {format!r}: choose from {', '.join(FORMATS)}")
        if not 0 <= opacity <= 1:  # also refuses NaN
            raise ValueError(f"opacity {opacity}: must be between 0 and 1")
        clip, pane = self.require_clip(), self.require_pane("main")
        shown, folder = pane.shown, clip.path.parent / f"{format}-{number()}"

        def run(task: Task) -> None:
            task.begin("writing frames", clip.video.num_frames)
            folder.mkdir()  # raises an error if the clip was removed
            path = write_download(format, folder, WatchedVideo(clip.video, task.check), shown, opacity, task.advance)
            with self._lock:
                task.check()
                if pane.shown is not shown:
                    path.unlink()
                    raise ValueError("the segments changed while the file was written; download it again")
                if format in self.downloads:  # with another opacity
                    self.downloads[format]["path"].unlink(missing_ok=True)
                about = {"name": path.name, "bytes": path.stat().st_size, "id": number(), "path": path}
                self.downloads[format] = about

        self._start(self.shared.long, "download", DOWNLOADS[format], run)

    def cancel(self, why: str | None = None) -> None:
        """Stop the task, if there is one. ``why`` is shown as an error. Leave it out if the user cancelled."""
        with self._lock:
            if self.task is not None:
                for queue in (self.shared.long, self.shared.short):
                    queue.cancel(self.task)
                self.task = None
                if why is not None:
                    self.error = {"id": number(), "text": why}

    def _start(self, queue: WorkQueue, kind: Kind, title: str, run: Callable[[Task], None]) -> None:
        """Queue a task, which replaces the earlier one."""

        def done(error: BaseException | None) -> None:
            with self._lock:
                if self.task is task:
                    self.task = None
                    if error is not None:
                        self.error = {"id": number(), "text": self.shared.shortened(explain(error))}

        with self._lock:
            self.cancel()
            self.error = None
            task = self.task = Task(kind, title, run, done)
            queue.add(task)

    def _segmented(self, task: Task, clip: Clip, choice: Choice) -> Pane:
        encoding = self._encodings.get(choice.key)
        if encoding is None:
            task.begin(self.shared.sources.opening(choice))
            segmenter = self.shared.sources.open(choice)
            task.begin("encoding frames", clip.video.num_frames)
            keeper, watched = TokenKeeper(clip.video.num_frames), WatchedVideo(clip.video, task.check)
            encoding = Encoding(segmenter, segmenter.encode(watched, (SEED,), task.advance, keeper.keep), keeper)
            with self._lock:
                task.check()
                self._encodings[choice.key] = encoding
        task.begin("grouping into segments")
        segmentation = encoding.segmenter.segment(encoding.encoded, SEED, **choice.settings)
        controls = self.shared.sources.controls(choice, encoding.segmenter)
        kept = {control["name"]: control["value"] for control in controls}
        return Pane(choice.source, kept, controls, encoding, corrections.uncorrected(segmentation), number())

    def _show(self, panes: Mapping[str, Pane]) -> None:
        self.panes |= panes
        if "main" in panes:
            self._forget_downloads()
        used = [id(pane.encoding) for pane in self.panes.values() if pane is not None]
        unused = [key for key, encoding in self._encodings.items() if id(encoding) not in used]
        for key in unused[: max(0, len(self._encodings) - KEPT_ENCODINGS)]:
            del self._encodings[key]

    # -- corrections

    def edit(self, edit: Edit) -> None:
        """Correct the segments of the tab Segment. Raises ValueError if that is impossible."""
        with self.shared.correcting:  # one at a time, because a split uses all cores and much memory
            pane = self.require_pane("main")
            before = pane.shown
            after = pane.corrected(edit)
            with self._lock:
                if self.panes["main"] is not pane or pane.shown is not before:
                    raise ValueError("the segments changed during the correction; try again")
                pane.take(edit, after, number())
                self._forget_downloads()

    def _forget_downloads(self) -> None:
        for about in self.downloads.values():
            about["path"].unlink(missing_ok=True)
        self.downloads = {}

    # -- data for the page

    def labels(self, name: str, number: int) -> tuple[int, bytes]:
        """The version of a pane, and the number of the segment of each pixel of the view, row by row."""
        clip, pane = self.require_clip(), self.require_pane(name)
        with self._lock:
            version, shown = pane.version, pane.shown
        frame = clip.frame(number)
        part = shown.segmentation.part(slice(number, number + 1))
        with self.shared.drawing:
            labels, _ = next(iter(part.label_maps(clip.view, [frame])))
        return version, np.array(shown.ids, np.uint8)[labels].tobytes()

    def state(self) -> dict[str, Any]:
        """Everything that the page shows, except pictures."""
        with self._lock:
            task, job = self.task, None
            if task is not None:
                ahead = max(queue.ahead(task) for queue in (self.shared.long, self.shared.short))
                job = {
                    "id": task.id,
                    "kind": task.kind,
                    "title": task.title,
                    "state": "running" if task.running else "waiting",
                    "ahead": ahead,
                    "step": task.step,
                    "done": task.finished,
                    "total": task.total,
                }
            return {
                "clip": None if self.clip is None else self.clip.describe(),
                "job": job,
                "error": self.error,
                "panes": {name: pane and pane.describe() for name, pane in self.panes.items()},
                "agreement": self.agreement,
                "downloads": {
                    format: {key: value for key, value in about.items() if key != "path"}
                    for format, about in self.downloads.items()
                },
            }

    def disconnect(self) -> None:
        """Note that an event stream has ended."""
        self.connections -= 1
        self.left = time.monotonic()

    def close(self) -> None:
        """Stop its work and remove its files."""
        with self._lock:
            self.closed = True
            self.remove_clip()
            shutil.rmtree(self.folder, ignore_errors=True)
