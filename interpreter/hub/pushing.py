"""Sends runs to the Hugging Face hub."""

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
        name: with the commit.
        is_new: whether there was something to send; if not, the commit is an earlier one.
        url: of the commit.
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
        name: OWNER/NAME of the repository, which is made if it does not exist.
        license: of the weights, by the hub's identifier. Default: that of the repository's model card.
        private: whether a new repository is private.
        revision: branch; it is made if it does not exist.
        message: of the commit. Default: the method, and the steps of each stage.
        allow_unfinished: whether to send stages that have not reached their last step.
        packed: called with what will be sent, before it is.

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
        ValueError: if they are none, or the run is no directory of this computer.
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
        ValueError: if there is none, or it is no identifier.
    """
    if not license:
        raise ValueError("say under which licence others may use the weights: --license apache-2.0, for example")
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
    """A repository as it is before a push.

    Attributes:
        name: with the branch that is pushed to.
        license: on its model card.
        is_private: whether it is hidden from others.
        has_branch: whether it has the branch that is pushed to; a new branch starts from the newest commit of main.
        commit: the newest one of the branch, or the one that it will start from; None without a repository.
        files: of that commit.
    """

    name: HubName
    exists: bool
    license: str | None
    is_private: bool
    has_branch: bool
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
    """Refuse to replace the files of something else, such as a model of transformers.

    Raises:
        ValueError: if the repository holds a ``config.json`` that is not of a run.
        OSError: if that file cannot be fetched.
    """
    config = there.files.get(CONFIG)
    if config is None or there.commit is None:
        return
    content = None
    if config.size <= LARGEST_CONFIG:
        folder = snapshot_folder(cache_folder(), there.name, there.commit)
        download(HubName(there.name.repository, there.commit), config, folder)
        with suppress(ValueError, RecursionError):  # no JSON
            content = json.loads((folder / CONFIG).read_bytes())
    if not isinstance(content, dict) or not {"method", "stages"} <= content.keys():
        raise ValueError(
            f"hub:{there.name.repository} holds something else than a run: its {CONFIG} is not one of interpreter.hub "
            "push, and would be replaced; give the name of another repository, or delete that file first"
        )


def push_folder(client: "HfApi", packed: Packed, there: Repository, private: bool, message: str) -> tuple[str, bool]:
    """Make the branch hold exactly the files of a packed run, in one commit; files that are not part of a run stay.

    Args:
        client: of the hub.
        packed: the run.
        there: the repository as it is.
        private: whether a new repository is private.
        message: of the commit.

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
        # With the parent, a push of somebody else in between is refused, not overwritten.
        made = client.create_commit(
            name.repository, operations, commit_message=message, revision=name.revision, parent_commit=there.commit
        )
    return made.oid, True


def _require_token(name: HubName) -> None:
    """Refuse to send anything without a token.

    Raises:
        ValueError: says how to log in.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise ValueError(f"to push to hub:{name.repository} you must be logged in to the hub; {LOG_IN}")
