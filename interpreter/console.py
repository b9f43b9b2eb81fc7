"""The console that all commands print to, and their progress bars."""

import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from interpreter.interrupts import output_is_closed

T = TypeVar("T")


class _Console(Console):
    """Rich ends the process if nobody reads its output any more (``| head``). But training has to save first."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        output_is_closed(self.file.fileno())


def make_console() -> Console:
    """A console on standard error.

    In a notebook, rich's bars need ipywidgets. Without it, rich would warn, and print each change of a bar as an output
    of its own; so a notebook is then treated like a file, to which only the last state is written.
    """
    if "ipykernel" in sys.modules and find_spec("ipywidgets") is None:
        return _Console(stderr=True, force_jupyter=False, force_terminal=False)
    return _Console(stderr=True)


console = make_console()


def progress_bar(unit: str, transient: bool = False) -> Progress:
    """A progress bar with time left, which shows the field ``status`` of a task.

    Args:
        unit: what is counted, such as "frames".
        transient: show it on a terminal only, and remove it at the end.
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[status]}", markup=False),  # names of videos can contain [brackets]
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=transient,
        disable=transient and not console.is_terminal,
    )


def gigabytes(count: int) -> str:
    """A number of bytes in MB or GB, with three digits.

    >>> gigabytes(12_345_678), gigabytes(2_000_000_000)
    ('12.3 MB', '2 GB')
    """
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def tracked(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield ``items`` while a terminal shows how many of ``total`` videos are done; silent elsewhere."""
    with progress_bar("videos", transient=True) as bar:
        yield from bar.track(items, task_id=bar.add_task(description, total=total, status=""))
