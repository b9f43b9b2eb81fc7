"""Filling the cache: which files are missing, whether they fit on the disk, and which process makes them."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from interpreter.console import console, gigabytes, progress_bar
from interpreter.data import Video
from interpreter.data.frame_index import FrameIndex
from interpreter.data.threads import cpu_count, reading_threads
from interpreter.locks import Lock
from interpreter.store.files import Content, Store, read_content
from interpreter.store.table import FrameTable

POLL_SECONDS = 0.5
BLOCK = 4096


class Abandoned(Exception):
    """The process ends, or another video failed: unfinished files are dropped."""


class Maker(Protocol):
    """What makes the files of one kind.

    Attributes:
        name: what the files hold, for messages.
        unit: what a row of a file is of, for messages: "frames", or "windows" of them.
        stores: one for each flip.
    """

    name: str
    unit: str
    stores: Mapping[bool, Store]

    def rows(self, video: Video) -> int:
        """How many rows the tensors of a video have."""

    def make(self, video: Video, content: Content, flips: Sequence[bool], check: Callable[[], None]) -> None:
        """Write the files of a video.

        Args:
            video: the video.
            content: what :func:`read_content` returned for it.
            flips: which of the files.
            check: called every few frames; raises if the work has to stop.

        Raises:
            ValueError: if the video is damaged, or changed since it was hashed; nothing is written then.
        """


@dataclass(frozen=True)
class Shard:
    """This process's share of the videos: every ``world``-th, from ``rank`` on."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Shard":
        """The share that torchrun gives this process.

        Raises:
            ValueError: if RANK and WORLD_SIZE make no sense.
        """
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ValueError(f"RANK={rank} and WORLD_SIZE={world} are not a rank and a number of ranks above it")
        return cls(int(rank), int(world))


def read_contents(videos: Sequence[Video], workers: int) -> list[Content]:
    """Hash the bytes of all videos, in threads, with a progress bar."""
    with progress_bar("videos") as progress, reading_threads(workers) as pool:
        bar = progress.add_task("hash videos", total=len(videos), status="")
        contents = []
        for content in pool.map(read_content, videos):
            contents.append(content)
            progress.advance(bar)
        return contents


def default_workers() -> int:
    """Videos at a time: enough to decode one while another is encoded, few enough to fit into memory."""
    return min(4, cpu_count())


class Cache:
    """The files that a maker makes of a set of videos.

    Args:
        maker: computes the files; its stores are where they go.
        videos: the videos; two of the same content share their files.
        contents: what :func:`read_contents` returned for them.
    """

    def __init__(self, maker: Maker, videos: Sequence[Video], contents: Sequence[Content]) -> None:
        self.maker, self.videos, self.contents = maker, videos, contents
        self.name, self.root = maker.name, maker.stores[False].directory.parent
        self.lengths = [maker.rows(video) for video in videos]

    def table(self) -> FrameTable:
        """Rows of all videos; every file has to exist."""
        return FrameTable(self.maker.stores, [content.digest for content in self.contents], FrameIndex(self.lengths))

    def missing(self) -> dict[int, list[bool]]:
        """Flips whose files are absent or incomplete, by number of the video; complete videos are left out."""
        missing, seen = {}, set()
        for number, (content, length) in enumerate(zip(self.contents, self.lengths, strict=True)):
            flips = [flip for flip, store in self.maker.stores.items() if not store.holds(content.digest, length)]
            if flips and content.digest not in seen:
                missing[number] = flips
            seen.add(content.digest)
        return missing

    def num_bytes(self, flips_of: Mapping[int, Sequence[bool]] | None = None) -> int:
        """Exact size of the files of the wanted videos and flips, by default of all."""
        if flips_of is None:
            first = {content.digest: number for number, content in reversed(list(enumerate(self.contents)))}
            flips_of = {number: list(self.maker.stores) for number in first.values()}
        return sum(
            self.maker.stores[flip].num_bytes(self.contents[number].digest, self.lengths[number])
            for number, flips in flips_of.items()
            for flip in flips
        )

    def other_stores(self) -> list[Path]:
        """Directories of stores of the same kind that were made by another recipe."""
        own = {store.directory for store in self.maker.stores.values()}
        kind = self.maker.stores[False].recipe["kind"]
        return sorted(path for path in self.root.glob(f"{kind}-*") if path not in own)

    @staticmethod
    def delete(directories: Sequence[Path]) -> int:
        """Delete stores; returns their number of bytes."""
        freed = 0
        for directory in directories:
            with suppress(FileNotFoundError):  # another process deletes it too
                freed += sum(file.stat().st_size for file in directory.iterdir())
                shutil.rmtree(directory)
        return freed

    def free_bytes(self) -> int:
        """Room on the disk."""
        place = self.root
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def fill(self, shard: Shard, workers: int, advice: str) -> None:
        """Make this process's share of what is missing; prints the size first.

        Files of finished videos stay, whatever ends the call. Processes that fill one cache at the same time share the
        work: each skips the videos that another one is making, and returns when these are there.

        Args:
            shard: which videos.
            workers: videos at a time.
            advice: what to do if the disk is too small.

        Raises:
            OSError: if the disk cannot hold it; nothing was written then.
            ValueError: if a video is damaged, or changed meanwhile.
        """
        self._remove_leftovers()
        missing = self.missing()
        needed, free = self.num_bytes(missing), self.free_bytes()
        there = len({content.digest for content in self.contents}) - len(missing)
        console.print(
            f"{self.name} of {len(self.videos)} videos, {sum(self.lengths)} {self.maker.unit}"
            f"{', both flips' if True in self.maker.stores else ''}: {gigabytes(self.num_bytes())} in {self.root}; "
            f"{there} videos are there, {len(missing)} to make ({gigabytes(needed)}, {gigabytes(free)} free)",
            highlight=False,
            soft_wrap=True,
        )
        # A file takes whole blocks of the disk.
        if needed + BLOCK * sum(map(len, missing.values())) > free:
            raise OSError(
                errno.ENOSPC,
                f"the {self.name} need {gigabytes(needed)}, but {self.root} has {gigabytes(free)} free; {advice}",
            )
        if missing and shard.rank == 0:
            for store in self.maker.stores.values():
                store.describe()
        mine = {number: flips for number, flips in missing.items() if number % shard.world == shard.rank}
        if mine:
            self._make(mine, workers)

    def _make(self, flips_of: Mapping[int, list[bool]], workers: int) -> None:
        ending = threading.Event()
        # Kernels run on the device that is current for their thread.
        begin = partial(torch.cuda.set_device, torch.cuda.current_device()) if torch.cuda.is_available() else None
        with progress_bar(self.maker.unit) as progress, ThreadPoolExecutor(workers, initializer=begin) as pool:
            total = sum(self.lengths[number] for number in flips_of)
            bar = progress.add_task(self.name, total=total, status="")
            try:
                left = list(flips_of)
                for patient in (False, True):
                    task = partial(self._make_video, flips_of, patient, ending)
                    waiting, left = left, []
                    for number, owner in _in_pool(pool, workers, task, waiting):
                        if owner:
                            left.append(number)
                            others = owner
                        else:
                            progress.update(bar, advance=self.lengths[number], status=self.videos[number].name)
                    if left:
                        text = f"waiting for {others}; videos that other processes are computing: {len(left)}"
                        console.print(text, highlight=False, soft_wrap=True)
            except BaseException:
                ending.set()
                raise

    def _make_video(
        self, flips_of: Mapping[int, Sequence[bool]], patient: bool, ending: threading.Event, number: int
    ) -> str:
        """Make the files of a video, and return "". Returns who makes them now, if another process does; if
        ``patient``, waits for it."""

        def check() -> None:
            if ending.is_set():
                raise Abandoned

        check()
        content, lock = self.contents[number], self._lock(number)
        while not lock.take():
            if not patient:
                return lock.owner()
            check()
            time.sleep(POLL_SECONDS)
        try:
            stores, length = self.maker.stores, self.lengths[number]
            flips = [flip for flip in flips_of[number] if not stores[flip].holds(content.digest, length)]
            if flips:
                self.maker.make(self.videos[number], content, flips, check)
        finally:
            lock.release()
        return ""

    def _lock(self, number: int) -> Lock:
        """The lock of the process that makes the files of a video."""
        return Lock(self.maker.stores[False].directory / f".{self.contents[number].digest}.lock")

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left of the files of these videos, and their locks."""
        digests = {content.digest for content in self.contents}
        for store in self.maker.stores.values():
            for path in store.directory.glob(".*"):
                digest = path.name.split(".")[1]
                lock = Lock(self.maker.stores[False].directory / f".{digest}.lock")
                with suppress(OSError):  # in a folder of another user they stay
                    if digest in digests and lock.take():
                        try:
                            if lock.exclusive and path.suffix == ".tmp":
                                path.unlink(missing_ok=True)
                        finally:
                            lock.release()

    def wait_for_others(self) -> None:
        """Return when the other processes have made their shares too."""
        while self.missing():
            time.sleep(POLL_SECONDS)


def _in_pool(
    pool: ThreadPoolExecutor, workers: int, task: Callable[[int], str], numbers: Sequence[int]
) -> Iterator[tuple[int, str]]:
    """Yield (number, task(number)) as tasks end; no more are submitted than can run, so none has to be taken back."""
    waiting = iter(numbers)
    running: dict[Future[str], int] = {}
    while True:
        while len(running) < workers and (number := next(waiting, None)) is not None:
            running[pool.submit(task, number)] = number
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()
