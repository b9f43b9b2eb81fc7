"""Write generated scenes as a data set in the DAVIS 2017 layout: ``python -m interpreter.data.synthetic --help``."""

import signal
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from interpreter.data._progress import cpu_count, progress
from interpreter.data.layout import (
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
from interpreter.data.scenes import Scene, make_scene


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
    make_folders(root)
    with locked(root):
        claim(root / f"scenes-{split}.json", {**asdict(recipe), "num_videos": num_videos})
        missing = [i for i in range(num_videos) if not has_video(root, recipe.name(i))]
        _write_all(root, recipe, missing, workers or cpu_count())
        write_set(root, split, (recipe.name(i) for i in range(num_videos)))


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
    """Render and write one video."""
    frames, masks = recipe.scene(index).render()
    # Full chroma resolution: object borders are often borders of hue.
    jpegs = (encoded(Image.fromarray(frame), "JPEG", quality=95, subsampling=0) for frame in frames)
    write_video(
        root,
        recipe.name(index),
        (Picture(t, ".png", encoded_mask(mask)) for t, mask in enumerate(masks)),
        (Picture(t, ".jpg", jpeg) for t, jpeg in enumerate(jpegs)),
    )


if __name__ == "__main__":
    import sys

    import tyro

    try:
        tyro.cli(generate_scenes, prog="python -m interpreter.data.synthetic")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
