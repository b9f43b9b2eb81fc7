"""Command lines whose options depend on the method: its settings are among them."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from interpreter.commands import cli, parse_first
from interpreter.engine.run import DEFAULT_METHOD, check_ranges, read_config
from interpreter.methods import METHODS, find_method
from interpreter.methods.base import Method

T = TypeVar("T")


def choose_method(name: str | None, run: Path | None) -> Method:
    """The method of a run, or the named one; the default where neither says.

    Raises:
        ValueError: if both say, and differ, or there is no such method.
    """
    stored = read_config(run) if run else None
    if name and stored and stored.stages and stored.method != name:
        raise ValueError(f"{run} is a run of the method {stored.method}, not of {name}; leave --method out")
    return find_method(name or (stored.method if stored else DEFAULT_METHOD))


def parse_with_settings(options: type[T], arguments: Sequence[str], prog: str) -> tuple[Method, T]:
    """Parse a command line; ``--run`` and ``--method`` come first, since the other options depend on them.

    Args:
        options: frozen keyword-only dataclass of the options, with fields ``run``, ``method`` and ``settings``. The
            latter is replaced by the method's settings.
        arguments: the command line.
        prog: name of the command.

    Returns:
        The method, and the options.

    Raises:
        ValueError: if an option is out of range, or the run's configuration is damaged.
    """
    chosen, _ = parse_first(arguments, prog, run={"type": Path}, method={"choices": METHODS})
    method = choose_method(chosen.method, chosen.run)
    field = ("settings", method.settings, dataclasses.field(default_factory=method.settings))
    kind = dataclasses.make_dataclass(options.__name__, [field], bases=(options,), frozen=True, kw_only=True)
    about = inspect.cleandoc(options.__doc__ or "")
    description = f'{about}\n\nThe options in the group "settings" are those of the method {method.name}.'
    parsed: T = cli(kind, arguments, prog=prog, description=description)
    check_ranges(parsed)
    return method, parsed
