"""Fills the cache: which files are missing, whether they fit on the disk, and which process writes them."""

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
    """The process is ending, or another video failed. Unfinished files are deleted."""


class Maker(Protocol):
    """Computes the files of one kind.

    Attributes:
        name: contents of the files, for messages.
        unit: unit of the rows of a file, for messages: "frames" or "windows".
        stores: the store of each flip.
    """

    name: str
    unit: str
    stores: Mapping[bool, Store]

    def rows(self, video: Video) -> int:
        """Number of rows of the tensors of a video."""

    def make(self, video: Video, content: Content, flips: Sequence[bool], check: Callable[[], None]) -> None:
        """Write the files of a video.

        Args:
            video: the video.
            content: result of :func:`read_content` for it.
            flips: flips whose files are written.
            check: called every few frames. It raises an error if the work must stop.

        Raises:
            ValueError: if the video is damaged, or has changed since it was hashed. Then nothing is written.
        """


@dataclass(frozen=True)
class Shard:
    """The share of a process: every ``world``-th video, starting at ``rank``."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> "Shard":
        """The share of this process in a job of torchrun.

        Raises:
            ValueError: if RANK is not below WORLD_SIZE, or they are no whole numbers.
        """
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
            raise ValueError(
                f"RANK={rank} and WORLD_SIZE={world} are invalid: RANK must be a whole number from 0 to WORLD_SIZE - 1"
            )
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
    """Number of videos at a time: one is decoded while another is encoded, and they fit into memory."""
    return min(4, cpu_count())


class Cache:
    """The files that a maker computes for a set of videos.

    Args:
        maker: computes the files, and has the stores that they are written to.
        videos: the videos. Videos with the same content share their files.
        contents: result of :func:`read_contents` for them.
    """

    def __init__(self, maker: Maker, videos: Sequence[Video], contents: Sequence[Content]) -> None:
        self.maker, self.videos, self.contents = maker, videos, contents
        self.name, self.root = maker.name, maker.stores[False].directory.parent
        self.lengths = [maker.rows(video) for video in videos]

    def table(self) -> FrameTable:
        """Rows of all videos. Every file must exist."""
        return FrameTable(self.maker.stores, [content.digest for content in self.contents], FrameIndex(self.lengths))

    def missing(self) -> dict[int, list[bool]]:
        """Flips whose files are missing or incomplete, by number of the video. Complete videos are not listed."""
        missing, seen = {}, set()
        for number, (content, length) in enumerate(zip(self.contents, self.lengths, strict=True)):
            flips = [flip for flip, store in self.maker.stores.items() if not store.holds(content.digest, length)]
            if flips and content.digest not in seen:
                missing[number] = flips
            seen.add(content.digest)
        return missing

    def num_bytes(self, flips_of: Mapping[int, Sequence[bool]] | None = None) -> int:
        """Exact size of the files of some videos and flips, by default of all, in bytes."""
        if flips_of is None:
            first = {content.digest: number for number, content in reversed(list(enumerate(self.contents)))}
            flips_of = {number: list(self.maker.stores) for number in first.values()}
        return sum(
            self.maker.stores[flip].num_bytes(self.contents[number].digest, self.lengths[number])
            for number, flips in flips_of.items()
            for flip in flips
        )

    def other_stores(self) -> list[Path]:
        """Directories of stores of the same kind with another recipe."""
        own = {store.directory for store in self.maker.stores.values()}
        kind = self.maker.stores[False].recipe["kind"]
        return sorted(path for path in self.root.glob(f"{kind}-*") if path not in own)

    @staticmethod
    def delete(directories: Sequence[Path]) -> int:
        """Delete stores. Returns their size in bytes."""
        freed = 0
        for directory in directories:
            with suppress(FileNotFoundError):  # another process deletes it too
                freed += sum(file.stat().st_size for file in directory.iterdir())
                shutil.rmtree(directory)
        return freed

    def free_bytes(self) -> int:
        """Free space on the disk."""
        place = self.root
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def fill(self, shard: Shard, workers: int, advice: str) -> None:
        """Compute this process's share of the missing files. Prints their size first.

        Files of finished videos are kept, also if the call fails. Processes that fill the same cache at the same time
        share the work: each skips the videos that another one is processing, and returns when those are finished.

        Args:
            shard: share of the videos that this process computes.
            workers: number of videos at a time.
            advice: what to do if the disk is too small.

        Raises:
            OSError: if the disk is too small. Then nothing is written.
            ValueError: if a video is damaged, or changed during the call.
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
        # A file occupies whole blocks of the disk.
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
        """Compute the files of a video; return "". If another process does: return its name, or wait if ``patient``."""

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
        """The lock of the process that computes the files of a video."""
        return Lock(self.maker.stores[False].directory / f".{self.contents[number].digest}.lock")

    def _remove_leftovers(self) -> None:
        """Delete partial files and locks that killed processes left for these videos."""
        digests = {content.digest for content in self.contents}
        for store in self.maker.stores.values():
            for path in store.directory.glob(".*"):
                digest = path.name.split(".")[1]
                lock = Lock(self.maker.stores[False].directory / f".{digest}.lock")
                with suppress(OSError):  # files in a folder of another user stay
                    if digest in digests and lock.take():
                        try:
                            if lock.exclusive and path.suffix == ".tmp":
                                path.unlink(missing_ok=True)
                        finally:
                            lock.release()

    def wait_for_others(self) -> None:
        """Wait until the other processes have finished their shares."""
        while self.missing():
            time.sleep(POLL_SECONDS)


def _in_pool(
    pool: ThreadPoolExecutor, workers: int, task: Callable[[int], str], numbers: Sequence[int]
) -> Iterator[tuple[int, str]]:
    """Yield (number, task(number)) as tasks end. Only as many are submitted as can run, so none must be cancelled."""
    waiting = iter(numbers)
    running: dict[Future[str], int] = {}
    while True:
        while len(running) < workers and (number := next(waiting, None)) is not None:
            running[pool.submit(task, number)] = number
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()
