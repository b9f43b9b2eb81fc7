"""Levels of slots: each level groups the slots that the level below finds in windows of the video.

A *step* of a level is what it reads at once. The steps of level 2 are frames with their image slots (level 1). The
steps of level 3 are windows of frames, with the video slots that level 2 finds in each, and so on. The top level has
only one window, the whole video. So the time of all levels but the top one grows linearly with the length of the video,
and the top level has few steps.

The *mass* of a slot is the share of the patches of its window that it stands for; its *mean* is the mean feature and
position of these patches. Windows may overlap. The *owner* of a step is the window, of all that contain it, with the
nearest centre.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interpreter.methods.interpreter.config import VideoInputs, VideoTraining
from interpreter.methods.interpreter.counting import merge_segments
from interpreter.methods.interpreter.token_means import means_as_inputs
from interpreter.methods.interpreter.video_stage import VideoSlots, VideoStage
from interpreter.models.autocast import autocast

WINDOWS_AT_ONCE = 8  # number of windows in a batch, to bound the memory
SMALLEST = 1e-12


class Slots(NamedTuple):
    """Slots of T consecutive steps of B videos, or of B random draws of one video."""

    slots: Tensor  # [B, T, N, D]
    masses: Tensor  # [B, T, N], share of the patches of the step; 0 for a slot that was merged into another
    means: Tensor | None = None  # [B, T, N, C + 2], mean feature and mean position of these patches

    def inputs(self, kind: VideoInputs) -> Tensor:
        """Inputs [B, T, N, D_input] of the level above."""
        if kind == "slots":
            return self.slots.float()
        assert self.means is not None, "a level that reads means is built on levels that have them"
        return means_as_inputs(self.means.float())

    def steps(self, part: slice) -> "Slots":
        """The slots of some of the steps."""
        return Slots(*(None if t is None else t[:, part] for t in self))  # type: ignore[arg-type]

    @staticmethod
    def joined(parts: Sequence["Slots"], dim: int = 1) -> "Slots":
        """Join parts, in time (``dim=1``) or as more videos (``dim=0``)."""
        return Slots(*(None if t[0] is None else torch.cat(t, dim) for t in zip(*parts, strict=True)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Windows:
    """How the steps of a level are cut into windows.

    >>> Windows(length=4, overlap=1).starts(steps=9)
    [0, 3, 5]
    >>> Windows(length=4, overlap=1).starts(steps=3)
    [0]

    Attributes:
        length: number of steps of a window. A shorter video is one window.
        overlap: number of steps that two consecutive windows share. The last window ends with the video, so it may
            share more steps with the one before.
    """

    length: int
    overlap: int = 0

    def starts(self, steps: int) -> list[int]:
        """The first step of each window."""
        last = max(0, steps - self.length)
        return [*range(0, last, self.length - self.overlap), last]

    def cut(self, parts: Iterable[Slots], steps: int) -> Iterator[Slots]:
        """Yield the slots of each window; ``parts`` have those of all ``steps``. Keeps one window and one part."""
        parts, held, first = iter(parts), None, 0
        for start in self.starts(steps):
            end = min(start + self.length, steps)
            if held is not None and start > first:
                held, first = held.steps(slice(start - first, None)), start
            while held is None or first + held.slots.shape[1] < end:
                more = next(parts)
                held = more if held is None else Slots.joined([held, more])
            yield held.steps(slice(start - first, end - first))


def windows_below(below: VideoTraining, config: VideoTraining) -> Windows:
    """The windows into which a level, trained with ``config``, cuts the level below, trained with ``below``.

    Raises:
        ValueError: if the overlap is not shorter than a window.
    """
    length = config.window or below.num_frames
    if config.overlap >= length:
        raise ValueError(f"--overlap {config.overlap} must be less than the {length} steps of a window")
    return Windows(length, config.overlap)


class Level(NamedTuple):
    """Slots of a level, and the attention that they come from."""

    slots: Slots  # [1, W, K, ...] of its W windows
    attention: Tensor  # [W, L, N, K], attention of the slots of the level below over them
    starts: list[int]  # the first step of each window

    @property
    def valid(self) -> Tensor:
        """Which slots [W, K] were not merged into others."""
        return self.slots.masses[0] > 0

    def owners(self, steps: int) -> Tensor:
        """The owner of each step: number of a window, [steps] on the CPU."""
        centres = torch.tensor(self.starts, dtype=torch.float64) + (self.attention.shape[1] - 1) / 2
        between = (centres[1:] + centres[:-1]) / 2
        return torch.searchsorted(between, torch.arange(steps, dtype=torch.float64))  # on a tie the earlier window


def best_of(
    stage: VideoStage,
    inputs: Tensor,  # [B, L, N, D_input]
    starts: Tensor,  # [R, B, K, D]
    precision: str,
    merge_threshold: float | None = None,
    masses: Tensor | None = None,  # [B, L, N]
    iterations: int | None = None,
    weights: Tensor | None = None,  # [B, L, N]
) -> VideoSlots:
    """Video slots of B videos or windows. Of R sets of initial slots, each keeps the one with the lowest loss.

    Args:
        stage: video stage.
        inputs: its inputs, one for each slot of the level below.
        starts: the R sets of initial slots.
        precision: see :func:`interpreter.models.autocast.autocast`.
        merge_threshold: see :meth:`VideoStage.group`.
        masses: masses of the inputs, see :class:`VideoStage`.
        iterations: iterations of slot attention. Default: those of the configuration for inference.
        weights: masses for the loss only. Default: ``masses``.
    """
    config, best = stage.config, None
    iterations = iterations or config.inference_iterations
    least = inputs.new_full((len(inputs),), torch.inf)
    with autocast(inputs.device, precision):
        context = stage.encode_slots(inputs, masses)
        for initial in starts:
            found = stage.group(context, initial, merge_threshold, iterations, config.inference_sharpness, masses)
            if len(starts) == 1:  # needs no loss, and the time of a decoder may be quadratic in the length
                return found
            error = stage.error(found, inputs, masses if weights is None else weights)
            best = found if best is None else _where(error < least, found, best)
            least = error.minimum(least)
    assert best is not None
    return best


def group_windows(
    stage: VideoStage,
    windows: Slots,  # [B, L, N, ...]
    noise: Tensor,  # [R, B, K, D]
    weighted: bool,
    precision: str,
    merge_threshold: float | None = None,
) -> tuple[Slots, Tensor]:
    """Slots [B, 1, K, ...] of windows, and attention [B, L, N, K] over them, from the best of R random draws.

    Args:
        stage: video stage; see :func:`best_of`, also for ``precision`` and ``merge_threshold``.
        windows: slots of the level below, one window of each of B videos or draws.
        noise: standard normal noise of the draws.
        weighted: whether masses are weights in the loss, as they are above level 2.
        precision: see :func:`best_of`.
        merge_threshold: see :func:`best_of`.
    """
    with autocast(noise.device, precision):
        starts = torch.stack([stage.slot_attention.sample_slots(len(draw), noise=draw) for draw in noise])
    # Without masses, the loss of a window would depend on the other windows of its batch.
    masses, weights = (windows.masses, None) if weighted else (None, torch.ones_like(windows.masses))
    inputs = windows.inputs(stage.config.inputs)
    best = best_of(stage, inputs, starts, precision, merge_threshold, masses, weights=weights)
    best = _valid_first(best)
    return summarise(best, windows), best.attention.float()


def _valid_first(video: VideoSlots) -> VideoSlots:
    """Move the slots that a gate dropped to the end; merged ones are there already."""
    order = torch.argsort((~video.valid).int(), dim=1, stable=True)  # [B, K]
    slots = video.slots.gather(1, order.unsqueeze(2).expand_as(video.slots))
    attention = video.attention.gather(3, order[:, None, None].expand_as(video.attention))
    return video._replace(slots=slots, attention=attention, valid=video.valid.gather(1, order))


def _where(condition: Tensor, chosen: VideoSlots, others: VideoSlots) -> VideoSlots:
    """Choose between two groupings, for each video."""
    mixed = [
        None if a is None or b is None else torch.where(condition.view(-1, *[1] * (a.dim() - 1)), a, b)
        for a, b in zip(chosen, others, strict=True)
    ]
    return VideoSlots(*mixed)  # type: ignore[arg-type]  # None without a gate


def summarise(video: VideoSlots, windows: Slots) -> Slots:
    """Slots [B, 1, K, ...] with their masses and means, computed from those of the level below."""
    attention = video.attention.float()  # [B, L, N, K]
    held = attention * windows.masses.unsqueeze(3)
    masses = held.sum((1, 2)) / windows.masses.sum((1, 2)).unsqueeze(1).clamp_min(SMALLEST)  # [B, K]
    means = None
    if windows.means is not None:
        sums = torch.einsum("blnk,blnc->bkc", held, windows.means.float())
        means = (sums / held.sum((1, 2)).unsqueeze(2).clamp_min(SMALLEST)).unsqueeze(1)
    return Slots(video.slots.float().unsqueeze(1), masses.unsqueeze(1), means)


def apply_level(
    stage: VideoStage, below: Slots, windows: Windows, noise: Any, weighted: bool, precision: str, **options: Any
) -> Level:
    """Compute a level on top of the slots [1, T, N, ...] of a video.

    Args:
        stage: video stage of the level.
        below: slots of the level below.
        windows: windows into which the steps of the level below are cut.
        noise: function from the number of a window to standard normal noise [R, K, D].
        weighted: see :func:`group_windows`, also for ``precision`` and ``options``.
        precision: see :func:`group_windows`.
        options: see :func:`group_windows`.
    """
    steps = below.slots.shape[1]
    starts, cut = windows.starts(steps), windows.cut([below], steps)
    found, attention = [], []
    for first in range(0, len(starts), WINDOWS_AT_ONCE):
        numbers = range(first, min(first + WINDOWS_AT_ONCE, len(starts)))
        batch = Slots.joined([next(cut) for _ in numbers], dim=0)
        drawn = torch.stack([noise(number) for number in numbers], 1)
        slots, over = group_windows(stage, batch, drawn, weighted, precision, **options)
        found.append(slots)
        attention.append(over)
    slots = Slots(*(None if t is None else t.transpose(0, 1) for t in Slots.joined(found, dim=0)))  # type: ignore[arg-type]
    return Level(slots, torch.cat(attention), starts)


def merge_alike_slots(level: Level, below: Slots) -> Level:
    """Merge similar slots of a level that has one window (:mod:`interpreter.methods.interpreter.counting`).

    Slots are compared by the means of the slots of the level below, or by these slots if they have no means.
    """
    points = below.slots if below.means is None else below.means[..., :-2]
    labels = merge_segments(
        points.float().flatten(0, 2), level.attention[0].flatten(0, 1), below.masses.sqrt().flatten()
    )
    slots, masses, means = level.slots
    members = F.one_hot(labels).float()  # [K, S]
    shares = members * (masses[0, 0] > 0)[:, None]
    shares = shares / shares.sum(0).clamp_min(SMALLEST)
    if means is not None:
        weights = members * masses[0, 0][:, None]
        means = (weights / weights.sum(0).clamp_min(SMALLEST)).mT @ means
    return Level(Slots(shares.mT @ slots, masses @ members, means), level.attention @ members, level.starts)


def propagate(levels: Sequence[Level], frames: int) -> Tensor:
    """Attention [T, N, K] of the image slots of each frame over the slots of the last of the levels 2, 3, ….

    Slots of the last level have numbers within a window: for each frame, its owner. In the levels below, the result of
    a step is the mean over all windows that contain it and have the same owner in the last level.
    """
    *lower, top = levels
    steps = [frames, *(len(level.starts) for level in lower)]  # of levels 2, 3, …
    owner = top.owners(steps[-1])
    places = torch.arange(steps[-1]) - torch.tensor(top.starts)[owner]
    across = top.attention[owner, places]  # [steps, N, K]
    for level, count in zip(reversed(lower), reversed(steps[:-1]), strict=True):
        owner_below = owner[level.owners(count)]
        sums = across.new_zeros(count, level.attention.shape[2], across.shape[2])
        counts = across.new_zeros(count)
        for window, start in enumerate(level.starts):
            here = slice(start, min(start + level.attention.shape[1], count))
            same = (owner_below[here] == owner[window]).to(across)
            product = level.attention[window, : here.stop - start] @ across[window]  # [L, N, K]
            sums[here] += product * same[:, None, None]
            counts[here] += same
        across, owner = sums / counts[:, None, None], owner_below
    return across


def describe(levels: Sequence[Level], frames: int) -> list[dict[str, Any]]:
    """Levels 2, 3, … as plain values for hierarchy.json; docs/use/segment_levels.md describes the file."""
    described = []
    spans = [(t, t) for t in range(frames)]  # first and last frame of each step
    levels = [level._replace(attention=level.attention.cpu()) for level in levels]
    for number, level in enumerate(levels):
        length = level.attention.shape[1]
        spans = [(spans[s][0], spans[min(s + length, len(spans)) - 1][1]) for s in level.starts]
        above = levels[number + 1] if number + 1 < len(levels) else None
        owners = None if above is None else above.owners(len(level.starts))
        all_masses, all_valid = level.slots.masses[0].tolist(), level.valid.tolist()
        windows = []
        for window, span in enumerate(spans):
            masses, valid = all_masses[window], all_valid[window]
            segments: list[dict[str, Any]] = [
                {"segment": k + 1, "mass": round(mass, 6)}
                for k, (mass, exists) in enumerate(zip(masses, valid, strict=True))
                if exists
            ]
            if above is not None and owners is not None:
                owner = int(owners[window])
                shares, parents = above.attention[owner, window - above.starts[owner]].max(1)
                for segment in segments:
                    k = segment["segment"] - 1
                    share = round(float(shares[k]), 6)
                    segment["part_of"] = {"window": owner, "segment": int(parents[k]) + 1, "share": share}
            windows.append({"frames": list(span), "segments": segments})
        described.append({"level": number + 2, "windows": windows})
    return described
