"""The tabs of the browsers: each has a clip, segments of it, one task at a time, and a folder of its own."""

import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from interpreter.app import corrections
from interpreter.app.clip import Clip, WatchedVideo
from interpreter.app.corrections import Corrected, TokenKeeper
from interpreter.app.downloads import FORMATS, Format, write_download
from interpreter.app.matching import overlaps, renumbered
from interpreter.app.sources import Choice, Source, Sources
from interpreter.app.work import Kind, Task, WorkQueue, explain
from interpreter.methods.base import Encoded, Segmenter
from interpreter.metrics.ari import adjusted_rand_index
from interpreter.render import DISPLAY_PALETTE

SEED = 0  # as `segment`
KEPT_ENCODINGS = 2  # of a tab: Compare needs two
UNDO = 30  # corrections that can be undone
TITLES = {"png": "PNG masks", "rle": "RLE", "cutout": "cut-out", "overlay": "overlay"}
NOT_TIED = "Every frame is segmented by itself here: a number means another object in every frame."


class Gone(ValueError):
    """What a request is about does not exist any more."""


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
    version: int
    before: list[Corrected] = field(default_factory=list)
    after: list[Corrected] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """What the page knows of it."""
        shown = self.shown
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
            "settings": self.settings,
            "controls": self.controls,
            "segments": listed,
            "undo": bool(self.before),
            "redo": bool(self.after),
            "note": None if shown.segmentation.tied_over_time else NOT_TIED,
        }


class Session:
    """One tab.

    Args:
        token: its secret name in requests.
        folder: for its clip and its downloads.
        tabs: all tabs.
    """

    def __init__(self, token: str, folder: Path, tabs: "Sessions") -> None:
        self.token, self.folder, self.tabs = token, folder, tabs
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
        self._count = 0

    # -- the clip

    def number(self) -> int:
        """A number that this tab did not use before."""
        with self._lock:
            self._count += 1
            return self._count

    @contextmanager
    def uploading(self) -> Iterator[Path]:
        """A new folder for an upload, which is removed unless a clip in it is used in the end."""
        folder = self.folder / f"clip-{self.number()}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            if self.clip is None or self.clip.path.parent != folder:
                shutil.rmtree(folder, ignore_errors=True)

    def use(self, clip: Clip) -> None:
        """Show another clip; what there was of the former one is removed."""
        with self._lock:
            if self.closed:
                raise Gone("this page was closed")
            self.remove_clip()
            self.clip = clip

    def remove_clip(self) -> None:
        """Stop the work on the clip, and remove it with all that was made of it."""
        with self._lock:
            self.cancel()
            if self.clip is not None:
                shutil.rmtree(self.clip.path.parent, ignore_errors=True)
            self.clip, self.error, self.agreement = None, None, None
            self.panes = dict.fromkeys(self.panes)
            self._encodings.clear()
            self._forget_downloads()

    def require_clip(self) -> Clip:
        """The clip; ValueError if there is none."""
        if self.clip is None:
            raise ValueError("there is no clip yet: choose a video first")
        return self.clip

    def require_pane(self, name: str) -> Pane:
        """A pane with segments; ValueError if it is empty."""
        pane = self.panes.get(name)
        if pane is None:
            raise Gone("there are no segments yet: segment the clip first")
        return pane

    # -- long work

    def segment(self, source: Source, settings: Mapping[str, Any]) -> None:
        """Segment the clip for the tab Segment."""
        clip, choice = self.require_clip(), self.tabs.sources.choose(source, settings)

        def run(task: Task) -> None:
            pane = self._segmented(task, clip, choice)
            with self._lock:
                if not task.cancelled:
                    self._show({"main": pane})

        queue = self.tabs.short if choice.key in self._encodings else self.tabs.long
        self._start(queue, "segment", f"segments of {clip.path.name}", run)

    def compare(self, left: Source, right: Source) -> None:
        """Segment the clip with two sources for the tab Compare; the right one gets the numbers of the left one."""
        clip, choices = self.require_clip(), [self.tabs.sources.choose(source, {}) for source in (left, right)]

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

        self._start(self.tabs.long, "compare", f"comparison of {clip.path.name}", run)

    def download(self, format: Format, opacity: float) -> None:
        """Write a file of the segments of the tab Segment."""
        if format not in FORMATS:
            raise ValueError(f"format {format!r}: choose from {', '.join(FORMATS)}")
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity {opacity}: must be between 0 and 1")
        clip, pane = self.require_clip(), self.require_pane("main")
        shown, folder = pane.shown, clip.path.parent / "downloads" / format

        def run(task: Task) -> None:
            task.begin("writing frames", clip.video.num_frames)
            folder.mkdir(parents=True, exist_ok=True)
            path = write_download(format, folder, WatchedVideo(clip.video, task.check), shown, opacity, task.advance)
            with self._lock:
                if not task.cancelled and pane.shown is shown:
                    about = {"name": path.name, "bytes": path.stat().st_size, "id": self.number(), "path": path}
                    self.downloads[format] = about

        self._start(self.tabs.long, "download", TITLES[format], run)

    def cancel(self) -> None:
        """Stop the task, if there is one."""
        with self._lock:
            if self.task is not None:
                for queue in (self.tabs.long, self.tabs.short):
                    queue.cancel(self.task)
                self.task = None

    def _start(self, queue: WorkQueue, kind: Kind, title: str, run: Callable[[Task], None]) -> None:
        """Queue a task in place of the one before."""

        def done(error: Exception | None) -> None:
            with self._lock:
                if self.task is task:
                    self.task = None
                    if error is not None:
                        self.error = {"id": self.number(), "text": self.tabs.shortened(explain(error))}

        with self._lock:
            self.cancel()
            self.error = None
            task = self.task = Task(kind, title, run, done)
            queue.add(task)

    def _segmented(self, task: Task, clip: Clip, choice: Choice) -> Pane:
        encoding = self._encodings.get(choice.key)
        if encoding is None:
            task.begin("opening the model")
            segmenter = self.tabs.sources.open(choice)
            task.begin("encoding frames", clip.video.num_frames)
            keeper, watched = TokenKeeper(clip.video.num_frames), WatchedVideo(clip.video, task.check)
            encoding = Encoding(segmenter, segmenter.encode(watched, (SEED,), task.advance, keeper.keep), keeper)
            with self._lock:
                task.check()
                self._encodings[choice.key] = encoding
                for oldest in list(self._encodings)[:-KEPT_ENCODINGS]:
                    del self._encodings[oldest]
        task.begin("grouping into segments")
        segmentation = encoding.segmenter.segment(encoding.encoded, SEED, **choice.settings)
        controls = self.tabs.sources.controls(choice, encoding.segmenter)
        kept = {control["name"]: control["value"] for control in controls}
        return Pane(choice.source, kept, controls, encoding, corrections.uncorrected(segmentation), self.number())

    def _show(self, panes: Mapping[str, Pane]) -> None:
        self.panes |= panes
        self._forget_downloads()

    # -- corrections

    def edit(self, kind: str, ids: list[int], text: str) -> None:
        """Correct the segments of the tab Segment.

        Args:
            kind: "merge", "split", "hide", "show", "name", "undo" or "redo".
            ids: numbers of the segments.
            text: the name.

        Raises:
            ValueError: if it cannot be done; says why.
        """
        with self._lock:
            pane = self.require_pane("main")
            shown = pane.shown
            if kind in ("undo", "redo"):
                source, target = (pane.before, pane.after) if kind == "undo" else (pane.after, pane.before)
                if not source:
                    raise ValueError(f"there is nothing to {kind}")
                target.append(shown)
                pane.shown = source.pop()
            else:
                pane.shown = self._corrected(pane, kind, ids, text)
                pane.before = [*pane.before, shown][-UNDO:]
                pane.after = []
            pane.version = self.number()
            self._forget_downloads()

    def _corrected(self, pane: Pane, kind: str, ids: list[int], text: str) -> Corrected:
        shown = pane.shown
        if kind == "merge":
            return corrections.merge(shown, ids)
        if kind in ("hide", "show"):
            return corrections.show(shown, ids, kind == "show")
        if kind not in ("split", "name"):
            raise ValueError(f"no correction is called {kind!r}")
        if len(ids) != 1:
            raise ValueError(f"select one segment to {kind} it")
        if kind == "name":
            return corrections.name(shown, ids[0], text)
        return corrections.split(shown, ids[0], pane.encoding.keeper.tokens, SEED)

    def _forget_downloads(self) -> None:
        for about in self.downloads.values():
            about["path"].unlink(missing_ok=True)
        self.downloads = {}

    # -- what the page reads

    def labels(self, name: str, number: int) -> bytes:
        """The number of the segment of each pixel of the view, row by row."""
        clip, pane = self.require_clip(), self.require_pane(name)
        frame, shown = clip.frame(number), pane.shown
        part = shown.segmentation.part(slice(number, number + 1))
        with self.tabs.drawing:
            labels, _ = next(iter(part.label_maps(clip.view, [frame])))
        return np.array(shown.ids, np.uint8)[labels].tobytes()

    def state(self) -> dict[str, Any]:
        """All that the page shows, but pictures."""
        with self._lock:
            task, job = self.task, None
            if task is not None:
                ahead = max(queue.ahead(task) for queue in (self.tabs.long, self.tabs.short))
                job = {
                    "id": task.id,
                    "kind": task.kind,
                    "title": task.title,
                    "state": "running" if task.running else "waiting",
                    "place": ahead,
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


class Sessions:
    """All tabs, and the two threads that work for them.

    Args:
        folder: of the server.
        sources: what can segment.
        most: clips that are kept at once.
        leave: seconds after which the work of a closed tab stops: a page that is reloaded comes back sooner.
        forget: seconds after which its clip is removed.
    """

    def __init__(self, folder: Path, sources: Sources, most: int, leave: float, forget: float) -> None:
        self.folder, self.sources, self.most, self.leave, self.forget = folder, sources, most, leave, forget
        self.long, self.short = WorkQueue("long work"), WorkQueue("short work")
        self.ending = False  # the server is about to end
        self.drawing = threading.Lock()  # one label map at a time: each uses all cores
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def open(self) -> Session:
        """A new tab."""
        token = secrets.token_urlsafe(24)
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir()
        with self._lock:
            session = self._sessions[token] = Session(token, folder, self)
        return session

    def find(self, token: str) -> Session:
        """The tab of a token; :class:`Gone` if it was closed."""
        session = self._sessions.get(token)
        if session is None:
            raise Gone("this page was closed for too long, and its clip was removed; reload it")
        return session

    def require_place(self, session: Session) -> None:
        """Refuse a clip more than the server keeps; ValueError says what to do."""
        with self._lock:
            others = [other for other in self._sessions.values() if other is not session and other.clip is not None]
        if len(others) >= self.most:
            raise ValueError(
                f"this server keeps {self.most} clips, and all places are taken; wait until somebody closes a page, or "
                "start it with a larger --max-clips"
            )

    def close(self, session: Session) -> None:
        """Forget a tab."""
        with self._lock:
            self._sessions.pop(session.token, None)
        session.close()

    def shortened(self, text: str) -> str:
        """An error as on the command line: without the folder of the tab, which is of no use to anybody."""
        return re.sub(rf"{re.escape(str(self.folder))}/[0-9a-f]+/(clip-\d+/)?", "", text)

    def tidy(self) -> None:
        """Stop the work of tabs that were closed, and forget those that do not come back."""
        now = time.monotonic()
        with self._lock:
            alone = [session for session in self._sessions.values() if session.connections == 0]
        for session in alone:
            if now - session.left > self.forget:
                self.close(session)
            elif now - session.left > self.leave:
                session.cancel()

    def shut_down(self) -> None:
        """Stop all work."""
        for queue in (self.long, self.short):
            queue.close(seconds=5)
