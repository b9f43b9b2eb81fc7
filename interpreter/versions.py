"""A package that is too old for this one: one line at the start instead of an error from its inside."""

import re
import sys
from importlib import metadata

DISTRIBUTION = "interpreter-slots"


def too_old(requirements: list[str]) -> str | None:
    """What to say of the first installed package that is older than required; None if there is none.

    Args:
        requirements: such as ``av>=18``. Those of extras, and packages that are not installed, are passed over.
    """
    for requirement in requirements:
        if not (match := re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)):
            continue
        package, least = match.groups()
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if _numbers(found) < _numbers(least):
            return f"{package} {found} is too old: interpreter needs {requirement}; pip install '{requirement}'"
    return None


def require_versions(is_command: bool) -> None:
    """Check the installed packages against what this one requires.

    Args:
        is_command: whether a command of this package is being started, which ends with the line instead of a traceback.

    Raises:
        ImportError: if a package is too old.
    """
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a copy of the repository
        return
    if problem := too_old(requirements):
        if is_command:
            sys.exit(f"error: {problem}")
        raise ImportError(problem)


def _numbers(version: str) -> tuple[int, ...]:
    """2.11.0+cpu as (2, 11)."""
    numbers = [int(part) for part in re.split(r"[^\d.]", version)[0].split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
