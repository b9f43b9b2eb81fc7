"""Generated scenes: textured objects that move over a panning background and occlude each other, with exact masks.

A simple version of MOVi (Greff et al. 2022). Every frame is computed from formulas, with antialiasing by coverage for
colours. A pixel belongs to the nearest object that covers at least half of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from interpreter.data.scenes.motion import bounce, ease_camera, leave_and_return, roam, wander_camera
from interpreter.data.scenes.textures import PATTERNS, background_texture, object_texture

MOST_OBJECTS = 12  # more objects would hide the background or each other
_ANGLES = 1024  # resolution of an outline
_TEXTURE_REACH = 1.25  # object textures cover -1.25..1.25 object radii
_SHADOW_REACH = 0.5  # a shadow reaches less than half a radius beyond the outline


@dataclass(frozen=True)
class SceneObject:
    """One object and its motion over T frames. Lengths are pixels, angles radians.

    Attributes:
        outline: [1024] radius of the outline by angle, in units of ``radius``; mean square 1, so the area at scale 1
            is pi * radius ** 2.
        texture: [S, S, 3] colours over -1.25..1.25 outline radii.
        radius: [T] size over time.
        centre: [T, 2] (y, x).
        rotation: [T].
        bulge: 0 (flat) to 1 (round), for shading.
        gloss: 0 (matt) to 1, strength of the highlight.
    """

    outline: np.ndarray
    texture: np.ndarray
    radius: np.ndarray
    centre: np.ndarray
    rotation: np.ndarray
    bulge: float
    gloss: float


@dataclass(frozen=True)
class Scene:
    """Objects with their ids, from the farthest to the nearest, over a background that the camera pans across.

    Attributes:
        size: (H, W) of a frame.
        objects: from back to front.
        ids: object id of each entry of ``objects``, 1..n in random order.
        background: [Hb, Wb, 3] canvas, larger than the frame.
        camera: [T, 3] (y, x) of the frame's corner on the canvas, and zoom.
        light: [3] unit vector (y, x, towards the viewer).
    """

    size: tuple[int, int]
    objects: list[SceneObject]
    ids: np.ndarray
    background: np.ndarray
    camera: np.ndarray
    light: np.ndarray

    def frames(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Render one frame after the other, so that a long video need not fit into memory.

        Yields:
            frame: uint8 [H, W, 3] RGB.
            mask: uint8 [H, W], 0 background and the ids of the visible objects.
        """
        for t in range(len(self.camera)):
            colour, mask = self._background(t), np.zeros(self.size, np.uint8)
            for thing, identity in zip(self.objects, self.ids, strict=True):
                _draw(thing, t, self.light, identity, colour, mask)
            yield np.rint(colour * 255).astype(np.uint8), mask

    def render(self) -> tuple[np.ndarray, np.ndarray]:
        """Render all frames at once.

        Returns:
            frames: uint8 [T, H, W, 3] RGB.
            masks: uint8 [T, H, W], 0 background and the ids of the visible objects.
        """
        frames, masks = zip(*self.frames(), strict=True)
        return np.stack(frames), np.stack(masks)

    def _background(self, t: int) -> np.ndarray:
        corner, zoom = self.camera[t, :2], self.camera[t, 2]
        view = self.background
        for axis in (0, 1):  # bilinear sampling of an axis-aligned view is one interpolation per axis
            at = corner[axis] + zoom * np.arange(self.size[axis])
            first = np.floor(at).astype(int)
            weight = (at - first).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
            view = view.take(first, axis) * (1 - weight) + view.take(first + 1, axis) * weight
        return view


def make_scene(
    rng: Generator,
    size: tuple[int, int],
    num_frames: int,
    objects: tuple[int, int] = (3, 8),
    absences: bool = False,
) -> Scene:
    """Draw a random scene.

    Args:
        rng: source of randomness.
        size: height and width of the frames.
        num_frames: frames of the video.
        objects: fewest and most objects, 1 to 12.
        absences: whether objects leave the view for a while and return, and the camera wanders instead of easing along
            a line.
    """
    count = int(rng.integers(objects[0], objects[1] + 1))
    patterns = rng.permutation(len(PATTERNS))
    hues = rng.uniform() + (np.arange(count) + rng.uniform(-0.3, 0.3, count)) / count
    # Each object covers 3.5 to 12 % of the image at scale 1. The more objects, the smaller they are, so that the
    # background stays visible.
    largest = min(0.12, 0.6 / count)
    areas = np.exp(rng.uniform(np.log(0.035), np.log(largest), count))
    move, move_camera = (roam, wander_camera) if absences else (bounce, ease_camera)
    things = [
        SceneObject(
            outline=_outline(rng),
            texture=object_texture(rng, PATTERNS[patterns[i % len(PATTERNS)]], float(hues[i])),
            bulge=float(rng.uniform(0.35, 0.95)),
            gloss=float(rng.choice((0.0, 0.15, 0.4))),
            **move(rng, size, num_frames, float(np.sqrt(areas[i] * size[0] * size[1] / np.pi))),
        )
        for i in range(count)
    ]
    if absences:
        hidden_at = [thing.radius.max() * (thing.outline.max() + _SHADOW_REACH) + 2 for thing in things]
        centres = leave_and_return(rng, size, [thing.centre for thing in things], hidden_at)
        things = [replace(thing, centre=centre) for thing, centre in zip(things, centres, strict=True)]
    margin = 0.35 * min(size)
    background = background_texture(rng, (round(size[0] + 2 * margin), round(size[1] + 2 * margin)))
    return Scene(
        size=size,
        objects=things,
        ids=(1 + rng.permutation(count)).astype(np.uint8),
        background=background,
        camera=move_camera(rng, size, background.shape[:2], num_frames),
        light=_unit(np.array([-rng.uniform(0.4, 0.8), rng.uniform(-0.7, 0.7), 1.0])),
    )


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum())


def _outline(rng: Generator) -> np.ndarray:
    """A random closed outline: superellipse, polygon with rounded corners, star or blob."""
    angle = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    kind = rng.integers(4)
    if kind == 0:
        power, aspect = rng.choice((1.2, 2.0, 2.0, 3.5, 6.0)), rng.uniform(0.55, 1)
        radius = (np.abs(np.cos(angle)) ** power + np.abs(np.sin(angle) / aspect) ** power) ** (-1 / power)
    elif kind == 1:
        sides, sharpness = rng.integers(3, 7), rng.uniform(10, 30)
        normals = 2 * np.pi * np.arange(sides) / sides + rng.uniform(-0.2, 0.2, sides)
        walls = np.maximum(np.cos(angle[:, None] - normals), 0) / rng.uniform(0.8, 1.15, sides)
        radius = (walls**sharpness).sum(1) ** (-1 / sharpness)  # a p-norm of the walls rounds the corners
    elif kind == 2:
        points, depth = rng.integers(4, 8), rng.uniform(0.16, 0.32)
        wave = np.cos(points * angle)
        radius = 1 + depth * np.tanh(rng.uniform(0.6, 2) * wave)
    else:
        harmonics = np.arange(2, 6)
        strength = rng.normal(0, 0.28, 4) / harmonics**0.8
        radius = np.exp((strength * np.cos(harmonics * angle[:, None] + rng.uniform(0, 6.28, 4))).sum(1))
    return radius / np.sqrt((radius**2).mean())


def _draw(thing: SceneObject, t: int, light: np.ndarray, identity: int, colour: np.ndarray, mask: np.ndarray) -> None:
    """Draw one object with its shadow onto a frame [H, W, 3] and its mask [H, W], in place."""
    radius, centre = thing.radius[t], thing.centre[t]
    reach = radius * thing.outline.max() + 1

    shadow_centre = centre - 0.3 * radius * light[:2]
    rows, columns, y, x = _window(shadow_centre, reach + radius / 4, mask.shape)
    distance, _, _ = _polar(thing, t, y, x)
    colour[rows, columns] *= (1 - 0.42 * _smooth(0.5 - distance / (0.5 * radius)))[..., None]

    rows, columns, y, x = _window(centre, reach, mask.shape)
    distance, depth, slope = _polar(thing, t, y, x)
    coverage = np.clip(0.5 - distance, 0, 1)
    inside = coverage > 0
    y, x = (np.broadcast_to(axis, inside.shape)[inside] for axis in (y, x))
    surface = _shade(thing, t, light, y, x, depth[inside], slope[inside])
    below = colour[rows, columns]
    below[inside] += coverage[inside][:, None] * (surface - below[inside])
    mask[rows, columns][coverage >= 0.5] = identity


def _window(centre: np.ndarray, reach: float, shape: tuple[int, ...]) -> tuple[slice, slice, np.ndarray, np.ndarray]:
    """The part of a frame within ``reach`` of ``centre`` (may be empty); its y [h, 1] and x [1, w] relative to it."""
    top, left = np.clip(np.floor(centre - reach), 0, shape).astype(int)
    bottom, right = np.clip(np.ceil(centre + reach) + 1, 0, shape).astype(int)
    y, x = np.arange(top, bottom)[:, None] - centre[0], np.arange(left, right)[None] - centre[1]
    return slice(top, bottom), slice(left, right), y, x


def _polar(thing: SceneObject, t: int, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distance to the outline in pixels (first order), distance from the centre in outline radii, and the
    outline's slope (d radius / d angle / radius); each [h, w].
    """
    turn = (np.arctan2(y, x) - thing.rotation[t]) * (_ANGLES / (2 * np.pi))
    index = np.floor(turn).astype(int)
    outline = thing.radius[t] * thing.outline
    at = outline[index % _ANGLES] + (turn - index) * (outline[(index + 1) % _ANGLES] - outline[index % _ANGLES])
    slope = (outline[(index + 2) % _ANGLES] - outline[(index - 2) % _ANGLES]) * (_ANGLES / (8 * np.pi))
    from_centre = np.hypot(y, x)
    return (from_centre - at) / np.hypot(1, slope / at), from_centre / at, slope / at


def _shade(
    thing: SceneObject, t: int, light: np.ndarray, y: np.ndarray, x: np.ndarray, depth: np.ndarray, slope: np.ndarray
) -> np.ndarray:
    """Colour [n, 3] of n pixels of the object: its texture, turned and scaled with it, lit as a shallow dome."""
    cos, sin = np.cos(thing.rotation[t]), np.sin(thing.rotation[t])
    per_pixel = (len(thing.texture) - 1) / (2 * _TEXTURE_REACH * thing.radius[t])
    middle = (len(thing.texture) - 1) / 2
    albedo = _bilinear(
        thing.texture, middle + (cos * y - sin * x) * per_pixel, middle + (cos * x + sin * y) * per_pixel
    )

    steep = thing.bulge * np.clip(depth, 0, 1) ** 2.5  # flat in the middle, falling off towards the outline
    norm = np.maximum(np.hypot(y, x), 1e-6) * np.hypot(1, slope)
    normal_y, normal_x = steep * (y - slope * x) / norm, steep * (x + slope * y) / norm
    towards = np.sqrt(np.maximum(1 - normal_y**2 - normal_x**2, 0))
    facing = normal_y * light[0] + normal_x * light[1] + towards * light[2]
    diffuse = 0.42 + 0.7 * np.maximum(facing, 0)
    half = _unit(light + np.array([0.0, 0.0, 1.0]))
    shine = np.maximum(normal_y * half[0] + normal_x * half[1] + towards * half[2], 0) ** 30
    return np.clip(albedo * diffuse[..., None] + (thing.gloss * shine)[..., None], 0, 1)


def _bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sample an image [h, w, 3] at n positions, giving [n, 3]. Outside the image, its border is repeated."""
    y = np.clip(y, 0, image.shape[0] - 1.000001)
    x = np.clip(x, 0, image.shape[1] - 1.000001)
    top, left = y.astype(int), x.astype(int)
    dy, dx = (y - top)[..., None], (x - left)[..., None]
    upper = image[top, left] * (1 - dx) + image[top, left + 1] * dx
    lower = image[top + 1, left] * (1 - dx) + image[top + 1, left + 1] * dx
    return upper * (1 - dy) + lower * dy


def _smooth(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)
