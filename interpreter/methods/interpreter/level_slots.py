"""Cached slots of the windows of a level: what the level above trains on.

Draw r of a window depends only on the bytes of the video, the number of the window, its flip and r, and on draw r of
the image slots of its frames.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from interpreter.data import Video
from interpreter.data.frame_index import FrameIndex
from interpreter.engine.inputs import Inputs, InputSettings
from interpreter.engine.randomness import Stream, random_state
from interpreter.methods.base import Encoded
from interpreter.methods.interpreter.config import VideoInputs
from interpreter.methods.interpreter.hierarchy import Slots, Windows, group_windows
from interpreter.methods.interpreter.image_slots import draw_noise, encode_slots, present_steps, slot_request
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.token_means import means_as_inputs, token_means
from interpreter.methods.interpreter.video_stage import VideoStage
from interpreter.store.features import DTYPES, FeatureMaker
from interpreter.store.files import Content, Store, require_unchanged
from interpreter.store.table import FrameTable


@dataclass(frozen=True)
class LevelBelow:
    """A trained level k >= 2, and the windows that the level above reads.

    Attributes:
        stage: frozen video stage.
        weights: hash of its weights.
        windows: windows into which its steps are cut.
    """

    stage: VideoStage
    weights: str
    windows: Windows


class LevelMaker:
    """Computes the cached slots of the windows of a level: slots [W, R, K, D] and their masses [W, R, K].

    If the level above reads means, also means [W, R, K, C + 2]. Image slots are computed from the features and are not
    stored, so the file of a video is small.

    Args:
        root: directory of all stores.
        features: reads the features from the cache or computes them.
        image_stage: frozen image stage.
        image_weights: hash of its weights.
        levels: levels 2, 3, … up to the one whose slots are stored.
        draws: number R of draws of the initial slots, on all levels.
        inputs: what the level above reads of a slot.
    """

    unit = "windows"

    def __init__(
        self,
        root: Path,
        features: FeatureMaker,
        image_stage: ImageStage,
        image_weights: str,
        levels: Sequence[LevelBelow],
        draws: int,
        inputs: VideoInputs,
    ) -> None:
        self.features, self.image_stage, self.levels, self.draws = features, image_stage, levels, draws
        self.name = f"slots of level {len(levels) + 1}"
        self.means = "means" in {inputs, *(level.stage.config.inputs for level in levels)}
        stage, dtype = levels[-1].stage, DTYPES[features.dtype]
        recipe: dict[str, object] = {
            "kind": f"level-{len(levels) + 1}",
            **features.recipe,
            "image_stage": image_weights,
            "iterations": image_stage.config.inference_iterations,
            "input_positions": image_stage.config.input_positions,
            "draws": draws,
            "levels": [
                {
                    "stage": level.weights,
                    "window": level.windows.length,
                    "overlap": level.windows.overlap,
                    "iterations": level.stage.config.inference_iterations,
                    "sharpness": level.stage.config.inference_sharpness,
                    "merge_threshold": level.stage.config.merge_threshold,
                }
                for level in levels
            ],
        }
        count, dim = stage.slot_attention.num_slots, stage.slot_attention.dim
        rows = {"slots": (dtype, (draws, count, dim)), "masses": (dtype, (draws, count))}
        if self.means:
            recipe["means"] = True
            rows["means"] = (dtype, (draws, count, image_stage.feature_dim + 2))
        self.stores: Mapping[bool, Store] = {
            flip: Store(root, {**recipe, "flip": flip}, rows) for flip in features.stores
        }

    def rows(self, video: Video) -> int:
        """See :class:`interpreter.store.fill.Maker`; the number of windows."""
        steps = video.num_frames
        for level in self.levels:
            steps = len(level.windows.starts(steps))
        return steps

    def make(self, video: Video, content: Content, flips: Sequence[bool], check: Callable[[], None]) -> None:
        """See :class:`interpreter.store.fill.Maker`."""
        digest, rows = content.digest, self.rows(video)
        with ExitStack() as files:
            write = {f: files.enter_context(self.stores[f].writing(video, digest, rows)) for f in flips}
            for flip in flips:
                slots = self._frames(video, digest, flip, check)
                for number, level in enumerate(self.levels):
                    slots = self._windows(slots, level, video.num_frames, digest, flip, number)
                for window, found in enumerate(slots):
                    write[flip]("slots", window, found.slots.transpose(0, 1))
                    write[flip]("masses", window, found.masses.transpose(0, 1))
                    if found.means is not None:
                        write[flip]("means", window, found.means.transpose(0, 1))
            require_unchanged(video, content)

    def _frames(self, video: Video, digest: str, flip: bool, check: Callable[[], None]) -> Iterator[Slots]:
        """Image slots [R, t, N, D] of consecutive frames."""
        for _, start, features in self.features.pieces(video, digest, [flip]):
            drawn = []
            for draw in range(self.draws):
                check()
                frames = range(start, start + len(features))
                noise = [draw_noise(self.image_stage, digest, t, flip, draw) for t in frames]
                found = encode_slots(self.image_stage, features, noise, self.features.precision)
                described = token_means(features, found.attention, self.image_stage.grid)
                means = torch.cat([described.features, described.places], -1)[None] if self.means else None
                drawn.append(Slots(found.slots[None], described.masses[None], means))
            yield Slots.joined(drawn, dim=0)

    def _windows(
        self, below: Iterable[Slots], level: LevelBelow, frames: int, digest: str, flip: bool, number: int
    ) -> Iterator[Slots]:
        """Slots [R, 1, K, D] of the windows of a level."""
        steps = frames
        for lower in self.levels[:number]:
            steps = len(lower.windows.starts(steps))
        prior = level.stage.slot_attention
        for window, slots in enumerate(level.windows.cut(below, steps)):
            drawn = [
                random_state(int(digest, 16), window, int(flip), draw, number + 2).standard_normal(
                    (prior.num_slots, prior.dim), np.float32
                )
                for draw in range(self.draws)
            ]
            noise = torch.from_numpy(np.stack(drawn)).to(slots.slots.device)[None]
            with torch.no_grad():  # without the yield: the caller may need gradients
                found, _ = group_windows(level.stage, slots, noise, number > 0, self.features.precision)
            yield found


@dataclass
class LevelClips(Inputs):
    """Inputs [B, T, K, D_input] and masses [B, T, K] of T consecutive windows, with one of R draws for each window.

    Attributes:
        table: stored rows of the windows.
        device: device of the batches.
        num_steps: number T of windows of a sample.
        draws: number R of draws.
        inputs: what the level reads of a slot.
        slot_shape: (K, D_input).
        settings: see :class:`InputSettings`.
        masked: if a video has fewer windows, whether the rest of a sample is padding; else it repeats the video.
    """

    table: FrameTable
    device: torch.device
    num_steps: int
    draws: int
    inputs: VideoInputs
    slot_shape: tuple[int, int]
    settings: InputSettings
    masked: bool
    noise_stream: int = Stream.CLIP_NOISE

    def __post_init__(self) -> None:
        self.frames_per_sample = self.num_steps
        self.index: FrameIndex = self.table.index
        self.digests = self.table.digests

    def batches(self, steps: Iterable[int]) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`Inputs.batches`."""
        for step in steps:
            request = slot_request(self.index, self.num_steps, self.draws, self.settings, step)
            flat = tuple(part.flatten() for part in request)
            rows, masses = (
                self.table.rows(name, *flat).to(self.device).float().unflatten(0, (-1, self.num_steps))
                for name in (self.inputs, "masses")
            )
            if self.masked:
                masses = masses * present_steps(self.index, request[0]).to(masses).unsqueeze(2)
            yield (rows if self.inputs == "slots" else means_as_inputs(rows)), masses

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        """See :meth:`Inputs.shapes`."""
        return [(rows, self.num_steps, *self.slot_shape), (rows, self.num_steps, self.slot_shape[0])]

    def encoded(self, number: int) -> Encoded | None:
        """See :meth:`Inputs.encoded`; None, since the cache has no attention of the patches."""
        return None
