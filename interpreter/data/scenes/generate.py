"""Write generated scenes as a data set in the DAVIS 2017 layout."""

import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import tee
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from PIL import Image

from interpreter.console import tracked
from interpreter.data.datasets.layout import (
    Picture,
    claim,
    encoded,
    encoded_mask,
    has_video,
    locked,
    make_folders,
    write_set,
    write_video,
)
from interpreter.data.scenes.scene import MOST_OBJECTS, Scene, make_scene
from interpreter.data.threads import cpu_count, reading_threads
from interpreter.interrupts import SIGNALS


@dataclass(frozen=True)
class _Recipe:
    """All settings that determine a video, apart from its index. Raise ``version`` when the pictures change.

    Settings that were added after version 1 are recorded only if they differ from their defaults.
    """

    seed: int
    size: tuple[int, int]
    num_frames: int
    split: str
    version: int = 1
    objects: tuple[int, int] = (3, 8)
    absences: bool = False

    def name(self, index: int) -> str:
        return f"{self.split}-{index:05d}"

    def scene(self, index: int) -> Scene:
        # The split is part of the seed, so train and val differ. The worker is not, so results do not depend on it.
        rng = np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), index])
        return make_scene(rng, self.size, self.num_frames, self.objects, self.absences)


def generate_scenes(
    root: Path,
    num_videos: int = 200,
    seed: int = 0,
    size: tuple[int, int] = (128, 192),
    num_frames: int = 24,
    workers: int | None = None,
    split: str = "train",
    objects: tuple[int, int] = (3, 8),
    absences: bool = False,
) -> None:
    """Generate videos of moving, occluding, textured objects with exact masks.

    Each video depends only on these arguments and its index, bit for bit, for any number of videos and workers. If
    interrupted, repeat the call to resume. A finished split is not changed; a larger ``num_videos`` adds videos. Read
    the scenes with ``open_dataset("synthetic", root, split)``.

    >>> generate_scenes(folder / "scenes", num_videos=2, size=(48, 64), num_frames=3, workers=1)
    >>> open_dataset("synthetic", folder / "scenes", "train")[0]
    FrameFolder('...train-00000', 48x64)

    Args:
        root: folder to write to, in the DAVIS 2017 layout; several splits can share it.
        num_videos: number of videos in the split.
        seed: 0 or more; another seed gives other videos.
        size: height and width of the frames in pixels, each at least 32.
        num_frames: frames per video.
        workers: processes; by default one per core.
        split: name of the image set.
        objects: fewest and most objects of a video, 1 to 12. All numbers from one to the other are equally frequent.
        absences: objects leave the view for about 10 to 60 frames and return with the same id, again and again, and
            the camera wanders; for videos of 100 frames or more. At least one object is in view in every frame, so a
            single object never leaves.

    Raises:
        ValueError: if an argument is out of range, or the split exists with other parameters or more videos.
    """
    size = (int(size[0]), int(size[1]))
    if min(num_videos, num_frames) < 1 or seed < 0 or min(size) < 32 or (workers is not None and workers < 1):
        raise ValueError(
            f"need num_videos, num_frames and workers >= 1, seed >= 0 and both sides >= 32, not "
            f"num_videos={num_videos}, num_frames={num_frames}, workers={workers}, seed={seed}, size={size}"
        )
    if not split or not split.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"split must be made of letters, digits, - and _, not {split!r}")
    fewest, most = objects
    if not 1 <= fewest <= most <= MOST_OBJECTS:
        raise ValueError(
            f"objects must be the fewest and the most of a scene, from 1 to {MOST_OBJECTS}, not {fewest} and {most}"
        )
    recipe = _Recipe(seed, size, num_frames, split, objects=(fewest, most), absences=absences)
    make_folders(root)
    with locked(root):
        younger = {"objects": _Recipe.objects, "absences": _Recipe.absences}
        claim(root / f"scenes-{split}.json", {**asdict(recipe), "num_videos": num_videos}, younger)
        missing = [i for i in range(num_videos) if not has_video(root, recipe.name(i))]
        _write_all(root, recipe, missing, workers or cpu_count())
        write_set(root, split, (recipe.name(i) for i in range(num_videos)))


def _write_all(root: Path, recipe: _Recipe, indices: list[int], workers: int) -> None:
    description = f"generating {recipe.split} scenes"
    workers = min(workers, len(indices))
    if workers <= 1:
        for i in tracked(indices, len(indices), description):
            _write_video(root, recipe, i)
        return
    with reading_threads(workers) as pool, ExitStack() as started:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(workers):
            idle.put(started.enter_context(_Worker(root, recipe)))

        def write(index: int) -> None:
            worker = idle.get()
            try:
                worker.write_video(index)
            finally:
                idle.put(worker)

        for _ in tracked(pool.map(write, indices), len(indices), description):
            pass


class _Worker:
    """A process that renders and writes videos. It ends with the ``with`` block, or with the process that started it.

    It is a separate program instead of a process of `multiprocessing`: it imports neither torch nor the caller's main
    module, Ctrl-C does not reach it, and it ends if its parent is killed.
    """

    def __init__(self, root: Path, recipe: _Recipe) -> None:
        self._setup = json.dumps([str(root), asdict(recipe)])

    def __enter__(self) -> "_Worker":
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from interpreter.data.scenes.generate import _serve; _serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        self._send(self._setup)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def write_video(self, index: int) -> None:
        """Let the process write a video, and wait for it."""
        self._send(str(index))
        assert self._process.stdout is not None
        reply = self._process.stdout.readline()
        if not reply:
            raise ChildProcessError(f"a process that renders scenes ended with status {self._process.wait()}")
        if problem := json.loads(reply):
            raise OSError(*problem)

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; the missing reply shows it
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()


def _serve() -> None:
    """The worker's main function: reads video numbers from standard input, prints a line for each finished video."""
    for number in SIGNALS:  # a scheduler sends these signals to every process; the parent decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    root, recipe = json.loads(sys.stdin.readline())
    recipe = _Recipe(**{**recipe, "size": tuple(recipe["size"]), "objects": tuple(recipe["objects"])})
    indices: SimpleQueue[int] = SimpleQueue()

    def receive() -> None:
        for line in sys.stdin:
            indices.put(int(line))
        os._exit(0)  # the parent has ended: drop unfinished work

    threading.Thread(target=receive, daemon=True).start()
    while True:
        problem = None
        try:
            _write_video(Path(root), recipe, indices.get())
        except OSError as error:
            problem = [error.errno, error.strerror, error.filename]
        print(json.dumps(problem), flush=True)


def _write_video(root: Path, recipe: _Recipe, index: int) -> None:
    """Render and write one video, frame by frame."""
    frames, masks = tee(recipe.scene(index).frames())  # frames and masks are taken in turn, so one frame is in memory
    write_video(
        root,
        recipe.name(index),
        (Picture(t, ".png", encoded_mask(mask)) for t, (_, mask) in enumerate(masks)),
        # Full chroma resolution: object borders are often borders of hue.
        (
            Picture(t, ".jpg", encoded(Image.fromarray(frame), "JPEG", quality=95, subsampling=0))
            for t, (frame, _) in enumerate(frames)
        ),
    )
