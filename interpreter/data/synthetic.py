"""Write generated scenes as a data set in the DAVIS 2017 layout: ``python -m interpreter.data.synthetic --help``."""

import json
import shutil
import signal
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from interpreter.data._progress import cpu_count, progress
from interpreter.data.scenes import Scene, make_scene

_FRAMES, _MASKS, _SETS = "JPEGImages/480p", "Annotations_unsupervised/480p", "ImageSets/2017"


@dataclass(frozen=True)
class _Recipe:
    """All that decides the pixels of a video, apart from its index. Raise ``version`` when the pictures change."""

    seed: int
    size: tuple[int, int]
    num_frames: int
    split: str
    version: int = 1

    def name(self, index: int) -> str:
        return f"{self.split}-{index:05d}"

    def scene(self, index: int) -> Scene:
        # The split is part of the seed, so train and val differ; nothing else is, so the worker does not matter.
        rng = np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), index])
        return make_scene(rng, self.size, self.num_frames)


def generate_scenes(
    root: Path,
    num_videos: int = 200,
    seed: int = 0,
    size: tuple[int, int] = (128, 192),
    num_frames: int = 24,
    workers: int | None = None,
    split: str = "train",
) -> None:
    """Generate videos of moving, occluding, textured objects with exact masks.

    Each video shows 3 to 8 objects. It depends on seed, split and its index alone, bit for bit, however many workers
    make it. Videos appear whole (written aside, then renamed), so an interrupted run goes on where it stopped; a
    finished set is left as it is; asking for more videos adds to it. Read it with
    ``open_dataset("synthetic", root, split)``.

    With several workers a script that calls this needs the usual ``if __name__ == "__main__":``, because they are
    spawned.

    Args:
        root: folder to write to, in the DAVIS 2017 layout; several splits can share it.
        num_videos: how many videos the split has.
        seed: 0 or more; another seed gives other videos.
        size: height and width of the frames in pixels, each at least 32.
        num_frames: frames per video.
        workers: processes; by default one per core.
        split: name of the image set.

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
    recipe = _Recipe(seed, size, num_frames, split)
    for part in (_FRAMES, _MASKS, _SETS):
        (root / part).mkdir(parents=True, exist_ok=True)
    with _lock(root):
        _claim(root, recipe, num_videos)
        missing = [i for i in range(num_videos) if not (root / _FRAMES / recipe.name(i)).is_dir()]
        _write_all(root, recipe, missing, workers or cpu_count())
        _write_text(root / _SETS / f"{split}.txt", "".join(f"{recipe.name(i)}\n" for i in range(num_videos)))


def _claim(root: Path, recipe: _Recipe, num_videos: int) -> None:
    """Note the parameters in a manifest, or compare with those that are there."""
    manifest = root / f"scenes-{recipe.split}.json"
    wanted = json.loads(json.dumps({**asdict(recipe), "num_videos": num_videos}))
    if manifest.exists():
        found = json.loads(manifest.read_text(encoding="utf-8"))
        different = [
            f"{k}={found.get(k)} (now {v})" for k, v in wanted.items() if k != "num_videos" and found.get(k) != v
        ]
        if found["num_videos"] > num_videos:
            different.append(f"num_videos={found['num_videos']} (now {num_videos})")
        if different:
            raise ValueError(
                f"{manifest}: this split was generated with {', '.join(different)}; "
                "choose another root or split, or delete this one"
            )
    _write_text(manifest, json.dumps(wanted, indent=2) + "\n")


def _write_all(root: Path, recipe: _Recipe, indices: list[int], workers: int) -> None:
    description = f"generating {recipe.split} scenes"
    workers = min(workers, len(indices))
    if workers <= 1:
        for i in progress(indices, len(indices), description):
            _write_video(root, recipe, i)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_leave_interrupts) as pool:
        done = pool.map(_write_video, repeat(root), repeat(recipe), indices)
        for _ in progress(done, len(indices), description):
            pass


def _leave_interrupts() -> None:
    """Ctrl-C is the parent's business: it cancels what has not begun and lets the videos in work finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_video(root: Path, recipe: _Recipe, index: int) -> None:
    """Render and write one video: masks first, so that a video whose frames are there is complete."""
    frames, masks = recipe.scene(index).render()
    name = recipe.name(index)
    for part, pictures in ((_MASKS, masks), (_FRAMES, frames)):
        partial, final = root / part / f".{name}.partial", root / part / name
        for leftover in (partial, final):  # of an interrupted run
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        for t, picture in enumerate(pictures):
            image = Image.fromarray(picture)
            if part == _MASKS:
                image.putpalette(_PALETTE)
                image.save(partial / f"{t:05d}.png")
            else:
                # Full chroma resolution: object borders are often borders of hue.
                image.save(partial / f"{t:05d}.jpg", quality=95, subsampling=0)
        partial.rename(final)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Let one process at a time write to a root; the others wait, and then find the work done."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock, so do not start two runs there
        yield
        return
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _palette() -> list[int]:
    """The colour map of PASCAL VOC and DAVIS: the bits of an id, spread over the high bits of red, green and blue."""
    ids = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours.ravel().tolist()


_PALETTE = _palette()


if __name__ == "__main__":
    import sys

    import tyro

    try:
        tyro.cli(generate_scenes, prog="python -m interpreter.data.synthetic")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
