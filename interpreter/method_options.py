"""Command lines whose options depend on the method: its settings are among them."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from interpreter.commands import cli, parse_first
from interpreter.engine.run import RunConfig, check_ranges, read_config
from interpreter.hub.fetching import local_run
from interpreter.hub.names import is_hub_name
from interpreter.methods import METHODS, find_method
from interpreter.methods.base import Method

T = TypeVar("T")


class Chosen(NamedTuple):
    """The method that a command uses, and the configuration of its run."""

    method: Method
    stored: RunConfig  # configuration of the run; empty without one


def choose_method(name: str | None, run: Path | None) -> Chosen:
    """The method of a run, or the named method, or the default method without either.

    Args:
        name: of a method, from ``--method``.
        run: run directory, from ``--run``. It need not exist yet.

    Raises:
        ValueError: if the run has a different method than the named one, or the named method does not exist.
    """
    stored = read_config(run) if run else RunConfig()
    if name and stored.stages and stored.method != name:
        raise ValueError(f"{run} is a run of the method {stored.method}, not of {name}; leave --method out")
    return Chosen(find_method(name or stored.method), stored)


def parse_with_settings(options: type[T], arguments: Sequence[str], prog: str) -> tuple[Chosen, T]:
    """Parse a command line. ``--run`` and ``--method`` are parsed first, because the other options depend on them.

    Args:
        options: frozen keyword-only dataclass of the options, with fields ``run``, ``method`` and ``settings``. The
            field ``settings`` becomes the settings dataclass of the method.
        arguments: the command line.
        prog: name of the command.

    Returns:
        The method with the run's configuration, and the options. In these, ``run`` is a directory: a run of the hub is
        downloaded first.

    Raises:
        ValueError: if an option is out of range, or the run's configuration is damaged.
        OSError: if a run of the hub cannot be downloaded.
    """
    chosen, rest = parse_first(arguments, prog, run={"type": Path}, method={"choices": METHODS})
    asks_for_help = {"-h", "--help"} & set(rest)  # --help downloads nothing
    run = None if chosen.run is None or (asks_for_help and is_hub_name(chosen.run)) else local_run(chosen.run)
    method, stored = choose_method(chosen.method, run)
    field = ("settings", method.settings, dataclasses.field(default_factory=method.settings))
    kind = dataclasses.make_dataclass(options.__name__, [field], bases=(options,), frozen=True, kw_only=True)
    about = inspect.cleandoc(options.__doc__ or "")
    has = dataclasses.fields(method.settings)
    note = 'The group "settings" holds the options' if has else "There are no options"
    description = f"{about}\n\n{note} of the method {method.name}."
    parsed: T = cli(kind, arguments, prog=prog, description=description)
    check_ranges(parsed)
    return Chosen(method, stored), dataclasses.replace(parsed, run=run)  # type: ignore[type-var]
