"""Pictures of the best and the worst videos, chosen while videos are scored one by one."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from interpreter.data import VOID, Video
from interpreter.evaluation.candidates import Entry, Size
from interpreter.files import written_whole
from interpreter.metrics import resize_labels
from interpreter.render import mask_grid
from interpreter.segmentation import Edges

FRAMES, HEIGHT = 6, 240
NOT_PAINTED = 255  # id in a picture of pixels in no segment


@dataclass
class Shown:
    """Small label maps of a few frames of a video, for its picture. The frames themselves are read later."""

    video: Video
    chosen: np.ndarray  # numbers of the frames
    size: Size
    truth: np.ndarray  # [n, h, w]
    edges: Edges  # of the main entry
    rows: dict[str, np.ndarray] = field(default_factory=dict)  # entry -> [n, h, w]
    background: int | None = None  # in the rows, of pixels that are not painted
    score: float = float("nan")

    def draw(self) -> np.ndarray:
        """Frames, masks of each entry and the truth: uint8 [H, W, 3]."""
        frames = self.video.read(self.chosen, self.size)
        return mask_grid(frames, self.rows, truth=self.truth, void=VOID, background=self.background)


@dataclass(frozen=True)
class Picture:
    """Frames of a video with the masks of all entries: uint8 [H, W, 3]."""

    rank: str
    video: str
    score: float
    image: np.ndarray

    def save(self, folder: Path) -> None:
        """Write a PNG. Characters that file systems do not allow are replaced in its name."""
        safe = re.sub(r"[^\w.-]+", "_", self.video)[:80]
        with written_whole(folder / f"{self.rank.replace(' ', '-')}-{safe}.png") as temporary:
            Image.fromarray(self.image).save(temporary, format="png")


class Gallery:
    """The best and the worst videos so far. Memory has only small pictures of these.

    Args:
        count: how many of the best videos, and how many of the worst.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: list[Shown] = []  # best first
        self._current: Shown | None = None

    def see(
        self,
        video: Video,
        entry: Entry,
        maps: np.ndarray,
        truth: np.ndarray,
        frames: np.ndarray,
        background: int | None = None,
    ) -> None:
        """Take the masks of a video for its picture.

        The picture shows the masks of the first seed with the edges of the main entry. Sweeps and blind baselines are
        left out.

        Args:
            video: the video.
            entry: the entry that the masks belong to.
            maps: the masks of all frames, at any size.
            truth: [t, H, W] masks of the annotated frames.
            frames: [t] numbers of the annotated frames.
            background: id in the masks of pixels in no segment, which are not painted.
        """
        if not self.count or entry.kind in ("sweep", "blind"):
            return
        if self._current is None:
            places = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
            size = (HEIGHT, round(HEIGHT * video.width / video.height))
            self._current = Shown(video, frames[places], size, resize_labels(truth[places], size), entry.edges)
        shown = self._current
        if entry.edges == shown.edges and entry.name not in shown.rows:
            labels = resize_labels(maps[shown.chosen], shown.size)
            colours = np.unique(labels, return_inverse=True)[1].reshape(labels.shape) % 256
            if background is not None:
                colours[labels == background] = shown.background = NOT_PAINTED
            shown.rows[entry.name] = colours

    def forget(self) -> None:
        """Drop the current video."""
        self._current = None

    def keep(self, score: float) -> None:
        """Finish the current video, and keep it if it is among the best or the worst."""
        shown, self._current = self._current, None
        if shown is None or np.isnan(score):
            return
        shown.score = score
        self._kept = sorted([*self._kept, shown], key=lambda s: -s.score)
        if len(self._kept) > 2 * self.count:
            del self._kept[self.count]

    def pictures(self) -> list[Picture]:
        """The pictures, best 1, best 2, … and worst 1, worst 2, …. No video is in both."""
        half = min(self.count, (len(self._kept) + 1) // 2)
        groups = {"best": self._kept[:half], "worst": self._kept[half:][::-1]}
        return [
            Picture(f"{group} {number}", shown.video.name, shown.score, shown.draw())
            for group, videos in groups.items()
            for number, shown in enumerate(videos, 1)
        ]
