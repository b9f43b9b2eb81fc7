"""Segment a live stream window by window. Segments keep their numbers from window to window.

Each window is encoded like a separate video: its frames become image slots, from the same random draws in every window.
An :class:`OverTime` groups the slots of one window after the other; each way to group image slots has its own. The
result of the first window is the same as for these frames in a file. Each later window starts from the result of the
window before, so the numbers are kept.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from slotkernels import cluster_slots
from torch import Tensor

from interpreter.data import Video
from interpreter.methods.base import Segmenter
from interpreter.methods.interpreter.association import Scaling, feature_clusters, scaling_of, slot_descriptions
from interpreter.methods.interpreter.hierarchy import Slots, best_of, group_windows
from interpreter.methods.interpreter.image_slots import EncodedVideo
from interpreter.methods.interpreter.video_stage import VideoSlots, VideoStage
from interpreter.models.clustering import lloyd
from interpreter.segmentation import Segmentation

HISTORY = 8  # number of windows, including the newest, whose slots association by features clusters together


# Iterations of slot attention in each window but the first. With more iterations, slots and segments would change more
# from window to window, also if the scene does not change. Recurrent methods use 1 or 2 per frame.
LATER_ITERATIONS = 1


class OverTime(Protocol):
    """Groups the image slots of one window after the other."""

    def add(self, window: EncodedVideo) -> Tensor:
        """Group the next window of t frames: slots over segments [t, N, S]. S may differ from window to window."""


class FeaturesOverTime:
    """Association by features: k-means of the first window, then Lloyd's algorithm, starting from the last centres.

    Later windows use the scaling of the first. They are clustered together with the slots of the :data:`HISTORY` - 1
    windows before, so that a cluster does not change if its object is absent for a short time. If a cluster has no slot
    in all of these windows, it moves to the slot that is farthest from its own cluster, as usual in k-means. So if an
    object stays away, something new gets its number.

    Args:
        segments: number of segments; fewer if the first window has fewer slots.
        seed: seed of the starts of k-means.
    """

    def __init__(self, segments: int, seed: int) -> None:
        self.segments, self.seed = segments, seed
        self._scaling: Scaling | None = None
        self._centres: Tensor | None = None  # [S, C + 2]
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=HISTORY)  # descriptions [n, C + 2], weights [n]

    def add(self, window: EncodedVideo) -> Tensor:
        """See :meth:`OverTime.add`."""
        described = window.described
        assert described is not None, "windows are encoded with the means of their slots"
        self._scaling = self._scaling or scaling_of(described)
        points = slot_descriptions(described, self._scaling).flatten(0, 1)
        self._recent.append((points, described.masses.sqrt().flatten()))
        if self._centres is None:
            clusters = feature_clusters(described, min(self.segments, len(points)), self.seed)
        else:
            recent, weights = (torch.cat(parts) for parts in zip(*self._recent, strict=True))
            clusters = lloyd(recent, self._centres, weights=weights)
        self._centres = clusters.centres
        labels = clusters.labels[-len(points) :].view(described.masses.shape)
        return F.one_hot(labels, len(self._centres)).float()


class Numbers:
    """Keeps the numbers of slots from window to window, although different slots are merged in each window.

    Merged slots get the lowest of their numbers. If a slot is no longer merged in a later window, it has its own number
    again. The segments of the first window have the same numbers as for a file.
    """

    def __init__(self) -> None:
        self.known = False

    def keep(self, grouped: VideoSlots, threshold: float) -> tuple[Tensor, Tensor]:
        """Slots [1, K, D] before merging, which the next window starts from, and attention [1, T, N, S] by numbers."""
        labels = cluster_slots(grouped.unmerged, threshold)[0][0].tolist()
        numbers = [labels.index(cluster) for cluster in range(max(labels) + 1)]  # lowest number in each cluster
        slots = grouped.unmerged.float()
        if not self.known:
            slots = slots[:, [*numbers, *(slot for slot in range(len(labels)) if slot not in numbers)]]
            numbers, self.known = list(range(len(numbers))), True
        attention = grouped.attention.new_zeros(*grouped.attention.shape[:3], numbers[-1] + 1, dtype=torch.float32)
        attention[..., numbers] = grouped.attention[..., : len(numbers)].float()
        return slots, attention


class VideoSlotsOverTime:
    """The trained video stage, applied to one window after the other.

    The first window starts from random draws. Each later one starts from the K video slots of the window before, as
    they were before merging (see :class:`Numbers`), with :data:`LATER_ITERATIONS`. SAVi (Kipf et al. 2022) does the
    same from frame to frame.

    Args:
        inputs_of: function from an encoded window to the inputs [t, N, D_input] of the video stage.
        group: (inputs, starts [R, 1, K, D], iterations or None for the usual number) -> the best of R groupings.
        draws: initial slots of the first window, [R, 1, K, D].
        threshold: cosine distance below which ``group`` merges.
        repeat_to: inputs of a shorter window are repeated until there are this many frames.
    """

    def __init__(
        self,
        inputs_of: Callable[[EncodedVideo], Tensor],
        group: Callable[[Tensor, Tensor, int | None], VideoSlots],
        draws: Tensor,
        threshold: float,
        repeat_to: int = 0,
    ) -> None:
        self.inputs_of, self.group, self.threshold, self.repeat_to = inputs_of, group, threshold, repeat_to
        self._starts, self._numbers = draws, Numbers()

    def add(self, window: EncodedVideo) -> Tensor:
        """See :meth:`OverTime.add`; S is at most K."""
        inputs, frames = self.inputs_of(window), len(window.slots)
        places = torch.arange(max(frames, self.repeat_to), device=inputs.device) % frames
        grouped = self.group(inputs[places], self._starts, LATER_ITERATIONS if self._numbers.known else None)
        slots, attention = self._numbers.keep(grouped, self.threshold)
        self._starts = slots[None]
        return attention[0, :frames]


class LevelsOverTime:
    """Three levels: level 2 groups each window by itself, level 3 groups the newest windows.

    Level 3 reads as many windows as in training, the newest last, and starts from its slots of the step before. So an
    object that is absent for less than this time gets its number back.

    Args:
        low: the stage of level 2.
        top: the stage of level 3.
        slots_of: function from an encoded window to its image slots.
        draws: function from the number of a window to the noise [R, 1, K, D] of level 2.
        noise: the noise [R, 1, K, D] of level 3 in the first window.
        merge_threshold: cosine distance below which slots of level 3 are merged. Default: as in training.
        precision: see :func:`interpreter.models.autocast.autocast`.
    """

    def __init__(
        self,
        low: VideoStage,
        top: VideoStage,
        slots_of: Callable[[EncodedVideo], Slots],
        draws: Callable[[int], Tensor],
        noise: Tensor,
        merge_threshold: float | None,
        precision: str,
    ) -> None:
        self.low, self.top, self.slots_of, self.draws, self.precision = low, top, slots_of, draws, precision
        self.threshold = top.config.merge_threshold if merge_threshold is None else merge_threshold
        self._starts = torch.stack([top.slot_attention.sample_slots(1, noise=draw) for draw in noise])
        self._recent: deque[Slots] = deque(maxlen=top.num_frames)
        self._windows, self._numbers = 0, Numbers()

    def add(self, window: EncodedVideo) -> Tensor:
        """See :meth:`OverTime.add`; S is at most K."""
        slots, attention = group_windows(
            self.low, self.slots_of(window), self.draws(self._windows), False, self.precision
        )
        self._windows += 1
        self._recent.append(slots)
        seen = Slots.joined(list(self._recent))
        inputs = seen.inputs(self.top.config.inputs)
        iterations = LATER_ITERATIONS if self._numbers.known else None
        grouped = best_of(
            self.top, inputs, self._starts, self.precision, self.threshold, seen.masses, iterations=iterations
        )
        starts, across = self._numbers.keep(grouped, self.threshold)
        self._starts = starts[None]
        return attention[0] @ across[0, -1]


class OnlineSegmenter:
    """See :class:`interpreter.methods.base.Online`.

    Args:
        segmenter: encodes windows to :class:`EncodedVideo`.
        over_time: groups their slots. None: each frame is segmented by itself.
        seed: seed of the initial image slots.
        window: number of frames of a window.
    """

    def __init__(self, segmenter: Segmenter, over_time: OverTime | None, seed: int, window: int) -> None:
        self.segmenter, self.over_time, self.seed, self.window = segmenter, over_time, seed, window

    @torch.no_grad()
    def add(self, video: Video) -> Segmentation:
        """Segment the next window."""
        encoded: EncodedVideo = self.segmenter.encode(video, (self.seed,)).by_seed[self.seed]
        across = None if self.over_time is None else self.over_time.add(encoded)
        grid, attention = self.segmenter.grid, encoded.attention
        return Segmentation(grid, attention, across, tied_over_time=self.over_time is not None)
