"""Levels of slots: windows of a level become the steps of the level above, and attention is propagated through all.

Level 1 are the image slots of frames. The steps of level 2 are frames, those of level 3 are windows of frames, each
with the video slots that level 2 found in it, and so on up to the top level, whose only window is the whole video. So
the time of every level but the top one grows linearly with the video's length, and the top level has few steps.

A slot stands for a share of the patches of its window, its *mass*, and for the mean feature and position of these
patches. Windows may overlap; a step that lies in several belongs to the one with the nearest centre, its *owner*.
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

WINDOWS_AT_ONCE = 8  # that are grouped together: bounds the memory
SMALLEST = 1e-12


class Slots(NamedTuple):
    """Slots of T consecutive steps of B videos, or of B draws of one video."""

    slots: Tensor  # [B, T, N, D]
    masses: Tensor  # [B, T, N], the share of the step's patches that each stands for; 0 for a slot that was merged away
    means: Tensor | None = None  # [B, T, N, C + 2], mean feature and mean position of these patches

    def inputs(self, kind: VideoInputs) -> Tensor:
        """What describes them to the level above, [B, T, N, D_input]."""
        if kind == "slots":
            return self.slots.float()
        assert self.means is not None, "a level that reads means is built on levels that have them"
        return means_as_inputs(self.means.float())

    def steps(self, part: slice) -> "Slots":
        """Some of the steps."""
        return Slots(*(None if t is None else t[:, part] for t in self))  # type: ignore[arg-type]

    @staticmethod
    def joined(parts: Sequence["Slots"], dim: int = 1) -> "Slots":
        """Parts one after the other in time (``dim=1``), or as more videos (``dim=0``)."""
        return Slots(*(None if t[0] is None else torch.cat(t, dim) for t in zip(*parts, strict=True)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Windows:
    """How the steps of a level are cut into windows.

    >>> Windows(length=4, overlap=1).starts(steps=9)
    [0, 3, 5]
    >>> Windows(length=4, overlap=1).starts(steps=3)
    [0]

    Attributes:
        length: of a window, in steps. The only window of a shorter video is the video.
        overlap: steps that two consecutive windows have in common; the last window ends with the video, and may have
            more in common with the one before.
    """

    length: int
    overlap: int = 0

    def starts(self, steps: int) -> list[int]:
        """First step of each window."""
        last = max(0, steps - self.length)
        return [*range(0, last, self.length - self.overlap), last]

    def cut(self, parts: Iterable[Slots], steps: int) -> Iterator[Slots]:
        """Yield each window; ``parts`` are the slots of all ``steps``, of which a window and a part are in memory."""
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
    """The windows of a level, trained with ``below``, that the level above, trained with ``config``, sees.

    Raises:
        ValueError: if they overlap by a whole window.
    """
    length = config.window or below.num_frames
    if config.overlap >= length:
        raise ValueError(f"--overlap {config.overlap} must be less than the {length} steps of a window")
    return Windows(length, config.overlap)


class Level(NamedTuple):
    """Slots of a level, and what they are made of."""

    slots: Slots  # [1, W, K, ...], of its W windows
    attention: Tensor  # [W, L, N, K], of the slots of the level below over them
    starts: list[int]  # the first step of each window

    @property
    def valid(self) -> Tensor:
        """Slots [W, K] that were not merged away."""
        return self.slots.masses[0] > 0

    def owners(self, steps: int) -> Tensor:
        """The window [steps] that each step belongs to, on the CPU."""
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
    """Video slots of B videos, or windows of them: for each one the best of R starts, by the loss.

    Args:
        stage: finds them.
        inputs: what it gets of each slot of the level below.
        starts: initial slots.
        precision: see :func:`interpreter.models.autocast.autocast`.
        merge_threshold: see :meth:`VideoStage.group`.
        masses: of the inputs, see :class:`VideoStage`.
        iterations: of slot attention. Default: the configuration's, of inference.
        weights: masses of the loss alone. Default: ``masses``.
    """
    config, best = stage.config, None
    iterations = iterations or config.inference_iterations
    least = inputs.new_full((len(inputs),), torch.inf)
    with autocast(inputs.device, precision):
        context = stage.encode_slots(inputs, masses)
        for initial in starts:
            found = stage.group(context, initial, merge_threshold, iterations, config.inference_sharpness, masses)
            if len(starts) == 1:  # nothing to compare it with, and a decoder's time may be quadratic in the length
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
    """Slots [B, 1, K, ...] of windows and the attention [B, L, N, K] over them, by the best of R draws of the prior.

    Args:
        noise: standard normal.
        stage, precision, merge_threshold: see :func:`best_of`.
        windows: slots of the level below, one window of each of B videos or draws.
        weighted: whether masses weigh in the loss, as they do above level 2.
    """
    with autocast(noise.device, precision):
        starts = torch.stack([stage.slot_attention.sample_slots(len(draw), noise=draw) for draw in noise])
    # Without masses the loss of a window would depend on the windows that are in its batch.
    masses, weights = (windows.masses, None) if weighted else (None, torch.ones_like(windows.masses))
    inputs = windows.inputs(stage.config.inputs)
    best = best_of(stage, inputs, starts, precision, merge_threshold, masses, weights=weights)
    best = _valid_first(best)
    return summarise(best, windows), best.attention.float()


def _valid_first(video: VideoSlots) -> VideoSlots:
    """The same slots, those that a gate dropped last; merged ones are last already."""
    order = torch.argsort((~video.valid).int(), dim=1, stable=True)  # [B, K]
    slots = video.slots.gather(1, order.unsqueeze(2).expand_as(video.slots))
    attention = video.attention.gather(3, order[:, None, None].expand_as(video.attention))
    return video._replace(slots=slots, attention=attention, valid=video.valid.gather(1, order))


def _where(condition: Tensor, chosen: VideoSlots, others: VideoSlots) -> VideoSlots:
    """For each video the one or the other."""
    mixed = [
        None if a is None or b is None else torch.where(condition.view(-1, *[1] * (a.dim() - 1)), a, b)
        for a, b in zip(chosen, others, strict=True)
    ]
    return VideoSlots(*mixed)  # type: ignore[arg-type]  # None without a gate


def summarise(video: VideoSlots, windows: Slots) -> Slots:
    """What the slots of a window stand for: their masses and means, from those of the level below. [B, 1, K, ...]"""
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
    """A level on top of the slots [1, T, N, ...] of a video.

    Args:
        stage: of the level.
        below: slots of the level below.
        windows: that the steps of the level below are cut into.
        noise: function of a window's number, that returns standard normal noise [R, K, D].
        weighted, precision, options: see :func:`group_windows`.
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
    """A level of one window whose slots that are alike are merged (:mod:`interpreter.methods.interpreter.counting`),
    judged by the means of the slots of the level below, or where there are none, by these slots."""
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

    Slots of the last level are numbered within their window, that of a frame's owner. Of the levels below, a step is
    the mean over all windows that it lies in, unless their owner is another one.
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
    """The hierarchy of levels 2, 3, … in JSON's types, as written to hierarchy.json: see docs/use/segment_levels.md."""
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
