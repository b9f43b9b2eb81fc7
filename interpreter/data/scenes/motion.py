"""Motion of the objects and the camera of generated scenes. Lengths are pixels, angles radians, times frames."""

import math

import numpy as np
from numpy.random import Generator

STAY = (20, 110)  # least and most frames in view between two absences
HIDDEN = (10, 48)  # least and most frames in which the object (at any rotation) and its shadow are outside
_CORNER = 16  # points of a rounded corner


def bounce(rng: Generator, size: tuple[int, int], num_frames: int, radius: float) -> dict[str, np.ndarray]:
    """A smooth path that bounces near the border, or beyond it, so that the object leaves and returns.

    Args:
        rng: source of randomness.
        size: height and width of the frames.
        num_frames: T.
        radius: radius of the object.

    Returns:
        radius [T], centre [T, 2] and rotation [T] of a scene's object.
    """
    time = np.arange(num_frames)
    extent = np.array(size, np.float64)
    leaves = rng.uniform() < 0.25
    inset = -1.1 * radius if leaves else 0.5 * radius
    low, high = inset, extent - inset
    heading = rng.uniform(0, 2 * np.pi)
    speed = min(size) / 128 * rng.uniform(*((3.0, 5.5) if leaves else (0.6, 3.2)))
    straight = rng.uniform(low, high) + speed * time[:, None] * np.array([np.sin(heading), np.cos(heading)])
    sway = rng.uniform(0, 0.06, 2) * extent * np.sin(2 * np.pi * time[:, None] / rng.uniform(20, 40, 2))
    path = (straight - low) / (high - low)
    bounced = 1 - np.abs(path % 2 - 1)  # triangle wave: reflection at both ends
    return {"centre": low + bounced * (high - low) + sway, **_swell_and_spin(rng, time, radius)}


def roam(rng: Generator, size: tuple[int, int], num_frames: int, radius: float) -> dict[str, np.ndarray]:
    """A smooth path of any length whose centre stays in view. Arguments and result as for :func:`bounce`."""
    time = np.arange(num_frames)
    speed = min(size) / 128 * rng.uniform(0.8, 2.6)
    axes = [side / 2 + _wander(rng, time, side / 2 - 0.5 * radius, speed) for side in size]
    return {"centre": np.stack(axes, axis=1), **_swell_and_spin(rng, time, radius)}


def _swell_and_spin(rng: Generator, time: np.ndarray, radius: float) -> dict[str, np.ndarray]:
    swell = 1 + rng.uniform(0, 0.13) * np.sin(2 * np.pi * time / rng.uniform(16, 40) + rng.uniform(0, 2 * np.pi))
    return {
        "radius": radius * swell,
        "rotation": rng.uniform(0, 2 * np.pi) + rng.uniform(-0.09, 0.09) * time,
    }


def leave_and_return(
    rng: Generator, size: tuple[int, int], centres: list[np.ndarray], hidden_at: list[float]
) -> list[np.ndarray]:
    """Let objects leave the view and return, again and again, while at least one of them stays.

    An object stays on its path for 20 to 110 frames, drifts across the nearest border, is hidden for 10 to 48 frames in
    which it may pass a corner, and drifts back to its path. An absence is postponed if no other object would be in
    view, or if the object would never be in view.

    Args:
        rng: source of randomness.
        size: height and width of the frames.
        centres: the paths [T, 2] of the objects, inside the frame.
        hidden_at: distance from the frame at which an object is completely out of view, for the centre of each object.

    Returns:
        Paths [T, 2] with absences. In every frame the centre of at least one object is inside the frame.
    """
    inside = np.full(len(centres[0]), len(centres))  # number of centres inside the frame
    return [
        _with_absences(rng, size, centre, distance, inside) for centre, distance in zip(centres, hidden_at, strict=True)
    ]


def _with_absences(
    rng: Generator, size: tuple[int, int], centre: np.ndarray, distance: float, inside: np.ndarray
) -> np.ndarray:
    """One path with absences; subtracts 1 from ``inside`` where it is outside."""
    result, num_frames, num_outside = centre.copy(), len(centre), 0
    time = -int(rng.integers(STAY[1] + HIDDEN[1]))  # start before the video, so that it may begin with an absence
    while (time := time + int(rng.integers(STAY[0], STAY[1] + 1))) < num_frames:
        share, away = _absence(rng, size, centre[max(time, 0) :], distance)
        shown = slice(max(-time, 0), max(num_frames - time, 0))  # the part of the absence that is in the video
        frames = slice(max(time, 0), max(time + len(share), 0))
        path = (1 - share[shown]) * centre[frames] + share[shown] * away[shown]
        outside = ((path < 0) | (path > size)).any(1)
        if inside[frames][outside].min(initial=2) < 2 or num_outside + outside.sum() == num_frames:
            continue
        inside[frames] -= outside
        num_outside += outside.sum()
        result[frames] = path
        time += len(share)
    return result


def _absence(
    rng: Generator, size: tuple[int, int], centre: np.ndarray, distance: float
) -> tuple[np.ndarray, np.ndarray]:
    """An absence of n frames that begins on a path.

    Returns:
        share: [n, 1] weight of ``away`` against the path: up from 0, at least 1 where the object is hidden, down to 0.
        away: [n, 2] points at which the object is just hidden.
    """
    speed = min(size) / 128 * rng.uniform(2, 4.5)
    points, lengths = _around(size, distance)
    first = lengths[np.hypot(*(points - centre[0]).T).argmin()]
    hidden = int(rng.integers(HIDDEN[0], HIDDEN[1] + 1))
    # The highest speed of a smooth step is 1.5 times its mean speed; that of a departure too.
    along = first + rng.uniform(-1, 1) * speed * hidden / 1.5 * _smooth(np.linspace(0, 1, hidden))
    away = np.stack([np.interp(along % lengths[-1], lengths, axis) for axis in points.T], axis=1)
    goal = centre[min(hidden, len(centre) - 1)]
    leaving, returning = (
        math.ceil(1.5 * np.hypot(*(place - inner)) / speed) for place, inner in ((away[0], centre[0]), (away[-1], goal))
    )
    up, down = (_depart(np.arange(1, n) / n) for n in (leaving, returning))
    x = np.linspace(0, 1, hidden)  # farther out and back, with the speed of leaving and of returning at the ends
    beyond = 1.5 * hidden * x * (1 - x) * ((1 - x) / leaving + x / returning)
    return (
        np.concatenate([up, 1 + beyond, down[::-1]])[:, None],
        np.repeat(away, [leaving, *[1] * (hidden - 2), returning], axis=0),
    )


def _around(size: tuple[int, int], distance: float) -> tuple[np.ndarray, np.ndarray]:
    """The closed curve at a distance from a frame: points [n, 2], and the length [n] of the curve up to each."""
    angle = np.linspace(0, 2 * np.pi, 4 * _CORNER, endpoint=False) + np.pi / (4 * _CORNER)
    turn = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    points = np.where(turn > 0, size, 0) + distance * turn
    points = np.concatenate([points, points[:1]])
    return points, np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])


def ease_camera(rng: Generator, size: tuple[int, int], canvas: tuple[int, ...], num_frames: int) -> np.ndarray:
    """Corner and zoom [T, 3] over time, so that the view eases along a line that stays on the canvas."""
    first, last = rng.uniform(-0.06, 0.06, 2)
    zoom = 1 + np.linspace(first, last, num_frames)
    room = _room(size, canvas)
    middle = room * rng.uniform(0.35, 0.65, 2)
    heading = rng.uniform(0, 2 * np.pi)
    reach = rng.uniform(0.1, 0.35) * room * np.array([np.sin(heading), np.cos(heading)])
    along = np.sin(np.linspace(-0.5, 0.5, num_frames) * np.pi * rng.uniform(0.6, 1))
    return np.concatenate([middle + along[:, None] * reach, zoom[:, None]], axis=1)


def wander_camera(rng: Generator, size: tuple[int, int], canvas: tuple[int, ...], num_frames: int) -> np.ndarray:
    """Corner and zoom [T, 3] over time, so that the view wanders on the canvas for as long as the video is."""
    time, speed = np.arange(num_frames), min(size) / 128 * rng.uniform(0.4, 1.2)
    corner = [side / 2 + _wander(rng, time, 0.45 * side, speed) for side in _room(size, canvas)]
    return np.stack([*corner, 1 + _wander(rng, time, 0.06, 0.001)], axis=1)


def _room(size: tuple[int, int], canvas: tuple[int, ...]) -> np.ndarray:
    """Largest (y, x) of the view's corner on the canvas."""
    return np.array(canvas[:2]) - 1 - 1.06 * (np.array(size) - 1)


def _wander(rng: Generator, time: np.ndarray, amplitude: float, speed: float) -> np.ndarray:
    """A smooth motion [T] between -amplitude and amplitude that never repeats and is never faster than ``speed``."""
    periods = 2 * np.pi * amplitude / speed * rng.uniform(1, 2.5, 2)
    return amplitude * np.sin(2 * np.pi * time[:, None] / periods + rng.uniform(0, 2 * np.pi, 2)) @ (0.65, 0.35)


def _smooth(x: np.ndarray) -> np.ndarray:
    """From 0 to 1, slow at both ends."""
    return x * x * (3 - 2 * x)


def _depart(x: np.ndarray) -> np.ndarray:
    """From 0 to 1, slow at the start and fastest, 1.5, at the end."""
    return x * x * (1.5 - 0.5 * x)
