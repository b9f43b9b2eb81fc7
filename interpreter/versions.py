"""The version of this package, and checks that the installed packages are new enough."""

import re
import sys
from importlib import metadata

DISTRIBUTION = "interpreter-slots"


def own_version() -> str:
    """The version of the installed package, such as ``0.1.0``; ``unknown`` in a copy that was never installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


def too_old(requirements: list[str]) -> str | None:
    """The message about the first installed package that is older than required, or None.

    Args:
        requirements: such as ``av>=18`` or ``av>=18,<20``. Requirements with a marker (such as those of extras) are
            skipped, and so are packages that are not installed.
    """
    for requirement in requirements:
        if ";" in requirement or not (match := re.match(r"([\w.-]+).*>=([\d.]+)", requirement)):
            continue
        package, least = match.groups()
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if _numbers(installed) < _numbers(least):
            return f"{package} {installed} is too old: interpreter needs {requirement}; pip install '{requirement}'"
    return None


def require_package(package: str) -> None:
    """Check the version of an optional package. Call it where the package is imported.

    Raises:
        ValueError: if it is too old.
    """
    own = [text.split(";")[0].strip() for text in _requirements() if re.match(rf"{re.escape(package)}(?![\w.-])", text)]
    if problem := too_old(own):
        raise ValueError(problem)


def require_versions(is_command: bool) -> None:
    """Check the installed packages against what this one requires.

    Args:
        is_command: whether a command of this package is starting. It then ends with one line, without a traceback.

    Raises:
        ImportError: if a package is too old.
    """
    if problem := too_old(_requirements()):
        if is_command:
            sys.exit(f"error: {problem}")
        raise ImportError(problem)


def _requirements() -> list[str]:
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # the package is not installed: it runs from a copy of the repository
        return []


def _numbers(version: str) -> tuple[int, ...]:
    """2.11.0+cpu as (2, 11)."""
    numbers = [int(part) for part in re.split(r"[^\d.]", version)[0].split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
