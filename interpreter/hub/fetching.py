"""Downloads runs from the Hugging Face hub into the cache of its client, and opens them there.

A repository is a run directory. Only the files of a run are downloaded, by exact names. Other files of the repository
are ignored. The SHA-256 (Git's SHA-1 for small files) of each file is compared with the one that the hub lists, before
the file enters the cache.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interpreter.console import console
from interpreter.engine.checkpoint import checkpoints
from interpreter.engine.run import RunConfig, read_config
from interpreter.files import write_text
from interpreter.hub.client import UnreachableError, cache_folder, explained, open_client
from interpreter.hub.contents import BACKBONE_FILES, backbone_paths, backbones_inside, require_publishable
from interpreter.hub.names import (
    HubName,
    is_commit,
    is_hub_name,
    parse_name,
    pinned_name,
    repository_folder,
    snapshot_folder,
)
from interpreter.locks import waiting_for

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

CONFIG = "config.json"
LARGEST_CONFIG = 1_000_000  # bytes
STAGE_KEY = re.compile(r"[a-z]+(-[0-9]+)?")
CHECKPOINT = re.compile(rf"(?P<key>{STAGE_KEY.pattern})/checkpoint-[0-9]{{8}}\.safetensors")
ABOUT = ("README.md", ".gitattributes")  # of every repository; not needed to use a run


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub.

    Attributes:
        path: in the repository.
        size: in bytes.
        digest: SHA-256 of a large file, Git's SHA-1 of a small one.
    """

    path: str
    size: int
    digest: str

    def matches(self, file: Path) -> bool:
        """Whether a file on this machine has the same size and digest."""
        return file.stat().st_size == self.size and digest(file, is_large=len(self.digest) == 64) == self.digest


def local_run(run: str | Path) -> Path:
    """The directory of a run. A run of the hub is downloaded first, and its commit is printed.

    Args:
        run: directory, or ``hub:OWNER/NAME``, optionally with ``@REVISION`` (branch, tag or commit).

    Raises:
        ValueError: if the name is invalid, the repository is not a run, or a file is not the one that the hub lists.
        OSError: if the repository does not exist, or cannot be reached and is not in the cache.
    """
    if not is_hub_name(run):
        return Path(run)
    folder = fetch(parse_name(run))
    console.print(f"run: {pinned_name(folder)}", markup=False, highlight=False, soft_wrap=True)
    return folder


def fetch(name: HubName) -> Path:
    """The directory of a run of the hub in the cache. Missing files are downloaded. A commit that is complete in the
    cache is used without a request.

    Raises:
        ValueError, OSError: as for :func:`local_run`.
    """
    client, cache = open_client(), cache_folder()
    if name.is_pinned and is_complete(folder := snapshot_folder(cache, name, name.revision)):
        return folder
    try:
        with explained(name):
            info = client.model_info(name.repository, revision=name.revision, files_metadata=True, timeout=10)
            commit, files = read_listing(info)
    except UnreachableError as error:
        return _last_known(name, cache, error)
    folder = snapshot_folder(cache, name, commit)
    if not is_complete(folder):
        home = repository_folder(cache, name)
        home.mkdir(parents=True, exist_ok=True)
        with waiting_for(home / ".interpreter.lock", f"the download of {name}"):
            try:
                _download_run(HubName(name.repository, commit), files, folder)
            except UnreachableError as error:
                raise UnreachableError(f"{error}. Rerun the same command to continue the download") from error
    if not name.is_pinned:
        with suppress(OSError):  # a read-only cache
            write_text(repository_folder(cache, name) / "refs" / name.revision, commit)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a folder of the cache contains all files of a run.

    Raises:
        ValueError: if it contains something that a run must not contain.
    """
    if not (folder / CONFIG).exists():
        return False
    stored = read_run(folder)
    newest = [checkpoints(folder / key)[-1:] for key in stored.stages]  # links, whose files may have been deleted
    inside = [folder / path for backbone in backbones_inside(stored) for path in backbone_paths(backbone)]
    return all(paths and paths[0].exists() for paths in newest) and all(path.exists() for path in inside)


def read_run(folder: Path) -> RunConfig:
    """The configuration of a run of the hub. It is checked, because other people wrote it.

    Raises:
        ValueError: if it is damaged, or names a file outside the run.
    """
    stored = read_config(folder)
    if strange := [key for key in stored.stages if not STAGE_KEY.fullmatch(key)]:
        raise ValueError(f"{pinned_name(folder)} is not a run: its {CONFIG} names a stage {strange[0]!r}")
    if not stored.stages:
        raise ValueError(f"{pinned_name(folder)} is not a run: its {CONFIG} names no trained stage")
    require_publishable(stored)
    return stored


def read_listing(info: "ModelInfo") -> tuple[str, dict[str, RemoteFile]]:
    """Commit and files of a repository.

    Raises:
        TypeError: if the answer is invalid.
    """
    files = {}
    for sibling in info.siblings or ():
        sha = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        path, size = sibling.rfilename, sibling.size
        if not isinstance(path, str) or not isinstance(size, int) or size < 0:
            raise TypeError(f"no size of {path!r}")
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", str(sha)):
            raise TypeError(f"no hash of {path!r}")
        files[path] = RemoteFile(path, size, str(sha))
    if not is_commit(str(info.sha)):
        raise TypeError(f"no commit but {info.sha!r}")
    return str(info.sha), files


def _last_known(name: HubName, cache: Path, error: UnreachableError) -> Path:
    """The run at the last known commit of its branch.

    Raises:
        UnreachableError: if it is not in the cache.
    """
    ref, commit = repository_folder(cache, name) / "refs" / name.revision, name.revision
    if not name.is_pinned:
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    folder = snapshot_folder(cache, name, commit)
    if not is_commit(commit) or not is_complete(folder):
        raise UnreachableError(
            f"{error}, and {name} is not in the cache {cache}. Check the network, or try again later. To "
            f"use it offline, download it first: python -m interpreter.hub pull {name}"
        ) from error
    console.print(f"{error}. Using {name.revision} as it was last downloaded", style="yellow", markup=False,
                  highlight=False, soft_wrap=True)  # fmt: skip
    return folder


def _download_run(name: HubName, files: dict[str, RemoteFile], folder: Path) -> None:
    """Download the missing files of a run. The configuration comes first, because it names the other files."""
    config = files.get(CONFIG)
    if config is None:
        raise ValueError(f"{name} is not a run: the repository has no {CONFIG}")
    if config.size > LARGEST_CONFIG:
        raise ValueError(f"{name} is not a run: its {CONFIG} has {config.size} bytes, more than {LARGEST_CONFIG}")
    download(name, config, folder)
    wanted = _files_of(read_run(folder), name, files)
    for file in wanted:
        download(name, file, folder)
    if others := len(files.keys() - {config.path, *(file.path for file in wanted), *ABOUT}):
        console.print(f"left out: {others} files of {name} that are not part of a run", style="yellow", highlight=False)


def _files_of(stored: RunConfig, name: HubName, files: dict[str, RemoteFile]) -> list[RemoteFile]:
    """The newest checkpoint of each stage, and the backbone if it is in the repository.

    Raises:
        ValueError: if one is missing.
    """
    wanted = []
    for key in stored.stages:
        found = [path for path in files if (match := CHECKPOINT.fullmatch(path)) and match["key"] == key]
        if not found:
            raise ValueError(f"{name} is not a complete run: it has no checkpoint of its {key} stage")
        wanted.append(files[max(found)])
    for backbone in backbones_inside(stored):
        if missing := [path for path in backbone_paths(backbone) if path not in files]:
            raise ValueError(f"{name} is not a complete run: it has no {missing[0]}, a file of its backbone")
        wanted += [files[path] for path in files if path.startswith(backbone) and path in BACKBONE_FILES]
    return wanted


def download(name: HubName, file: RemoteFile, folder: Path) -> None:
    """Download a file if it is missing, resume an earlier download, compare its digest, and link it into the folder.

    The layout equals the client's cache, ``blobs/DIGEST`` and links to it, so that its tools also list and delete
    runs. The client's own downloads compare only sizes, and restart an incomplete file from the beginning.

    Raises:
        ValueError: if the digest differs. The file is then removed.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    place, blob = folder / file.path, folder.parents[1] / "blobs" / file.digest
    if place.exists():
        return
    if not blob.exists() or not file.matches(blob):
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.unlink(missing_ok=True)
        partial = blob.with_name(f"{file.digest}.partial")
        url = hf_hub_url(name.repository, file.path, revision=name.revision)
        with explained(name), partial.open("ab") as out:
            if out.tell() > file.size:
                out.truncate(0)
            options: dict[str, Any] = {"expected_size": file.size, "displayed_filename": file.path}
            try:
                http_get(url, out, resume_size=out.seek(0, os.SEEK_END), headers=build_hf_headers(), **options)
            except OSError as error:
                if (sent := out.tell()) == file.size or getattr(error, "response", None) is not None or error.errno:
                    raise  # a refusal, or an error of this computer, for example a full disk
                raise OSError(
                    f"{name}: the hub sent {sent} bytes of {file.path}, which has {file.size}; rerun the same command"
                ) from error
        if not file.matches(partial):
            partial.unlink()
            raise ValueError(
                f"{name}: {file.path} was damaged on the way, or is not the file that the hub lists (its hash "
                "differs), and was removed. Rerun the same command; if it fails again, tell the owner of the repository"
            )
        partial.replace(blob)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)  # a link to a file that was deleted
    place.symlink_to(os.path.relpath(blob, place.parent))


def digest(file: Path, is_large: bool) -> str:
    """The digest of a file on the hub: SHA-256 of a large file, otherwise the SHA-1 of Git."""
    hashed = hashlib.sha256() if is_large else hashlib.sha1(b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as content:
        for chunk in iter(lambda: content.read(1 << 20), b""):
            hashed.update(chunk)
    return hashed.hexdigest()


def run_files(paths: Iterable[str]) -> set[str]:
    """The paths of a repository that are files of a run. A push replaces or deletes only these."""
    return {p for p in paths if p in (CONFIG, "README.md") or CHECKPOINT.fullmatch(p) or p in BACKBONE_FILES}
