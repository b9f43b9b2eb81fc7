"""Shared code of the commands: parsing, errors in one line, exit statuses."""

import argparse
import inspect
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, TypeVar

import tyro
from rich.console import Console

from interpreter.interrupts import SIGPIPE, StopRequest, discard_output, output_is_broken

T = TypeVar("T")

RESTART = "Rerun the same command to start again."
RESUME = "What is finished is saved. Rerun the same command to continue."


def _unwrapped(parse: Callable[[object], dict[str, str]], kind: object) -> dict[str, str]:
    """The help of each option as one paragraph for each part that ends with a full stop or a colon.

    tyro 1 keeps every line break of a docstring whose lines are indented, also those in the middle of a sentence.
    """
    return {name: re.sub(r"(?<![.:])\n\s*", " ", text) for name, text in parse(kind).items()}


_parse = tyro._docstrings.parse_docstring_from_object
tyro._docstrings.parse_docstring_from_object = partial(_unwrapped, _parse)  # type: ignore[assignment]


def cli(kind: type[T] | Callable[..., T], arguments: Sequence[str] | None = None, **options: object) -> T:
    """Parse a command line into a dataclass: flat option names, help from its docstrings."""
    markers = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(kind, args=arguments, config=markers, **options)  # type: ignore[call-overload]


def described(options: type, examples: str) -> str:
    """The description of a subcommand: the docstring of its options, then examples."""
    return f"{inspect.getdoc(options)}\n\n{examples}"


def parse_first(arguments: Sequence[str], prog: str, **options: dict[str, Any]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options on which the defaults of all other options depend. Returns them, and the other arguments.

    Args:
        arguments: the command line.
        prog: name of the command, for messages.
        options: of :meth:`argparse.ArgumentParser.add_argument`, by the name of the option.
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_known_args(list(arguments))


def rename_options(arguments: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """Replace old names of options by new ones, and print a warning. Old names work for one release."""
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in renamed:
            warnings.warn(f"{name} is now {renamed[name]}", FutureWarning, stacklevel=2)
            argument = f"{renamed[name]}{equals}{value}"
        result.append(argument)
    return result


def run_command(
    main: Callable[[], int],
    known: tuple[type[Exception], ...] = (),
    stopped: str = RESTART,
) -> NoReturn:
    """Run a command and exit.

    An error that a user can cause is printed in one line, without a traceback, and the exit status is 1. After a
    signal, the status is 128 plus its number. If the reader of the output has ended (``| head``), it is 141 without a
    message.

    Args:
        main: the command; returns the exit status.
        known: other errors that a user can cause, besides ValueError and OSError.
        stopped: line to print after a signal, such as how to resume.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names can contain bytes that are not text
    status: int | str | None
    with StopRequest(at_once=True) as stop:
        try:
            status = main()
            sys.stdout.flush()
        except BaseException as error:
            stop.at_once = False  # from here on, a signal must not replace the message
            status = _explain(error, known, stopped)
        _leave(status)


def _explain(error: BaseException, known: tuple[type[Exception], ...], stopped: str) -> int | str | None:
    """Print an expected error in one line and return the exit status; any other error is raised again."""
    # Rich turns a broken pipe into SystemExit(1). argparse and tyro end with SystemExit, too.
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, BrokenPipeError) and any(map(output_is_broken, (1, 2))):
        return 128 + SIGPIPE
    if isinstance(error, SystemExit):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        if number != SIGPIPE and os.environ.get("RANK", "0") == "0":  # only one process of a job prints the message
            _print_red(f"stopped by {signal.Signals(number).name}. {getattr(error, 'note', '') or stopped}")
        return 128 + number
    if isinstance(error, (ValueError, OSError, *known)):
        _print_red(f"error: {one_line(error)}")
        return 1
    raise error


def one_line(error: BaseException) -> str:
    """The message of an error that a user can cause, without the number that Python puts before our own OSErrors."""
    return error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)


def _print_red(line: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(line, style="red")


def _leave(status: int | str | None) -> NoReturn:
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            discard_output(descriptor)  # otherwise Python tries again at its end, and prints an error
            status = 128 + SIGPIPE
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    if isinstance(status, int) and status > 128 and others:
        os._exit(status)  # these threads only read; waiting for them would take until the end of their videos
    sys.exit(status)
