"""Sends packed runs to the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from interpreter.hub.client import LOG_IN, explained
from interpreter.hub.fetching import RemoteFile, read_listing, run_files
from interpreter.hub.names import HubName

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Repository:
    """A repository as it is before a push.

    Attributes:
        name: with the branch that is pushed to.
        license: on its model card.
        is_private: whether others see it.
        commit: the newest one of the branch; None if there is no such repository or branch.
        files: of that commit.
    """

    name: HubName
    exists: bool
    license: str | None
    is_private: bool
    commit: str | None
    files: dict[str, RemoteFile]


def look_up(client: "HfApi", name: HubName) -> Repository:
    """What the hub has under a name.

    Raises:
        OSError, ValueError: if it cannot be reached, refuses, or answers nonsense.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    with explained(name):
        try:
            info = client.model_info(name.repository, timeout=10)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Repository(name, False, None, False, None, {})
        license = info.card_data.license if info.card_data else None
        try:
            branch = client.model_info(name.repository, revision=name.revision, files_metadata=True, timeout=10)
        except RevisionNotFoundError:
            return Repository(name, True, license, bool(info.private), None, {})
        return Repository(name, True, license, bool(info.private), *read_listing(branch))


def push_folder(
    client: "HfApi", folder: Path, files: list[str], there: Repository, private: bool, message: str
) -> tuple[str, bool]:
    """Make the branch hold exactly these files of a run, in one commit; files that are not part of a run stay.

    Args:
        client: of the hub.
        folder: a packed run.
        files: its files, relative to it.
        there: the repository as it is.
        private: whether a new repository is private.
        message: of the commit.

    Returns:
        The commit, and whether it is a new one.

    Raises:
        OSError, ValueError: if the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    name = there.name
    changed = [f for f in files if f not in there.files or not there.files[f].matches(folder / f)]
    removed = sorted(run_files(there.files) - set(files))
    if there.commit and not changed and not removed:
        return there.commit, False
    with explained(name):
        if not there.exists:
            client.create_repo(name.repository, private=private, exist_ok=True)
        if there.commit is None and name.revision != "main":
            client.create_branch(name.repository, branch=name.revision, exist_ok=True)
        operations = [
            *(CommitOperationAdd(path, folder / path) for path in changed),
            *(CommitOperationDelete(path, is_folder=False) for path in removed),
        ]
        # With the parent, a push of somebody else in between is refused, not overwritten.
        made = client.create_commit(
            name.repository, operations, commit_message=message, revision=name.revision, parent_commit=there.commit
        )
    return made.oid, True


def require_token(name: HubName) -> None:
    """Refuse to send anything without a token.

    Raises:
        ValueError: says how to log in.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise ValueError(f"to push to hub:{name.repository} you have to be known to the hub; {LOG_IN}")
