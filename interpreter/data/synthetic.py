"""Write generated scenes as a data set in the DAVIS 2017 layout: ``python -m interpreter.data.synthetic --help``."""

import os
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from interpreter.cli import run_command
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
from interpreter.interrupts import inherited_deafness


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
    make it. Videos appear whole (written aside, then renamed), so an interrupted run can be continued; a finished set is
    left as it is; asking for more videos adds to it. Read it with
    ``open_dataset("synthetic", root, split)``.

    With several workers a script that calls this needs the usual ``def main() -> int:
    """The command line."""
    tyro.cli(generate_scenes, prog="python -m interpreter.data.synthetic")
    return 0


if __name__ == "__main__":
    run_command(main, stopped="Finished videos are kept. Rerun the same command to continue.")
