"""Settings of Interpreter at inference, and which trained stage they need."""

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
    """video: segments keep their identity over time.
    image: each frame is segmented by itself."""
    association: Association = option("features", encodes=True)
    """How the image slots of all frames become segments.
    features: by k-means of the mean features of the slots' tokens, for which only the image stage has to be trained.
    learned: by the trained video stage. Ignored with more than two levels, which always use the trained stages."""
    level: int | None = option(None, at_least=1)
    """Level whose segments are written: 1, the image slots of each frame; 2, the segments of the video (k-means, or the
    video stage with --association learned); 3 and more, a level trained with `train --level`. Default: the highest of
    --levels."""
    levels: int | None = option(None, at_least=2, encodes=True)
    """Levels of the hierarchy. Above 2, each level below the highest works in windows of the video, in which its
    segments are numbered anew. Default: 2, or --level if that is more."""
    outlines: int | None = option(None, at_least=1)
    """Also outline the segments of this lower level in the overlay, such as 2 with --level 3."""
    masks_from: Masks | None = None
    """slots: a segment is the union of its image slots, in each frame.
    tokens: groups of slots start a k-means of the tokens of all frames, whose clusters are merged into the segments;
    needs --association features. Default: tokens on a ViT with association by features, else slots."""
    image_slots: int | None = option(None, at_least=1)
    """Image slots of each frame; more slots give smaller parts, which the grouping joins again. Default: twice as many
    as in training; as many with --stage image, and for a video stage that reads slots."""
    num_slots: int | Literal["auto"] | None = option(None, at_least=1)
    """Number of segments. Default: 9. With --association learned, number of video slots before merging; default: as
    in training.
    auto: as many as the video needs, at most 16: segments whose mean features are alike are merged."""
    merge_threshold: float | None = None
    """Learned association: video slots closer than this cosine distance are merged; a higher value gives fewer
    segments. Default: as in training."""
    repeat_to: int | None = option(None, at_least=1)
    """With --association learned: repeat a shorter video from its start until the video stage gets this many frames;
    repeats are not written. Default: no repeats."""

    def __post_init__(self) -> None:
        """Refuse settings where nothing would use them."""
        if isinstance(self.num_slots, str) and self.num_slots != "auto":
            raise ValueError(f"num_slots must be a number or auto, got {self.num_slots!r}")
        self._check_levels()
        for name in ("masks_from", "merge_threshold", "num_slots"):
            if way_of(self) == "image" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} groups the slots of a video: it has no meaning with --stage image or --level 1"
                )
        if self.repeat_to is not None and not self.sees_repeats:
            raise ValueError("repeat_to is a setting of --association learned: only the video stage sees repeats")
        if way_of(self) == "features" and self.merge_threshold is not None:
            raise ValueError("merge_threshold is a setting of --association learned: features merge nothing")
        if self.association == "learned" and self.masks_from == "tokens":
            raise ValueError("masks_from=tokens needs --association features: the video stage groups slots, not tokens")

    def _check_levels(self) -> None:
        """Refuse levels that contradict each other."""
        if self.stage == "image" and (self.level or self.levels or self.outlines):
            raise ValueError("level, levels and outlines have no meaning with --stage image, which is level 1 alone")
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
            raise ValueError("masks_from is a setting of two levels: more levels group slots")
        if self.top > 2 and self.repeat_to is not None:
            raise ValueError("repeat_to is a setting of two levels: more levels pad short videos")

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
        """Segments that a grouping looks for, of which those that are alike may be merged; None for its default."""
        return MOST if self.num_slots == "auto" else self.num_slots

    @property
    def kind(self) -> str:
        """How segments are made, for the name of a folder."""
        if self.top > 2:
            return f"level-{self.written}-of-{self.top}"
        way = way_of(self)
        return way if way == "image" else f"video-{way}"

    @property
    def sees_repeats(self) -> bool:
        """Whether repeats of a short video change its segments."""
        return segmenting_stage(self) == "video"


def way_of(settings: Settings) -> Way:
    """How segments are made of image slots."""
    if settings.stage == "image" or (settings.written, settings.top) == (1, 2):
        return "image"
    return "learned" if settings.top > 2 else settings.association


def segmenting_stage(settings: Settings) -> str:
    """The stage that has to be trained for these settings."""
    return level_key(settings.top) if way_of(settings) == "learned" else "image"
