"""Procedural colours and textures for generated scenes. Everything is float64 in 0..1 and drawn from one generator."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from scipy.ndimage import gaussian_filter

SIDE = 128  # pixels of an object's texture


def oklch_to_rgb(lightness: float, chroma: float, hue: float) -> np.ndarray:
    """One OKLCH colour (Ottosson 2020) as sRGB [3] in 0..1, clipped to the gamut.

    In this colour space, equal steps look equally large, so random palettes are balanced.

    Args:
        lightness: 0 black to 1 white.
        chroma: 0 gray to about 0.3.
        hue: in turns.
    """
    a, b = chroma * np.cos(2 * np.pi * hue), chroma * np.sin(2 * np.pi * hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.array(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ]
    ).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def noise(rng: Generator, shape: tuple[int, int], roughness: float, scale: float) -> np.ndarray:
    """Smooth random field [H, W] in 0..1 with a power-law spectrum.

    Args:
        rng: source of randomness.
        shape: (H, W).
        roughness: exponent of the amplitude spectrum; 1 is grainy, 2.5 cloudy.
        scale: size of the largest structures in pixels. Below their frequency the spectrum is flat.
    """
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None])
    spectrum = np.fft.rfft2(rng.standard_normal(shape)) / np.maximum(frequency, 1 / scale) ** roughness
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=shape)
    return 0.5 + 0.5 * np.tanh(field / (1.5 * field.std()))


def ramp(field: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Colour a field [H, W] in 0..1 by linear interpolation between colours [n, 3]; gives [H, W, 3]."""
    stops = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(field, stops, colours[:, c]) for c in range(3)], axis=-1)


def _edge(wave: np.ndarray, sharpness: float = 6.0) -> np.ndarray:
    """Turn a wave around 0 into soft-edged bands in 0..1."""
    return 0.5 + 0.5 * np.tanh(sharpness * wave)


Pattern = Callable[[Generator, np.ndarray, np.ndarray], np.ndarray]


def _stripes(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    warp = rng.uniform(0, 0.5) * np.sin(rng.uniform(2, 4) * y + rng.uniform(0, 6))
    return _edge(np.sin(rng.uniform(7, 12) * (x + warp)))


def _checker(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    k = rng.uniform(5, 8)
    return _edge(2 * np.sin(k * x + 1) * np.sin(k * y + 1), 3)


def _dots(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    k = rng.uniform(7, 11)
    return _edge(np.cos(k * (x + y) / 1.4) + np.cos(k * (x - y) / 1.4) - rng.uniform(0.3, 1.0), 4)


def _rings(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    centre = rng.uniform(-0.5, 0.5, 2)
    return _edge(np.sin(rng.uniform(9, 14) * np.hypot(x - centre[0], y - centre[1])))


def _sectors(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius = np.hypot(x, y)
    wave = np.sin(rng.integers(2, 5) * np.arctan2(y, x) + rng.uniform(-3, 3) * radius)
    return _edge(wave * np.minimum(1, 3 * radius))


def _gradient(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 0.5 * x + 0.15 * np.sin(5 * y), 0, 1)


def _marble(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    warp = noise(rng, x.shape, 1.8, 60) - 0.5
    return 0.5 + 0.5 * np.sin(rng.uniform(4, 8) * x + 9 * warp)


def _patches(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _edge(noise(rng, x.shape, 2.2, 50) - 0.5, 14)


def _speckle(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return noise(rng, x.shape, 1.1, 25)


PATTERNS: tuple[Pattern, ...] = (
    _stripes,
    _checker,
    _dots,
    _rings,
    _sectors,
    _gradient,
    _marble,
    _patches,
    _speckle,
)


def object_texture(rng: Generator, pattern: Pattern, hue: float) -> np.ndarray:
    """Texture of one object, [128, 128, 3], over the square -1.25..1.25 of its own coordinates.

    Two or three colours around ``hue``, arranged by ``pattern``, with fine mottling.
    """
    lightness = rng.uniform(0.48, 0.74)
    contrast = rng.uniform(0.16, 0.34) * rng.choice((-1, 1))
    second = np.clip(lightness + contrast, 0.2, 0.94)
    turn = rng.choice((0.04, 0.1, 0.33, 0.5)) * rng.choice((-1, 1))
    colours = np.stack(
        [
            oklch_to_rgb(lightness, rng.uniform(0.11, 0.2), hue),
            oklch_to_rgb((lightness + second) / 2, rng.uniform(0.08, 0.16), hue + turn / 2),
            oklch_to_rgb(second, rng.uniform(0.05, 0.17), hue + turn),
        ]
    )
    axis = np.linspace(-1.25, 1.25, SIDE)
    angle = rng.uniform(0, 2 * np.pi)
    x = np.cos(angle) * axis[None] + np.sin(angle) * axis[:, None]
    y = -np.sin(angle) * axis[None] + np.cos(angle) * axis[:, None]
    colour = ramp(pattern(rng, x, y), colours)
    mottle = 1 + 0.16 * (noise(rng, (SIDE, SIDE), 1.3, 30)[..., None] - 0.5)
    return gaussian_filter((colour * mottle).clip(0, 1), (1, 1, 0))


def background_texture(rng: Generator, shape: tuple[int, int]) -> np.ndarray:
    """Background [H, W, 3]: broad colour fields, a structure of middle size, fine grain and uneven light."""
    hue, lightness = rng.uniform(), rng.uniform(0.42, 0.7)
    colours = np.stack(
        [
            oklch_to_rgb(
                np.clip(lightness + step * rng.uniform(0.06, 0.13), 0.2, 0.9),
                rng.uniform(0.015, 0.075),
                hue + step * rng.uniform(-0.12, 0.12),
            )
            for step in (-1, 0, 1)
        ]
    )
    unit = min(shape)
    fields = noise(rng, shape, 2.4, unit)
    structure = (_planks, _tiles, _strata, _pebbles)[rng.integers(4)](rng, shape, unit)
    colour = ramp(np.clip(0.6 * fields + 0.4 * structure, 0, 1), colours)
    light = 1 + 0.35 * (noise(rng, shape, 3, 2 * unit) - 0.5) + 0.22 * (structure - 0.5)
    grain = 1 + 0.14 * (noise(rng, shape, 0.9, unit / 6) - 0.5)
    return (colour * (light * grain)[..., None]).clip(0, 1)


def _grid(rng: Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    return np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y


def _planks(rng: Generator, shape: tuple[int, int], unit: int) -> np.ndarray:
    x, y = _grid(rng, shape)
    width = unit * rng.uniform(0.13, 0.24)
    board = np.floor(y / width).astype(int)
    tone = rng.uniform(0.15, 0.85, 4096)[board % 4096]
    fibre = np.sin(y / width * 2 * np.pi * 2.5 + 5 * noise(rng, shape, 2, unit) + 3 * tone + 0.02 * x)
    seam = np.clip(np.abs(y / width - np.rint(y / width)) * width / 1.2, 0, 1)
    return (tone + 0.12 * fibre) * (0.35 + 0.65 * seam)


def _tiles(rng: Generator, shape: tuple[int, int], unit: int) -> np.ndarray:
    x, y = _grid(rng, shape)
    side = unit * rng.uniform(0.18, 0.32)
    row = np.floor(y / side).astype(int)
    x = x + side * rng.choice((0, 0.5)) * (row % 2)
    tone = rng.uniform(0.2, 0.8, (64, 64))[row % 64, np.floor(x / side).astype(int) % 64]
    distance = np.minimum(np.abs(y / side - np.rint(y / side)), np.abs(x / side - np.rint(x / side))) * side
    return tone * (0.3 + 0.7 * np.clip(distance / 1.6, 0, 1))


def _strata(rng: Generator, shape: tuple[int, int], unit: int) -> np.ndarray:
    _, y = _grid(rng, shape)
    return _edge(np.sin(y * 2 * np.pi / (unit * rng.uniform(0.2, 0.4)) + 9 * noise(rng, shape, 2.3, unit)), 1.5)


def _pebbles(rng: Generator, shape: tuple[int, int], unit: int) -> np.ndarray:
    return _edge(noise(rng, shape, 2.0, unit * rng.uniform(0.1, 0.2)) - 0.5, 5)
