"""Settings of Interpreter at inference, and the trained stage that they need."""

from dataclasses import dataclass
from typing import Literal

from interpreter.configs import option
from interpreter.methods.interpreter.config import StageName, level_key
from interpreter.methods.interpreter.counting import MOST

Association = Literal["features", "learned"]
Masks = Literal["slots", "tokens"]
Way = Literal["image", "learned", "features"]


@dataclass(frozen=True)
class Settings:
    """Settings of Interpreter."""

    stage: StageName = "video"
    """video: segments keep their number over time.
    image: each frame is segmented by itself, so numbers of different frames are unrelated."""
    association: Association = option("features", encodes=True)
    """How the image slots of all frames are grouped into segments.
    features: k-means of the mean features of the slots' tokens. Only the image stage has to be trained.
    learned: the trained video stage.
    With more than two levels, the trained stages always group them."""
    level: int | None = option(None, at_least=1)
    """Level whose segments are written. 1: image slots of each frame. 2: segments of the video (by k-means, or by the
    video stage with --association learned). 3 and more: a level trained with train --level. Default: the highest of
    --levels."""
    levels: int | None = option(None, at_least=2, encodes=True)
    """Number of levels. Above 2, each level but the highest segments windows of the video, with new numbers in each
    window. Default: 2, or --level if that is more."""
    outlines: int | None = option(None, at_least=1)
    """Also draw the outlines of the segments of this lower level in the overlay, such as 2 with --level 3."""
    masks_from: Masks | None = None
    """What the masks of the segments are made of.
    slots: a segment is the union of its image slots in each frame.
    tokens: k-means of the tokens of all frames, which starts from groups of slots; the clusters are merged into the
    segments. Finer; needs --association features. Default: tokens on a ViT with --association features, else slots."""
    image_slots: int | None = option(None, at_least=1)
    """Image slots of each frame. More slots give smaller parts, which the grouping joins. Default: twice as many as in
    training; as many as in training with --stage image, and with a video stage that reads slots."""
    num_slots: int | Literal["auto"] | None = option(None, at_least=1)
    """Number of segments; default: 9. With --association learned: number of video slots before merging; default: as in
    training.
    auto: start with 16 segments, and merge those whose mean features are alike."""
    merge_threshold: float | None = None
    """With --association learned: merge video slots that are closer than this cosine distance. A higher value gives
    fewer segments. Default: as in training."""
    repeat_to: int | None = option(None, at_least=1)
    """With --association learned: repeat a shorter video from its start until the video stage has this many frames.
    Repeats are not written. Default: no repeats."""

    def __post_init__(self) -> None:
        """Raise an error for settings that would have no effect."""
        if isinstance(self.num_slots, str) and self.num_slots != "auto":
            raise ValueError(f"num_slots must be a number or auto, got {self.num_slots!r}")
        self._check_levels()
        for name in ("masks_from", "merge_threshold", "num_slots"):
            if way_of(self) == "image" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} groups the slots of a video: it has no meaning with --stage image or --level 1"
                )
        if self.repeat_to is not None and not self.sees_repeats:
            raise ValueError("repeat_to is a setting of --association learned: only the video stage uses repeats")
        if way_of(self) == "features" and self.merge_threshold is not None:
            raise ValueError("merge_threshold is a setting of --association learned: k-means merges nothing")
        if self.association == "learned" and self.masks_from == "tokens":
            raise ValueError("masks_from=tokens needs --association features: the video stage groups slots, not tokens")

    def _check_levels(self) -> None:
        """Raise an error for levels that contradict each other."""
        if self.stage == "image" and (self.level or self.levels or self.outlines):
            raise ValueError("level, levels and outlines have no meaning with --stage image, which has level 1 only")
        if self.level is not None and self.level > self.top:
            raise ValueError(f"level {self.level} is above the highest of the {self.top} levels; raise --levels")
        if self.outlines is not None and self.outlines >= self.written:
            raise ValueError(f"outlines {self.outlines} must be a level below the one that is written, {self.written}")
        for name in ("num_slots", "merge_threshold"):
            if self.written < self.top and self.top > 2 and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is a setting of the highest level, {self.top}, but level {self.written} is written"
                )
        if self.top > 2 and self.masks_from is not None:
            raise ValueError("masks_from is a setting of two levels: with more, segments are unions of slots")
        if self.top > 2 and self.repeat_to is not None:
            raise ValueError("repeat_to is a setting of two levels: with more, short videos are padded")

    @property
    def top(self) -> int:
        """The highest level."""
        return self.levels or max(2, self.level or 2)

    @property
    def written(self) -> int:
        """The level whose segments are written."""
        return self.level or self.top

    @property
    def count(self) -> int | None:
        """Number of segments to start with, before similar ones are merged; None for the default."""
        return MOST if self.num_slots == "auto" else self.num_slots

    @property
    def kind(self) -> str:
        """How segments are made: part of the name of a folder of results."""
        if self.top > 2:
            return f"level-{self.written}-of-{self.top}"
        way = way_of(self)
        return way if way == "image" else f"video-{way}"

    @property
    def sees_repeats(self) -> bool:
        """Whether repeats of a short video change its segments."""
        return segmenting_stage(self) == "video"


def way_of(settings: Settings) -> Way:
    """How image slots are grouped into segments."""
    if settings.stage == "image" or (settings.written, settings.top) == (1, 2):
        return "image"
    return "learned" if settings.top > 2 else settings.association


def segmenting_stage(settings: Settings) -> str:
    """Key of the stage that must be trained for these settings."""
    return level_key(settings.top) if way_of(settings) == "learned" else "image"
