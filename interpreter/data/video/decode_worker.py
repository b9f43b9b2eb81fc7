"""The main program of the decoding processes of the ``pyav`` loader.

Jobs arrive as pickles on standard input. Pixels are written to the shared memory of the file descriptor, replies as
pickles to standard output. The process ends when its input ends, so it ends with its parent. It is a separate program
instead of a process of `multiprocessing`, because it then imports neither torch nor the caller's main module, and
starts in a third of a second.
"""

import os
import pickle
import signal
import sys
from typing import NamedTuple

import numpy as np

from interpreter.data.video.base import VideoError
from interpreter.data.video.squares import read_squares


class Job(NamedTuple):
    """Frames of one video, and where their pixels go."""

    video: int
    frames: list[int]
    flip: bool
    places: list[int]  # offsets in the shared memory, in bytes
    offsets: list[float] | None = None  # places of the squares; None for whole frames


class Failure(NamedTuple):
    """Why a job failed."""

    message: str
    damaged: bool  # whether it was a `VideoError`


def main(memory: int) -> None:
    """Do jobs until the input ends. ``memory`` is the file descriptor of the shared memory."""
    # Ctrl-C and Slurm's SIGTERM reach every process. The training process decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not be mixed with the replies
    videos, size = pickle.load(requests)
    while True:
        try:
            job: Job = pickle.load(requests)
        except EOFError:
            return
        reply = None
        try:
            video = videos[job.video]
            if job.offsets is None:
                pixels = video.read(job.frames, size)
            else:
                pixels = read_squares(video, job.frames, job.offsets, size[0])
            for frame, place in zip(pixels, job.places, strict=True):
                os.pwrite(memory, np.ascontiguousarray(frame[:, ::-1] if job.flip else frame).data, place)
        except Exception as error:
            reply = Failure(str(error) or type(error).__name__, isinstance(error, VideoError))
        try:
            pickle.dump(reply, replies)
            replies.flush()
        except BrokenPipeError:  # the parent has ended
            os._exit(0)
