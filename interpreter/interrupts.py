"""Ctrl-C, SIGTERM and a closed terminal: a command saves its work, ends, and its exit status names the signal."""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# A closed terminal sends SIGHUP. Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SIGPIPE = 13  # Windows has no SIGPIPE, but broken pipes
# A terminal and a launcher (uv run, srun) send the signal of one Ctrl-C twice.
SAME_SIGNAL_SECONDS = 0.3


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end. ``number`` is the number of the signal; the exit status is 128 + ``number``.

    ``note`` is a message about the state of the work, if it differs from the usual message of the command.
    """

    def __init__(self, number: int, note: str = "") -> None:
        super().__init__(number)
        self.number, self.note = number, note


class StopRequest:
    """Context manager that handles SIGINT, SIGTERM and SIGHUP.

    The first signal sets ``number``, and raises :class:`Interrupted` if ``at_once``. A second signal ends the process
    without cleaning up. If SIGHUP was ignored (nohup), it is still ignored. In Python, only the main thread receives
    signals; in other threads, this context manager does nothing.

    Args:
        at_once: raise at the first signal. Otherwise the caller checks ``number`` between its steps.
    """

    active: "StopRequest | None" = None  # the innermost one

    def __init__(self, at_once: bool = False) -> None:
        self.number, self.at_once = 0, at_once
        self._since = 0.0
        self._terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]

    def ask(self, number: int) -> None:
        """Ask to stop, as a signal does."""
        if self.number == 0:
            self.number, self._since = number, time.monotonic()
            if self.at_once:
                raise Interrupted(number)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block in which the first signal raises :class:`Interrupted`."""
        before, self.at_once = self.at_once, True
        try:
            yield
        finally:
            self.at_once = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):  # the terminal is closed: writing to it is an error
            for descriptor in self._terminals:
                discard_output(descriptor)
        if self.number == 0:
            self.ask(number)
        elif time.monotonic() - self._since > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __enter__(self) -> "StopRequest":
        self._outer, StopRequest.active = StopRequest.active, self
        if self._outer is not None and not self.number:  # an exception that is raised in a callback of C++ can get lost
            self.number = self._outer.number
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        StopRequest.active = self._outer


def output_is_closed(descriptor: int) -> None:
    """The reader of this output has ended: discard the rest, and ask the process to stop, as SIGPIPE would.

    Raises:
        Interrupted: unless there is an active :class:`StopRequest` that does not raise at once, or that was asked
            before.
    """
    discard_output(descriptor)
    if StopRequest.active is None:
        raise Interrupted(SIGPIPE)
    StopRequest.active.ask(SIGPIPE)


def output_is_broken(descriptor: int) -> bool:
    """Whether an output (1 or 2) is a pipe or socket whose reader has ended."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def discard_output(descriptor: int) -> None:
    """Discard everything that is written to a file descriptor from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _is_terminal(descriptor: int) -> bool:
    with suppress(OSError):
        return os.isatty(descriptor)
    return False
