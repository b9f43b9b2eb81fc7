"""Checks every file of a data set: which are missing or damaged, and whether two splits share videos."""

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
    """What a check found in some videos.

    Attributes:
        videos, frames, masks: their numbers; ``masks`` counts annotated frames.
        problems: one line for each missing or damaged file, with its name.
    """

    videos: int = 0
    frames: int = 0
    masks: int = 0
    problems: list[str] = field(default_factory=list)


def check_videos(videos: Sequence[UnopenedVideo]) -> Findings:
    """Decode every frame and every mask, in threads, with a progress bar."""
    total = Findings()
    with reading_threads(cpu_count()) as pool:
        for one in tracked(pool.map(_check, videos), len(videos), "checking"):
            total.videos += one.videos
            total.frames += one.frames
            total.masks += one.masks
            total.problems += one.problems
    return total


def _check(unopened: UnopenedVideo) -> Findings:
    findings = Findings(videos=1)
    for file in unopened.files:
        try:
            read_rgb(file)
        except FileNotFoundError:
            findings.problems.append(f"{file}: missing")
        except (OSError, SyntaxError, ValueError) as error:
            findings.problems.append(f"{file}: damaged or no image ({' '.join(str(error).split())})")
    if findings.problems:  # a video cannot be opened without its frames
        return findings
    try:
        video, annotation = unopened.open()
        video.check()
        findings.frames = video.num_frames
    except (VideoError, OSError) as error:
        findings.problems.append(str(error))
        return findings
    if annotation is None:
        return findings
    for frame in annotation.frames:
        try:
            annotation.read(frame, (video.height, video.width))
            findings.masks += 1
        except (VideoError, OSError) as error:
            findings.problems.append(str(error))
    return findings


def find_leaks(training: Sequence[UnopenedVideo], held_out: Sequence[UnopenedVideo]) -> list[str]:
    """Find videos that two splits share: by id, by name (the folder of their frames) or by their first frame.

    Returns:
        One line for each shared video. A copy with another name is found if its first frame has the same bytes.
    """
    leaks = []
    for what, key in (("id", _id), ("folder of frames", _name), ("first frame", _first_frame)):
        known = {value: video for video in held_out if (value := key(video)) is not None}
        for video in training:
            if (value := key(video)) is not None and value in known:
                leaks.append(f"{video.path} and {known[value].path} have the same {what}")
    return leaks


def _id(video: UnopenedVideo) -> str | None:
    return None if video.id is None else repr(video.id)


def _name(video: UnopenedVideo) -> str:
    return video.name


def _first_frame(video: UnopenedVideo) -> str | None:
    if not video.files or not video.files[0].is_file():
        return None
    return hashlib.sha256(video.files[0].read_bytes()).hexdigest()
