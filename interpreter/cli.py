"""What the commands share: parsing, and errors as one line."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar, get_args

import tyro
from rich.console import Console

from interpreter.configs import ImageTraining, Preset, Stage, VideoTraining, training_defaults

T = TypeVar("T")


def cli(kind: type[T] | Callable[..., T], arguments: Sequence[str] | None = None, **options: object) -> T:
    """Parse a command line into a dataclass: flat option names, help from its docstrings."""
    markers = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(kind, args=arguments, config=markers, **options)  # type: ignore[call-overload]


def parse(arguments: Sequence[str]) -> ImageTraining | VideoTraining:
    """Parse the command line of ``interpreter.train``: stage and preset first, since the defaults follow from them."""
    first = argparse.ArgumentParser(prog="python -m interpreter.train", add_help=False, allow_abbrev=False)
    first.add_argument("--stage", choices=get_args(Stage), default="image")
    first.add_argument("--preset", choices=get_args(Preset), default="demo")
    chosen, rest = first.parse_known_args(list(arguments))
    defaults = training_defaults(chosen.stage, chosen.preset)
    description = (
        f"{(type(defaults).__doc__ or '').strip()}\n\nBefore all others: --stage {{{','.join(get_args(Stage))}}} "
        f"(here: {chosen.stage}) and --preset {{{','.join(get_args(Preset))}}} (here: {chosen.preset})."
    )
    options = {"prog": "python -m interpreter.train", "description": description}
    if isinstance(defaults, ImageTraining):
        return cli(ImageTraining, rest, default=defaults, **options)
    return cli(VideoTraining, rest, default=defaults, **options)


def run_command(main: Callable[[], int], known: tuple[type[Exception], ...] = ()) -> None:
    """Run a command and exit; what a user can cause is one clear line and exit status 1, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may hold what no encoding has
    try:
        sys.exit(main())
    except (ValueError, OSError) + known as error:  # noqa: RUF005
        text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(f"error: {text}", style="red")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
