"""Uploads runs to the Hugging Face hub."""

import json
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from interpreter.hub.card import write_card
from interpreter.hub.client import LOG_IN, cache_folder, explained, open_client
from interpreter.hub.fetching import CONFIG, LARGEST_CONFIG, RemoteFile, download, read_listing, run_files
from interpreter.hub.names import HubName, is_commit, is_hub_name, parse_name, snapshot_folder
from interpreter.hub.packing import Packed, pack

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Pushed:
    """A run on the hub.

    Attributes:
        name: its name with the commit.
        is_new: whether something was sent. If not, the commit is an earlier one.
        url: address of the commit.
    """

    name: HubName
    is_new: bool
    url: str


def push_run(
    run: str | Path,
    name: str,
    *,
    license: str | None = None,
    private: bool = False,
    revision: str = "main",
    message: str | None = None,
    allow_unfinished: bool = False,
    packed: Callable[[Packed], None] = lambda packed: None,
) -> Pushed:
    """Send a run to a repository of the hub, for example ``push_run("runs/demo", "owner/name", license="mit")``.

    Args:
        run: run directory.
        name: OWNER/NAME of the repository. A new repository is created if necessary.
        license: licence of the weights as an identifier of the hub. Default: that of the repository's model card.
        private: whether a new repository is private.
        revision: branch. A new branch is created if necessary.
        message: message of the commit. Default: the method, and the steps of each stage.
        allow_unfinished: whether to send stages that have not reached their last step.
        packed: called with the packed run before it is sent.

    Raises:
        ValueError: if the run is damaged or cannot be shared, or an option is wrong.
        OSError: if the run does not exist, or the hub cannot be reached or refuses.
    """
    where, client = repository_name(run, name, revision), open_client()
    _require_token(where)
    there = look_up(client, where)
    if private and there.exists and not there.is_private:
        raise ValueError(
            f"hub:{where.repository} exists and is public; leave --private out, or make it private in its settings"
        )
    require_run_or_none(there)
    chosen = checked_license(license or there.license)
    with tempfile.TemporaryDirectory(prefix="interpreter-hub-") as temporary:
        sent = pack(Path(run), Path(temporary), allow_unfinished)
        write_card(sent, where, chosen)
        packed(sent)
        commit, is_new = push_folder(client, sent, there, private, message or _message(sent))
    return Pushed(HubName(where.repository, commit), is_new, f"{client.endpoint}/{where.repository}/commit/{commit}")


def repository_name(run: str | Path, name: str, revision: str) -> HubName:
    """The repository and branch to push to.

    Raises:
        ValueError: if they are invalid, or the run is not a directory of this computer.
    """
    if is_hub_name(run):
        raise ValueError(f"push takes the directory of a run, not {run}, which is on the hub already")
    if "@" in name:
        raise ValueError(f"{name}: give the branch with --revision")
    if is_commit(revision):
        raise ValueError(f"--revision {revision} is a commit, which never changes; give a branch")
    return parse_name(f"{name}@{revision}")


def checked_license(license: str | None) -> str:
    """The licence for the model card.

    Raises:
        ValueError: if there is none, or it is not an identifier of the hub.
    """
    if not license:
        raise ValueError("give a licence for the weights, for example --license apache-2.0")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"--license {license} is no identifier of the hub, such as apache-2.0, mit, cc-by-4.0 or cc-by-nc-4.0; all "
            "of them: https://huggingface.co/docs/hub/repositories-licenses"
        )
    return license


def _message(packed: Packed) -> str:
    steps = ", ".join(f"{key} stage, step {step}" for key, step in packed.steps.items())
    return f"Upload a run of the method {packed.method.name}: {steps}"


@dataclass(frozen=True)
class Repository:
    """The state of a repository before a push.

    Attributes:
        name: its name, with the branch to push to.
        license: licence on its model card.
        is_private: whether it is hidden from others.
        has_branch: whether the branch exists. A new branch starts from the newest commit of main.
        commit: newest commit of the branch, or the commit from which it will start; None without a repository.
        files: files of that commit.
    """

    name: HubName
    exists: bool
    license: str | None
    is_private: bool
    has_branch: bool
    commit: str | None
    files: dict[str, RemoteFile]


def look_up(client: "HfApi", name: HubName) -> Repository:
    """The repository that the hub has under a name.

    Raises:
        OSError, ValueError: if the hub cannot be reached, refuses, or gives an invalid answer.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    with explained(name):
        try:
            info = client.model_info(name.repository, files_metadata=True, timeout=10)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Repository(name, False, None, False, False, None, {})
        license = info.card_data.license if info.card_data and isinstance(info.card_data.license, str) else None
        try:
            branch = client.model_info(name.repository, revision=name.revision, files_metadata=True, timeout=10)
        except RevisionNotFoundError:
            return Repository(name, True, license, bool(info.private), False, *read_listing(info))
        return Repository(name, True, license, bool(info.private), True, *read_listing(branch))


def require_run_or_none(there: Repository) -> None:
    """Refuse to replace the files of another program, such as a model of transformers.

    Raises:
        ValueError: if the repository has a ``config.json`` that is not of a run.
        OSError: if that file cannot be downloaded.
    """
    config = there.files.get(CONFIG)
    if config is None or there.commit is None:
        return
    content = None
    if config.size <= LARGEST_CONFIG:
        folder = snapshot_folder(cache_folder(), there.name, there.commit)
        download(HubName(there.name.repository, there.commit), config, folder)
        with suppress(ValueError, RecursionError):  # not JSON
            content = json.loads((folder / CONFIG).read_bytes())
    if not isinstance(content, dict) or not {"method", "stages"} <= content.keys():
        raise ValueError(
            f"hub:{there.name.repository} is not a run: its {CONFIG} is not one of interpreter.hub "
            "push, and would be replaced; give the name of another repository, or delete that file first"
        )


def push_folder(client: "HfApi", packed: Packed, there: Repository, private: bool, message: str) -> tuple[str, bool]:
    """Replace the files of a run in the branch by those of a packed run, in one commit. Other files stay.

    Args:
        client: client of the hub.
        packed: the run.
        there: state of the repository.
        private: whether a new repository is private.
        message: message of the commit.

    Returns:
        The commit, and whether it is a new one.

    Raises:
        OSError, ValueError: if the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    name, folder, files = there.name, packed.folder, packed.files
    changed = [f for f in files if f not in there.files or not there.files[f].matches(folder / f)]
    removed = sorted(run_files(there.files) - set(files))
    if there.has_branch and there.commit and not changed and not removed:
        return there.commit, False
    with explained(name):
        if not there.exists:
            client.create_repo(name.repository, private=private, exist_ok=True)
        if not there.has_branch and name.revision != "main":
            client.create_branch(name.repository, branch=name.revision, revision=there.commit, exist_ok=True)
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationAdd(path, folder / path) for path in changed),
            *(CommitOperationDelete(path, is_folder=False) for path in removed),
        ]
        # With the parent commit, a push of another user in between is not overwritten: the hub refuses this one.
        made = client.create_commit(
            name.repository, operations, commit_message=message, revision=name.revision, parent_commit=there.commit
        )
    return made.oid, True


def _require_token(name: HubName) -> None:
    """Check that there is a token.

    Raises:
        ValueError: without a token. The message says how to log in.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise ValueError(f"to push to hub:{name.repository} you must be logged in to the hub; {LOG_IN}")
