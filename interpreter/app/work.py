"""A queue of long tasks. One thread runs them one after the other, and each task has its position in the queue."""

import errno
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from interpreter.commands import one_line

Kind = Literal["segment", "compare", "download"]


class Cancelled(Exception):
    """The task was cancelled: its tab is closed, or the user pressed Cancel."""


class Task:
    """One piece of work, and its progress.

    Args:
        kind: kind of work, for the page.
        title: its result, in a few words.
        run: function that does the work. It calls :meth:`advance` or :meth:`check` often.
        done: function that is called at the end with the error, or with None. Not called for a cancelled task.
    """

    _count = 0

    def __init__(
        self, kind: Kind, title: str, run: Callable[["Task"], None], done: Callable[[BaseException | None], None]
    ) -> None:
        Task._count += 1
        self.id, self.kind, self.title, self.run, self.done = Task._count, kind, title, run, done
        self.step, self.finished, self.total, self.running = "", 0, 0, False
        self._cancelled = threading.Event()
        self.ended = threading.Event()

    def begin(self, step: str, total: int = 0) -> None:
        """Begin a step, such as "encoding frames", with ``total`` parts (0: unknown)."""
        self.check()
        self.step, self.finished, self.total = step, 0, total

    def advance(self, count: int = 1) -> None:
        """Record that parts of the step are done."""
        self.finished += count
        self.check()

    def check(self) -> None:
        """Raise :class:`Cancelled` if the task was cancelled."""
        if self._cancelled.is_set():
            raise Cancelled

    def cancel(self) -> None:
        """Ask it to stop. It stops at its next :meth:`check`."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to stop."""
        return self._cancelled.is_set()


class WorkQueue:
    """Runs tasks one after the other, in a thread that ends with the process.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._waiting: deque[Task] = deque()
        self._running: Task | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def add(self, task: Task) -> None:
        """Append a task."""
        with self._changed:
            self._waiting.append(task)
            self._changed.notify()

    def ahead(self, task: Task) -> int:
        """The number of tasks before this one, including the running task."""
        with self._changed:
            if task not in self._waiting:
                return 0
            return list(self._waiting).index(task) + (self._running is not None)

    def cancel(self, task: Task) -> None:
        """Remove a task, or ask it to stop if it is running."""
        task.cancel()
        with self._changed:
            if task in self._waiting:
                self._waiting.remove(task)
                task.ended.set()

    def close(self, seconds: float) -> None:
        """Cancel all tasks, and wait for the running task, at most this long."""
        with self._changed:
            self._closed = True
            for task in (*self._waiting, *([self._running] if self._running else [])):
                task.cancel()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                task = self._running = self._waiting.popleft()
            error: BaseException | None = None
            try:
                task.running = True
                task.check()
                task.run(task)
            except BaseException as problem:  # after any error, the next tasks must run
                error = problem
            with self._changed:
                self._running = None
            try:
                if not isinstance(error, Cancelled) and not task.cancelled:
                    task.done(error)
            finally:
                task.ended.set()


def explain(error: BaseException) -> str:
    """One line about an error, for the page. A bug also prints a traceback in the terminal."""
    if isinstance(error, OSError) and error.strerror == os.strerror(errno.ENOSPC):  # else the error says more
        return "the disk of the server is full; remove other videos, or restart the server with another --folder"
    if isinstance(error, (ValueError, OSError, ImportError, IndexError)):
        return one_line(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU has too little free memory; try a shorter clip, or wait until the tasks of others are done"
    with suppress(OSError):  # the terminal may be closed
        traceback.print_exception(error)
    return f"an error inside the program, {type(error).__name__}: {error}; the terminal of the server shows more"
