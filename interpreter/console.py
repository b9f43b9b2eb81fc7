"""The console that all commands print to, and their progress bars."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from interpreter.interrupts import output_is_closed


class _Console(Console):
    """Rich would end the process where its output is read no more (``| head``); training has to save first."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        output_is_closed(self.file.fileno())


console = _Console(stderr=True)


def progress_bar(unit: str) -> Progress:
    """A progress bar with time left; fields ``unit`` and ``status`` of a task are shown."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[status]}", markup=False),  # names of videos may hold [brackets]
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )
