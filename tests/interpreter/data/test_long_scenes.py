"""Generated scenes of any length in which objects leave and return, and those with chosen numbers of objects."""

import tracemalloc

import numpy as np
import pytest

from interpreter.configs import VideosConfig
from interpreter.data.scenes import generate_scenes
from interpreter.data.scenes import scene as scenes
from interpreter.data.scenes.scene import make_scene
from interpreter.engine.run import check_ranges
from interpreter.engine.videos import open_videos

SIZE = (64, 96)
SCALE = min(SIZE) / 128  # speeds are relative to the height


def long_scene(seed, objects=(3, 8), num_frames=600):
    return make_scene(np.random.default_rng(seed), SIZE, num_frames, objects, absences=True)


@pytest.fixture(scope="module")
def long_scenes():
    return [long_scene(seed) for seed in range(2)]


@pytest.fixture(scope="module")
def long_masks(long_scenes):
    return [scene.render()[1] for scene in long_scenes]


def from_frame(scene, thing):
    """How far the centre of an object is from the frame, [T]; 0 inside."""
    return np.hypot(*(thing.centre - thing.centre.clip(0, scene.size)).T)


def lengths_of_runs(flags):
    """Lengths of the runs of true values that neither begin nor end the sequence."""
    changes = np.flatnonzero(np.diff(flags.astype(int)))
    if flags[0]:
        changes = changes[1:]
    return np.diff(changes)[::2]


def test_scenes_without_options_are_what_they_always_were():
    scene = make_scene(np.random.default_rng(0), (96, 144), 24)
    assert scene.ids.tolist() == [7, 6, 8, 3, 1, 5, 4, 2]
    np.testing.assert_allclose(scene.camera[23], [48.1975, 27.0363, 0.9792], atol=1e-3)
    centres = [thing.centre[23].tolist() for thing in scene.objects[:3]]
    np.testing.assert_allclose(centres, [[7.451, 41.546], [58.258, 96.047], [72.010, 54.127]], atol=1e-3)
    np.testing.assert_allclose(scene.background.mean(), 0.366288, atol=1e-6)  # drawn after all objects


def test_every_object_leaves_and_returns_with_its_id(long_scenes, long_masks):
    for scene, masks in zip(long_scenes, long_masks, strict=True):
        for thing, identity in zip(scene.objects, scene.ids, strict=True):
            away = from_frame(scene, thing) > thing.radius * thing.outline.max() + 1
            seen = (masks == identity).any((1, 2))
            assert not seen[away].any()
            assert seen.mean() > 0.5
            gaps = lengths_of_runs(away)
            assert len(gaps) >= 2
            assert 10 <= gaps.min() <= gaps.max() <= 70


def test_objects_return_at_other_borders_too(long_scenes):
    sides = []
    for scene in long_scenes:
        for thing in scene.objects:
            outside = thing.centre - thing.centre.clip(0, scene.size)
            away = np.flatnonzero(np.hypot(*outside.T) > 0)
            for visit in np.split(away, np.flatnonzero(np.diff(away) > 1) + 1):
                axis = np.abs(outside[visit]).argmax(1)
                side = 2 * axis + (outside[visit, axis] > 0)
                sides.append(side[0] == side[-1])
    assert 0.2 < np.mean(sides) < 0.9


@pytest.mark.parametrize("objects", [(1, 1), (2, 2), (3, 3), (12, 12)])
@pytest.mark.parametrize("num_frames", [24, 200])
def test_something_and_the_background_are_in_view_in_every_frame(objects, num_frames):
    for seed in range(2):
        scene = long_scene(seed, objects, num_frames)
        for _, mask in scene.frames():
            assert 0 < (mask > 0).mean() < 0.9
        inside = np.stack([from_frame(scene, thing) == 0 for thing in scene.objects])
        assert inside.any(0).all()
        assert inside.any(1).all()  # no object is away for the whole video


def test_two_objects_take_turns():
    scene = long_scene(0, (2, 2), 1000)
    away = [from_frame(scene, thing) > 0 for thing in scene.objects]
    assert min(len(lengths_of_runs(flags)) for flags in away) >= 2
    assert not (away[0] & away[1]).any()


def test_motion_is_smooth_and_bounded_for_any_length():
    scene = long_scene(0, num_frames=10_000)
    for thing in scene.objects:
        speed = np.diff(thing.centre, axis=0)
        assert np.hypot(*speed.T).max() < 10 * SCALE
        assert np.hypot(*np.diff(speed, axis=0).T).max() < 3.5 * SCALE
        assert len(lengths_of_runs(from_frame(scene, thing) > 0)) > 30
    speed = np.diff(scene.camera, axis=0)
    assert np.hypot(*speed[:, :2].T).max() < 1.5 * SCALE * np.sqrt(2)
    assert np.abs(speed[:, 2]).max() < 0.0011
    corner, zoom = scene.camera[:, :2], scene.camera[:, 2:]
    assert corner.min() > 0
    assert (corner + zoom * (np.array(SIZE) - 1) < np.array(scene.background.shape[:2]) - 1).all()
    assert np.ptp(corner, axis=0).min() > 0.5 * 0.35 * min(SIZE)


def test_frames_stream(monkeypatch):
    drawn = []
    draw = scenes._draw
    monkeypatch.setattr(scenes, "_draw", lambda *arguments: (drawn.append(arguments[1]), draw(*arguments)))
    scene = long_scene(0, num_frames=10_000)
    frames, masks = scene.frames(), []
    tracemalloc.start()
    for _ in range(50):
        masks.append(next(frames)[1].max())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(drawn) == set(range(50))
    assert peak < 50 * 3 * SIZE[0] * SIZE[1]


def test_a_video_is_written_while_it_is_rendered(tmp_path, monkeypatch):
    unwritten = []
    frames = scenes.Scene.frames

    def counted(scene):
        for number, pair in enumerate(frames(scene)):
            unwritten.append(number - len(list(tmp_path.glob("JPEGImages/480p/.*/*.jpg"))))
            yield pair

    monkeypatch.setattr(scenes.Scene, "frames", counted)
    generate_scenes(tmp_path, 1, size=(32, 32), num_frames=8, workers=1)
    assert unwritten == [0] * 8


@pytest.mark.parametrize("objects", [(1, 1), (1, 12), (5, 7), (12, 12)])
def test_numbers_of_objects_are_those_asked_for(objects):
    made = [make_scene(np.random.default_rng(seed), (32, 48), 1, objects) for seed in range(40)]
    counts = [len(scene.objects) for scene in made]
    assert set(counts) == set(range(objects[0], objects[1] + 1))
    assert all(sorted(scene.ids) == list(range(1, count + 1)) for scene, count in zip(made, counts, strict=True))


def test_options_of_the_commands_reach_the_scenes(tmp_path):
    config = VideosConfig(
        root=tmp_path, num_videos=2, scene_frames=30, scene_objects=(2, 2), scene_absences=True, split="val"
    )
    dataset = open_videos(config, tmp_path)
    assert [video.num_frames for video in dataset.videos] == [30, 30]
    expected = tmp_path / "expected"
    generate_scenes(expected, 2, num_frames=30, objects=(2, 2), absences=True, split="val", workers=1)
    for part in ("JPEGImages", "Annotations_unsupervised"):
        for path in (expected / part).rglob("*.*g"):
            assert (tmp_path / path.relative_to(expected)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("change", [{"scene_frames": 0}, {"scene_objects": (0, 3)}])
def test_options_below_their_range_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be at least 1, got 0"):
        check_ranges(VideosConfig(**change))


@pytest.mark.parametrize("objects", [(0, 3), (5, 4), (3, 13)])
def test_impossible_numbers_of_objects_write_nothing(tmp_path, objects):
    with pytest.raises(ValueError, match=r"^objects must be the fewest and the most of a scene, from 1 to 12, not \d"):
        generate_scenes(tmp_path / "root", objects=objects)
    assert not (tmp_path / "root").exists()
