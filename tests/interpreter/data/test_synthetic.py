"""Generated data sets depend on seed, split and index alone, and can be interrupted."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from interpreter.data import open_dataset
from interpreter.data.scenes import generate as synthetic
from interpreter.data.scenes import generate_scenes

from ..videos import digest

SMALL = {"size": (48, 64), "num_frames": 3}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    generate_scenes(root, 5, workers=1, **SMALL)
    return root


def test_reader_returns_what_was_rendered(scenes):
    dataset = open_dataset("synthetic", scenes, "train")
    assert [v.name for v in dataset.videos] == [f"train-{i:05d}" for i in range(5)]
    recipe = synthetic._Recipe(0, (48, 64), 3, "train")
    for i, video in enumerate(dataset.videos):
        frames, masks = recipe.scene(i).render()
        np.testing.assert_array_equal(dataset.masks(i), masks)
        np.testing.assert_array_equal(dataset.mask_frames(i), range(3))
        assert np.abs(np.stack(list(video.frames())) - frames.astype(float)).mean() < 3  # JPEG


def test_masks_are_palette_images_in_davis_colours(scenes):
    with Image.open(scenes / "Annotations_unsupervised/480p/train-00000/00000.png") as image:
        assert image.mode == "P"
        assert image.getpalette()[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]


def test_workers_do_not_matter(scenes, tmp_path):
    generate_scenes(tmp_path, 5, workers=2, **SMALL)
    assert digest(tmp_path) == digest(scenes)


def test_command_makes_the_same_scenes(scenes, tmp_path):
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "-m",
        "interpreter.data.synthetic",
        "--root",
        tmp_path,
    ]
    options = ["--num-videos", "5", "--size", "48", "64", "--num-frames", "3", "--workers", "1"]
    subprocess.run([*command, *options], check=True)
    assert digest(tmp_path) == digest(scenes)
    wrong = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: ")
    assert "Traceback" not in wrong.stderr


def test_seeds_splits_and_indices_differ(scenes, tmp_path):
    generate_scenes(tmp_path / "seed", 2, seed=1, workers=1, **SMALL)
    generate_scenes(tmp_path / "split", 2, split="val", workers=1, **SMALL)
    sets = [open_dataset("synthetic", root) for root in (scenes, tmp_path / "seed", tmp_path / "split")]
    first_frames = [next(video.frames()).tobytes() for dataset in sets for video in dataset.videos]
    assert len(set(first_frames)) == 5 + 2 + 2


def test_splits_share_a_root(tmp_path):
    generate_scenes(tmp_path, 1, workers=1, **SMALL)
    generate_scenes(tmp_path, 2, split="val", workers=1, **SMALL)
    assert [len(open_dataset("synthetic", tmp_path, split)) for split in ("train", "val", None)] == [1, 2, 3]


def test_finished_set_is_reused_without_work(scenes, monkeypatch):
    before = digest(scenes)
    monkeypatch.setattr(synthetic, "write_video", lambda *_: pytest.fail("rendered again"))
    generate_scenes(scenes, 5, **SMALL)
    assert digest(scenes) == before


def test_more_videos_are_added(scenes, tmp_path, monkeypatch):
    generate_scenes(tmp_path, 3, workers=1, **SMALL)
    written = []
    write = synthetic.write_video
    monkeypatch.setattr(synthetic, "write_video", lambda *a: (written.append(a[1]), write(*a)))
    generate_scenes(tmp_path, 5, workers=1, **SMALL)
    assert written == ["train-00003", "train-00004"]
    assert digest(tmp_path) == digest(scenes)


@pytest.mark.parametrize("saves", [1, 5, 8])
def test_interrupted_generation_continues(scenes, tmp_path, monkeypatch, saves):
    """Ctrl-C after some images, in the masks or the frames of the first or second video."""
    left = [saves]
    save = Image.Image.save

    def interrupted(*args, **kwargs):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_scenes(tmp_path, 5, workers=1, **SMALL)
    with pytest.raises(FileNotFoundError, match="no image set"):
        open_dataset("synthetic", tmp_path, "train")  # unfinished sets are not read
    generate_scenes(tmp_path, 5, workers=1, **SMALL)
    assert digest(tmp_path) == digest(scenes)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"size": (48, 80)},
        {"num_frames": 4},
        {"num_videos": 4},
        {"objects": (1, 12)},
        {"absences": True},
    ],
    ids=lambda c: next(iter(c)),
)
def test_other_parameters_are_an_error_not_a_mixture(scenes, change):
    before = digest(scenes)
    (key,) = change
    with pytest.raises(ValueError, match=rf"scenes-train\.json: .*{key}=.*now .*choose another root or split"):
        generate_scenes(scenes, **{"num_videos": 5, **SMALL, **change})
    assert digest(scenes) == before


def test_manifest_names_younger_settings_only_where_they_were_chosen(scenes, tmp_path):
    old = json.loads((scenes / "scenes-train.json").read_text())
    assert old == {"seed": 0, "size": [48, 64], "num_frames": 3, "split": "train", "version": 1, "num_videos": 5}
    chosen = {"objects": (2, 4), "absences": True}
    generate_scenes(tmp_path, 1, workers=1, **SMALL, **chosen)
    made = json.loads((tmp_path / "scenes-train.json").read_text())
    assert made == {**old, "num_videos": 1, "objects": [2, 4], "absences": True}
    generate_scenes(tmp_path, 3, workers=2, **SMALL, **chosen)
    with pytest.raises(ValueError, match=r"objects=\[2, 4\] \(now \[3, 8\]\), absences=True \(now False\)"):
        generate_scenes(tmp_path, 3, **SMALL)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_videos": 0},
        {"num_frames": 0},
        {"seed": -1},
        {"size": (16, 64)},
        {"workers": 0},
        {"split": "../x"},
        {"split": ""},
    ],
)
def test_bad_arguments_write_nothing(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate_scenes(tmp_path / "root", **wrong)
    assert not (tmp_path / "root").exists()


def test_two_runs_at_once_share_the_work(scenes, tmp_path, monkeypatch):
    written = []
    write = synthetic.write_video
    monkeypatch.setattr(synthetic, "write_video", lambda *a: (written.append(a[1]), write(*a)))
    start = threading.Barrier(2)

    def run(_):
        start.wait()
        generate_scenes(tmp_path, 5, workers=1, **SMALL)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert written == [f"train-{number:05d}" for number in range(5)]
    assert digest(tmp_path) == digest(scenes)
