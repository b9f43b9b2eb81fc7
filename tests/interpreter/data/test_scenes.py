"""Generated scenes: exact masks, occlusion, and textures that differ."""

from dataclasses import replace

import numpy as np
import pytest

from interpreter.data.scenes.scene import make_scene
from interpreter.data.scenes.textures import PATTERNS, noise, object_texture, oklch_to_rgb

SEEDS = range(12)


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(np.random.default_rng(seed), (96, 144), 24) for seed in SEEDS]


@pytest.fixture(scope="module")
def rendered(scenes):
    return [scene.render() for scene in scenes]


def inside(thing, t, size):
    """Whether each pixel's centre lies inside the outline: the definition, without antialiasing or windows."""
    y, x = np.mgrid[: size[0], : size[1]] - thing.centre[t][:, None, None]
    angle = (np.arctan2(y, x) - thing.rotation[t]) % (2 * np.pi)
    table = np.append(thing.outline, thing.outline[0])
    return np.hypot(y, x) <= thing.radius[t] * np.interp(angle, np.linspace(0, 2 * np.pi, len(table)), table)


def test_masks_show_the_nearest_object(scenes, rendered):
    wrong = total = 0
    for scene, (_, masks) in zip(scenes, rendered, strict=True):
        for t in (0, 11, 23):
            expected = np.zeros(scene.size, int)
            for thing, identity in zip(scene.objects, scene.ids, strict=True):  # from back to front
                expected[inside(thing, t, scene.size)] = identity
            wrong += (masks[t] != expected).sum()
            total += expected.size
    assert wrong / total < 1e-4  # the first-order distance may flip a pixel at a sharp corner


def test_objects_do_occlude_each_other(scenes):
    hidden = [
        (inside(back, t, scene.size) & inside(front, t, scene.size)).sum()
        for scene in scenes
        for t in (0, 11, 23)
        for i, back in enumerate(scene.objects)
        for front in scene.objects[i + 1 :]
    ]
    assert np.count_nonzero(hidden) > len(SEEDS)


def test_identity_keeps_its_colours(rendered):
    """The colour histogram inside a mask is closer to the same object's in other frames than to other objects'."""
    right = total = 0
    for frames, masks in rendered:
        histograms = {}
        for t in (4, 12, 20):
            for identity in np.unique(masks[t])[1:]:
                pixels = frames[t][masks[t] == identity] // 64
                if len(pixels) > 150:
                    bins = np.bincount(pixels @ [16, 4, 1], minlength=64)
                    histograms[t, identity] = bins / bins.sum()
        for (t, identity), one in histograms.items():
            others = {key: np.abs(one - h).sum() for key, h in histograms.items() if key[0] != t}
            if others:
                right += min(others, key=others.get)[1] == identity
                total += any(key[1] == identity for key in others)
    assert total > 60
    assert right / total > 0.9


def test_scene_is_what_it_promises(scenes, rendered):
    for scene, (frames, masks) in zip(scenes, rendered, strict=True):
        count = len(scene.objects)
        assert 3 <= count <= 8
        assert sorted(scene.ids) == list(range(1, count + 1))
        assert set(np.unique(masks)) <= set(range(count + 1))
        assert frames.shape == (24, 96, 144, 3)
        assert frames.dtype == masks.dtype == np.uint8
        for thing in scene.objects:
            share = np.pi * thing.radius**2 / (96 * 144)
            assert 0.025 < share.min() <= share.max() < 0.16
            steps = np.diff(thing.centre, axis=0)
            assert np.hypot(*steps.T).max() < 8
            assert np.hypot(*(thing.centre[-1] - thing.centre[0])) + np.ptp(thing.rotation) > 0


def test_most_objects_are_visible_and_some_leave(rendered):
    shares = [(masks == i).mean((1, 2)) for _, masks in rendered for i in range(1, masks.max() + 1)]
    assert np.mean([share.max() > 0.02 for share in shares]) > 0.9
    assert any((share == 0).any() and share.max() > 0.01 for share in shares)


def test_background_moves_and_is_textured(scenes, rendered):
    for scene, (frames, masks) in zip(scenes, rendered, strict=True):
        assert np.hypot(*(scene.camera[-1] - scene.camera[0])[:2]) > 2
        clear = (masks[0] == 0) & (masks[-1] == 0)
        assert np.abs(frames[0].astype(int) - frames[-1])[clear].mean() > 2
        assert 6 < frames[0][masks[0] == 0].std(0).mean() < 70


def test_borders_are_antialiased(scenes, rendered):
    """Along an object's border there are pixels between the colours on either side, so their steps are smaller."""
    scene, (frames, masks) = scenes[0], rendered[0]
    front = scene.ids[-1]
    mask = masks[0] == front
    border = mask[:, 1:] != mask[:, :-1]
    at = np.abs(np.diff(frames[0].astype(int), axis=1)).sum(-1)[border].mean()
    across = np.abs(frames[0][:, 3:].astype(int) - frames[0][:, :-3]).sum(-1)[border[:, 1:-1]].mean()
    assert at < 0.8 * across


def test_shadow_falls_away_from_the_light(scenes):
    for scene in scenes[:4]:
        alone = replace(scene, objects=scene.objects[:1], ids=scene.ids[:1])
        frames, masks = alone.render()
        empty, _ = replace(scene, objects=[], ids=scene.ids[:0]).render()
        darker = (empty[0].astype(int) - frames[0]).sum(-1) * (masks[0] == 0)
        y, x = (np.average(axis, weights=darker.clip(0)) for axis in np.mgrid[: scene.size[0], : scene.size[1]])
        own = np.argwhere(masks[0] > 0).mean(0)
        assert (np.array([y, x]) - own) @ scene.light[:2] < 0


@pytest.mark.parametrize("size", [(32, 32), (48, 160), (160, 48), (101, 77)])
def test_any_size_renders(size):
    frames, masks = make_scene(np.random.default_rng(0), size, 2).render()
    assert frames.shape == (2, *size, 3)
    assert masks.max() > 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_texture_has_contrast(pattern):
    for seed in range(5):
        texture = object_texture(np.random.default_rng(seed), pattern, hue=seed / 5)
        assert texture.shape == (128, 128, 3)
        assert texture.min() >= 0
        assert texture.max() <= 1
        assert texture.std((0, 1)).max() > 0.02


def test_oklch_knows_black_white_and_gray():
    np.testing.assert_allclose(oklch_to_rgb(0, 0, 0.3), 0, atol=1e-6)
    np.testing.assert_allclose(oklch_to_rgb(1, 0, 0.3), 1, atol=1e-3)
    assert np.ptp(oklch_to_rgb(0.5, 0, 0.7)) < 1e-3
    np.testing.assert_allclose(oklch_to_rgb(0.62796, 0.25768, 29.234 / 360), [1, 0, 0], atol=2e-3)


def test_rougher_noise_has_more_detail():
    fine, cloudy = (noise(np.random.default_rng(0), (64, 64), r, 64) for r in (1, 2.5))
    assert np.abs(np.diff(fine)).mean() > 2 * np.abs(np.diff(cloudy)).mean()
    for field in (fine, cloudy):
        assert 0 <= field.min() < 0.2
        assert 0.8 < field.max() <= 1
