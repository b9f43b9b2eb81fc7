"""Looking at every file of a data set: what is there, what is missing, what is corrupt, and whether splits leak."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from interpreter.console import tracked
from interpreter.data.datasets.unopened import UnopenedVideo
from interpreter.data.images import read_rgb
from interpreter.data.threads import cpu_count, reading_threads
from interpreter.data.video import VideoError


@dataclass
class Findings:
    """What is in some videos.

    Attributes:
        videos, frames, masks: how many there are; masks counts annotated frames.
        problems: one line for each file that is missing or corrupt; names it.
    """

    videos: int = 0
    frames: int = 0
    masks: int = 0
    problems: list[str] = field(default_factory=list)


def check_sources(sources: Sequence[UnopenedVideo]) -> Findings:
    """Decode every frame and every mask, in threads, with a progress bar."""
    total = Findings()
    with reading_threads(cpu_count()) as pool:
        for found in tracked(pool.map(_check, sources), len(sources), "checking videos"):
            total.videos += found.videos
            total.frames += found.frames
            total.masks += found.masks
            total.problems += found.problems
    return total


def _check(source: UnopenedVideo) -> Findings:
    found = Findings(videos=1)
    for file in source.files:
        try:
            read_rgb(file)
        except FileNotFoundError:
            found.problems.append(f"{file}: missing")
        except (OSError, SyntaxError, ValueError) as error:
            found.problems.append(f"{file}: damaged or no image ({' '.join(str(error).split())})")
    if found.problems:  # without its frames nothing can be said of a video
        return found
    try:
        video, annotation = source.open()
        video.check()
        found.frames = video.num_frames
    except (VideoError, OSError) as error:
        found.problems.append(str(error))
        return found
    if annotation is None:
        return found
    for frame in annotation.frames:
        try:
            annotation.read(frame, (video.height, video.width))
            found.masks += 1
        except (VideoError, OSError) as error:
            found.problems.append(str(error))
    return found


def find_leaks(training: Sequence[UnopenedVideo], held_out: Sequence[UnopenedVideo]) -> list[str]:
    """Videos that are in both of two splits: by id, by name (the folder of their frames) or by their first frame.

    Returns:
        One line for each, empty if there are none. Copies under other names are found if the bytes of their first
        frame are the same.
    """
    leaks = []
    for what, key in (("id", _id), ("folder of frames", _name), ("first frame", _first_frame)):
        known = {value: source for source in held_out if (value := key(source)) is not None}
        for source in training:
            if (value := key(source)) is not None and value in known:
                leaks.append(f"{source.path} and {known[value].path} have the same {what}")
    return leaks


def _id(source: UnopenedVideo) -> str | None:
    return None if source.id is None else repr(source.id)


def _name(source: UnopenedVideo) -> str:
    return source.name


def _first_frame(source: UnopenedVideo) -> str | None:
    if not source.files or not source.files[0].is_file():
        return None
    return hashlib.sha256(source.files[0].read_bytes()).hexdigest()
