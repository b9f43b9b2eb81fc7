"""Photometric augmentation of clips: other colours, and blur.

The caller draws the random parameters, so that a batch depends on the number of its step alone. kornia's functions
change the colours. They take a batch of frames and one parameter for each frame, so there is no loop over samples.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from kornia.enhance import adjust_contrast_with_mean_subtraction, adjust_hue, adjust_saturation_with_gray_subtraction
from kornia.filters import gaussian_blur2d
from torch import Tensor

NUMBERS = 8
"""Random numbers that the parameters of a clip are drawn from."""
GRAY, JITTER, BLUR = 0.2, 0.8, 0.5  # probabilities
STRENGTH, HUE = 0.4, 0.1  # of brightness, contrast and saturation; of the hue, in turns
SIGMAS = (0.1, 2.0)  # pixels
RADIUS = 12  # of the kernel of the blur, 25 x 25 pixels
CHUNK = 64  # frames at once, which bounds the memory


class Photometry(NamedTuple):
    """Parameters of B clips, [B] each.

    Attributes:
        gray: whether a clip loses its colours.
        brightness, contrast, saturation: factors, 1 for no change.
        hue: rotation of the hue in radians, 0 for none.
        sigma: standard deviation of the blur in pixels, 0 for none.
    """

    gray: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    sigma: Tensor


def photometry(numbers: Tensor) -> Photometry:
    """The parameters of clips, as the published code of SMTC draws them.

    A clip is gray with probability 0.2. With probability 0.8 it gets factors of brightness, contrast and saturation
    from [0.6, 1.4] and a hue shift of up to a tenth of a turn. With probability 0.5 it gets a blur of 0.1 to 2 pixels.

    Args:
        numbers: [B, 8], uniform in [0, 1).
    """
    gray, jitter, brightness, contrast, saturation, hue, blur, sigma = numbers.unbind(1)

    def jittered(number: Tensor, strength: float) -> Tensor:
        return torch.where(jitter < JITTER, (2 * number - 1) * strength, 0.0)

    brightness, contrast, saturation = (1 + jittered(n, STRENGTH) for n in (brightness, contrast, saturation))
    width = torch.where(blur < BLUR, SIGMAS[0] + sigma * (SIGMAS[1] - SIGMAS[0]), 0.0)
    return Photometry(gray < GRAY, brightness, contrast, saturation, 2 * math.pi * jittered(hue, HUE), width)


def adjust(clips: Tensor, parameters: Photometry, order: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
    """Change the colours of clips: gray, then brightness, contrast, saturation and hue in a given order, then blur.

    All frames of a clip have the same parameters. The contrast is relative to the mean of each frame.

    Args:
        clips: uint8 [B, T, H, W, 3], RGB.
        parameters: on the CPU, so that the host need not wait to read them.
        order: order of brightness (0), contrast (1), saturation (2) and hue (3).

    Returns:
        uint8 [B, T, H, W, 3].
    """
    frames = clips.shape[1]
    size = max(1, CHUNK // frames)
    parts = []
    for begin in range(0, len(clips), size):
        chosen = Photometry(*(part[begin : begin + size].repeat_interleave(frames) for part in parameters))
        parts.append(_adjusted(clips[begin : begin + size].flatten(0, 1), chosen, order))
    return torch.cat(parts).unflatten(0, clips.shape[:2])


def _adjusted(frames: Tensor, parameters: Photometry, order: tuple[int, ...]) -> Tensor:
    """Augment frames uint8 [n, H, W, 3], each with its own parameters."""
    x = frames.permute(0, 3, 1, 2).float() / 255
    gray, brightness, contrast, saturation, hue, sigma = parameters
    x = _where(gray, x, lambda x: _gray(x).expand_as(x))
    jitter: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor, float]] = [
        (_brighter, brightness, 1.0),
        (adjust_contrast_with_mean_subtraction, contrast, 1.0),
        (adjust_saturation_with_gray_subtraction, saturation, 1.0),
        (adjust_hue, hue, 0.0),
    ]
    for number in order:
        function, factor, neutral = jitter[number]
        x = _where(factor != neutral, x, function, factor)
    x = _where(sigma > 0, x, _blurred, sigma)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def _where(rows: Tensor, x: Tensor, function: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """x with the function applied to some rows. The other rows are not computed and stay the same bit for bit."""
    chosen = rows.nonzero().flatten()  # on the CPU
    if not len(chosen):
        return x
    places = chosen.to(x.device)
    changed = function(x.index_select(0, places), *(part[chosen].to(x.device) for part in parameters))
    return x.index_copy(0, places, changed.contiguous())


def _gray(x: Tensor) -> Tensor:
    """[n, 1, H, W]; weights of ITU-R BT.601, as in Pillow."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _brighter(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor.view(-1, 1, 1, 1)).clamp(0, 1)


def _blurred(x: Tensor, sigma: Tensor) -> Tensor:
    radius = min(RADIUS, min(x.shape[-2:]) - 1)  # the picture is mirrored at its borders
    return gaussian_blur2d(x, (2 * radius + 1, 2 * radius + 1), sigma[:, None].expand(-1, 2))
