"""Segment a live stream window by window, with segments that keep their numbers.

Each window is encoded as a video of its own: its frames become image slots, with the same draws of the prior in every
window. What carries the numbers from window to window is an :class:`OverTime`, one for each way to group image slots.
Both group the first window exactly as the same frames in a file, and start each later window from the window before.
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

HISTORY = 8  # windows, the newest included, whose slots the clusters of association by features follow


# Iterations of slot attention in each window but the first. More of them move the slots further from where they were,
# and with them the segments of a scene that does not change; recurrent methods take 1 or 2 a frame, too.
LATER_ITERATIONS = 1


class OverTime(Protocol):
    """Groups the image slots of one window after the other."""

    def add(self, window: EncodedVideo) -> Tensor:
        """Slots over segments [t, N, S] of the next window of t frames; S may differ from window to window."""


class FeaturesOverTime:
    """Association by features: k-means of the first window, then Lloyd's algorithm from the centres so far.

    Later windows are described with the scaling of the first, and clustered together with the slots of the
    :data:`HISTORY` - 1 windows before, so that a short absence does not change a cluster. A cluster without a slot in
    all of these windows moves to the slot that is farthest from its own cluster, as always in k-means: a segment that
    stays away gives its number to something new.

    Args:
        segments: how many; fewer if the first window has fewer slots.
        seed: of the starts of k-means.
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
    """Keeps the numbers of slots from window to window, though other ones are merged in each.

    In each window the slots that are alike are written under the lowest of their numbers; a slot that differs again has
    its own number. The clusters of the first window are numbered like those of a file.
    """

    def __init__(self) -> None:
        self.known = False

    def keep(self, grouped: VideoSlots, threshold: float) -> tuple[Tensor, Tensor]:
        """Slots [1, K, D] before merging, to start the next window from, and the attention [1, T, N, S] by numbers."""
        labels = cluster_slots(grouped.unmerged, threshold)[0][0].tolist()
        numbers = [labels.index(cluster) for cluster in range(max(labels) + 1)]  # the lowest of each cluster
        slots = grouped.unmerged.float()
        if not self.known:
            slots = slots[:, [*numbers, *(slot for slot in range(len(labels)) if slot not in numbers)]]
            numbers, self.known = list(range(len(numbers))), True
        attention = grouped.attention.new_zeros(*grouped.attention.shape[:3], numbers[-1] + 1, dtype=torch.float32)
        attention[..., numbers] = grouped.attention[..., : len(numbers)].float()
        return slots, attention


class VideoSlotsOverTime:
    """The trained video stage, recurrent over windows as slot attention over frames is (Kipf et al. 2022, SAVi).

    The first window starts from draws of the prior; each later one, with :data:`LATER_ITERATIONS`, from the K video
    slots of the window before, as they were before merging (see :class:`Numbers`).

    Args:
        inputs_of: what the video stage gets of a window's slots, [t, N, D_input].
        group: (inputs, starts [R, 1, K, D], iterations or None for the usual number) -> the best of R groupings.
        draws: starts of the first window, [R, 1, K, D].
        threshold: cosine distance below which ``group`` merges.
        repeat_to: inputs of a shorter window are repeated up to this many frames.
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
    """Three levels: level 2 groups each window by itself, from draws of its own, and level 3 is recurrent over them.

    Level 3 sees as many windows as the clips that it was trained on, the newest last, and starts from its slots of the
    step before: so an object that was away for less than this time comes back under its number.

    Args:
        low, top: the stages of levels 2 and 3.
        slots_of: the image slots of an encoded window.
        draws: of a window's number, the noise [R, 1, K, D] that level 2 starts from.
        noise: the noise [R, 1, K, D] that level 3 starts from in the first window.
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
        over_time: groups their slots; None: each frame is segmented by itself.
        seed: of the image slots' prior.
        window: frames of a window.
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
