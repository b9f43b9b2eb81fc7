"""Fills the cache of a corpus that is too large for one machine, with Ray Data and fsspec URLs (``--engine ray``)."""

import os
import platform
import signal
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from interpreter.console import console
from interpreter.data import open_video
from interpreter.data.images import hidden
from interpreter.data.video import VIDEO_SUFFIXES
from interpreter.store.files import read_content
from interpreter.store.fill import Maker
from interpreter.versions import require_package

# (folder of the run's files, directory of the store) -> what computes the files; called in each of Ray's processes
OpenMaker = Callable[[Path, Path], Maker]


@dataclass(frozen=True)
class Corpus:
    """A corpus, and the URL that its files are written to.

    Attributes:
        source: any fsspec URL of a folder of video files and folders of frames.
        out: any fsspec URL for the files.
        workers: number of Ray's processes, each with one core and, if there are GPUs, one GPU.
    """

    source: str
    out: str
    workers: int = 2


class Worker:
    """One of Ray's processes: downloads a video, computes its files, and uploads them.

    Args:
        corpus: see :class:`Corpus`.
        open_maker: opens what computes the files.
        files: the files of the run that it needs, by path below the run. Nodes need not share a disk.
    """

    def __init__(self, corpus: Corpus, open_maker: OpenMaker, files: dict[str, bytes]) -> None:
        import fsspec

        self.name = f"{platform.node()} {os.getpid()}"
        self.home = tempfile.TemporaryDirectory()
        home = Path(self.home.name)
        for name, data in files.items():
            (home / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (home / "run" / name).write_bytes(data)
        self.source, self.source_root = fsspec.core.url_to_fs(corpus.source)
        self.out, self.out_root = fsspec.core.url_to_fs(corpus.out)
        self.maker = open_maker(home / "run", home / "cache")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Compute the files of video ``row["name"]``. Returns how many were missing, or the error."""
        name = row["name"]
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / name
            self.source.get(f"{self.source_root}/{name}", str(local), recursive=row["folder"])
            try:
                video = open_video(local)
                video.check()
                content = read_content(video)
                missing = []
                for flip, store in self.maker.stores.items():
                    target, size = (
                        self._target(store.path(content.digest)),
                        store.num_bytes(content.digest, self.maker.rows(video)),
                    )
                    # Objects appear complete at the end of an upload. A partial object has another size.
                    if not self.out.exists(target) or self.out.size(target) != size:
                        missing.append(flip)
                self.maker.make(video, content, missing, lambda: None)
            except ValueError as error:
                return {"name": name, "made": 0, "worker": self.name, "error": str(error).replace(f"{folder}/", "")}
            for flip in missing:
                path = self.maker.stores[flip].path(content.digest)
                target = self._target(path)
                self.out.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                partial = f"{target}.{name}.{token_hex(4)}.tmp"  # another job may write the same file
                self.out.put(str(path), partial)
                self.out.mv(partial, target)
                path.unlink()
        return {"name": name, "made": len(missing), "worker": self.name, "error": ""}

    def _target(self, path: Path) -> str:
        return f"{self.out_root}/{path.parent.name}/{path.name}"


def fill(corpus: Corpus, open_maker: OpenMaker, run: Path, needed: Sequence[Path]) -> None:
    """Compute the missing files of a corpus, on the cluster that RAY_ADDRESS names, or else on this machine.

    Args:
        corpus: the videos, and the URL of the files.
        open_maker: opens what computes the files. Ray sends it to its processes.
        run: run directory.
        needed: files of the run that ``open_maker`` reads.

    Raises:
        ValueError: if an option or Ray is missing, or videos are damaged (all others are then finished).
        FileNotFoundError: if there are no videos.
    """
    try:
        import fsspec
        import ray
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'ray[data]' fsspec") from error
    require_package("ray")
    system, root = fsspec.core.url_to_fs(corpus.source)
    items = videos_among(system.ls(root, detail=True) if system.exists(root) else [])
    if not items:
        raise FileNotFoundError(f"no video files and no folders of frames directly below {corpus.source}")
    files = {path.relative_to(run).as_posix(): path.read_bytes() for path in needed}
    console.print(f"{len(items)} videos at {corpus.source}, files go to {corpus.out}", highlight=False, soft_wrap=True)
    on_termination = signal.getsignal(signal.SIGTERM)
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, on_termination)  # Ray's own handler would end this process with status 15
    import torch

    results = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map(
            Worker,  # type: ignore[arg-type]
            fn_constructor_args=(corpus, open_maker, files),
            # One video at a time: the next goes to the first free worker.
            compute=ray.data.ActorPoolStrategy(size=corpus.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=1 if torch.cuda.is_available() else 0,
        )
        .take_all()
    )
    made = sum(result["made"] for result in results)
    workers = len({result["worker"] for result in results})
    console.print(f"{made} files made, {len(results)} videos looked at, workers: {workers}")
    damaged = [result["error"] for result in results if result["error"]]
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(results)} videos were left out: {'; '.join(sorted(damaged))}")


def videos_among(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The names of the video files and folders in a folder that fsspec lists, without hidden ones."""
    items = []
    for entry in entries:
        name, folder = entry["name"].rstrip("/").rsplit("/", 1)[-1], entry["type"] == "directory"
        if not hidden(name) and (folder or Path(name).suffix.lower() in VIDEO_SUFFIXES):
            items.append({"name": name, "folder": folder})
    return items
