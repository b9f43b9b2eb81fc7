"""Names of runs on the Hugging Face hub: ``hub:owner/name`` and ``hub:owner/name@revision``."""

import re
from dataclasses import dataclass
from pathlib import Path

PREFIX = "hub:"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """The name of a run on the hub.

    Attributes:
        repository: owner and name, such as "owner/name".
        revision: branch, tag or commit.
    """

    repository: str
    revision: str = "main"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit. The files of a commit never change."""
        return is_commit(self.revision)

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}@{self.revision}"


def is_commit(revision: str) -> bool:
    """Whether a revision is the full hash of a commit, not the name of a branch or tag."""
    return _COMMIT.fullmatch(revision) is not None


def is_hub_name(run: str | Path) -> bool:
    """Whether this names a run on the hub, not a directory.

    >>> is_hub_name("hub:owner/name"), is_hub_name(Path("runs/demo"))
    (True, False)
    """
    return str(run).startswith(PREFIX)


def parse_name(text: str | Path) -> HubName:
    """Read the name of a run on the hub, with or without ``hub:``.

    >>> parse_name("hub:owner/name@v1.0")
    HubName(repository='owner/name', revision='v1.0')
    >>> str(parse_name("owner/name"))
    'hub:owner/name@main'

    Raises:
        ValueError: if it is not such a name.
    """
    repository, at, revision = str(text).removeprefix(PREFIX).partition("@")
    wrong = ".." in str(text) or "--" in repository or not _REPOSITORY.fullmatch(repository)
    if wrong or (at and not _REVISION.fullmatch(revision)):
        raise ValueError(
            f"{text} does not name a run on the hub; write {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION"
        )
    return HubName(repository, revision) if at else HubName(repository)


def snapshot_folder(cache: Path, name: HubName, commit: str) -> Path:
    """The folder of a commit in the cache of the hub's client."""
    return repository_folder(cache, name) / "snapshots" / commit


def repository_folder(cache: Path, name: HubName) -> Path:
    """The folder of a repository in the cache of the hub's client."""
    return cache / f"models--{name.repository.replace('/', '--')}"


def pinned_name(run: Path) -> HubName | None:
    """The name of a run in the cache of the hub's client; None for any other directory.

    A directory in the cache is read only: never write to it.

    >>> print(pinned_name(Path("cache/models--owner--name/snapshots") / ("0" * 40)))
    hub:owner/name@0000000000000000000000000000000000000000
    >>> print(pinned_name(Path("runs/demo")))
    None
    """
    run = run.resolve()
    kind, *parts = run.parent.parent.name.split("--")
    if run.parent.name != "snapshots" or not is_commit(run.name) or kind != "models" or len(parts) != 2:
        return None
    return HubName("/".join(parts), run.name)


def run_name(run: Path) -> str:
    """The name of a run in records: its directory, or its name on the hub with the commit."""
    return str(pinned_name(run) or run)


def title_name(run: Path) -> str:
    """The name of a run in tables: the last part of its directory, or its name on the hub with the commit."""
    return str(pinned_name(run) or run.resolve().name)


def folder_to_write(run: Path) -> Path:
    """The folder for results of a run: its directory, or evaluation/OWNER-NAME for a run of the hub.

    >>> folder_to_write(Path("runs/demo")).as_posix()
    'runs/demo'
    """
    name = pinned_name(run)
    return Path("evaluation") / name.repository.replace("/", "-") if name else run
