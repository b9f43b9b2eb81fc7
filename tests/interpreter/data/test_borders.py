"""Black borders are found and cropped off frames and masks, and nothing else is."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from interpreter.data import open_dataset, open_video
from interpreter.data.loaders import dali_obstacle, open_loader
from interpreter.data.video.cropped import Box, CroppedVideo, find_borders
from interpreter.store.files import read_content, require_unchanged

from ..videos import moving
from .releases import compressed, write_ytvis, ytvis_annotation, ytvis_video


@pytest.fixture
def letterbox(tmp_path):
    """letterbox(top, bottom, left, right, …) -> a folder of JPEGs with black bars, their noise included."""

    def make(top, bottom, left, right, quality=70, level=0, count=5, name="clip", inside=None):
        frames = moving(count, 96, 136) if inside is None else inside
        folder = tmp_path / name
        folder.mkdir(parents=True)
        height, width = frames.shape[1:3]
        for t, frame in enumerate(frames):
            page = np.full((top + height + bottom, left + width + right, 3), level, np.uint8)
            page[top : top + height, left : left + width] = frame
            Image.fromarray(page).save(folder / f"{t:05d}.jpg", quality=quality)
        return folder

    return make


@pytest.mark.parametrize("bars", [(24, 24, 0, 0), (0, 0, 31, 30), (13, 22, 9, 17), (16, 0, 0, 0)])
@pytest.mark.parametrize(("quality", "level"), [(95, 0), (60, 0), (30, 0), (70, 16)])
def test_bars_are_found_to_the_pixel_or_two(letterbox, bars, quality, level):
    video = open_video(letterbox(*bars, quality, level))
    box = find_borders(video)
    top, _, left, _ = bars
    true_box = np.array([top, top + 96, left, left + 136])
    box_found = np.array([box.top, box.bottom, box.left, box.right])
    # Never inside the picture; only pixels of a bar into which JPEG blurs the picture may remain.
    assert (box_found[[0, 2]] <= true_box[[0, 2]]).all()
    assert (box_found[[1, 3]] >= true_box[[1, 3]]).all()
    assert np.abs(box_found - true_box).max() <= 2
    assert find_borders(video) == box


def test_bars_of_real_footage(shared_data, letterbox):
    real = open_dataset("davis", shared_data / "davis", "val", year=2016)[0].read(range(0, 20, 4))
    box = find_borders(open_video(letterbox(40, 41, 0, 0, 75, inside=real)))
    assert abs(box.top - 40) <= 2
    assert abs(box.bottom - (40 + real.shape[1])) <= 2
    assert (box.left, box.right) == (0, real.shape[2])
    assert find_borders(open_video(letterbox(0, 0, 0, 0, 75, inside=real, name="whole"))) is None


def test_bar_must_be_black_in_every_frame(letterbox):
    folder = letterbox(24, 24, 0, 0)
    page = np.array(Image.open(folder / "00002.jpg"))
    page[:24] = 90  # a title
    Image.fromarray(page).save(folder / "00002.jpg")
    box = find_borders(open_video(folder))
    assert box.top == 0
    assert abs(box.bottom - (24 + 96)) <= 2


def test_dark_and_black_videos_are_left_alone(letterbox):
    dark = np.zeros((3, 96, 136, 3), np.uint8)
    assert find_borders(open_video(letterbox(8, 8, 0, 0, inside=dark))) is None
    dark[:, 40:60] = 200  # a lamp at night: less than half of the height would remain
    assert find_borders(open_video(letterbox(0, 0, 0, 0, inside=dark, name="lamp"))) is None


def test_narrow_bars_are_left_alone(letterbox):
    assert find_borders(open_video(letterbox(3, 3, 0, 0, 100))) is None


def test_cropped_video_reads_like_its_whole(letterbox):
    whole = open_video(letterbox(13, 22, 9, 17))
    video = CroppedVideo(whole, Box(13, 109, 9, 145))
    assert (video.height, video.width, video.num_frames, video.name) == (96, 136, 5, "clip")
    expected = whole.read(range(5))[:, 13:109, 9:145]
    np.testing.assert_array_equal(np.stack(list(video.frames())), expected)
    np.testing.assert_array_equal(video.read([4, 0, 4]), expected[[4, 0, 4]])
    small = video.read([2], (24, 34))
    np.testing.assert_array_equal(small, np.stack(list(video.frames((24, 34))))[[2]])
    assert np.abs(small.astype(int) - whole.read([2], (24, 34))).max() > 20  # not the whole one, squeezed
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(video)).read([1]), expected[[1]])


@pytest.fixture
def release(tmp_path, letterbox):
    """One video of YouTube-VIS with bars, an object near them, and the truth without bars."""
    letterbox(24, 24, 0, 0, name="train/JPEGImages/barred")
    video = ytvis_video(1, "barred", 5, (144, 136))
    masks = np.zeros((5, 144, 136), bool)
    masks[:, 30:50, 10:40] = True
    annotation = ytvis_annotation(1, video, [compressed(mask) for mask in masks])
    video["file_names"] = [f"barred/{t:05d}.jpg" for t in range(5)]
    frames = {path: path.read_bytes() for path in tmp_path.rglob("*.jpg")}
    write_ytvis(tmp_path, [video], [annotation])
    for path, content in frames.items():
        path.write_bytes(content)
    return tmp_path, masks


def test_data_set_crops_frames_and_masks_alike(release):
    root, masks = release
    whole, cropped = (open_dataset("ytvis", root, "train", crop_borders=choice) for choice in (False, True))
    box = cropped[0].box
    assert abs(box.top - 24) <= 2
    np.testing.assert_array_equal(cropped.masks(0), masks[:, box.top : box.bottom])
    np.testing.assert_array_equal(cropped[0].read([3]), whole[0].read([3])[:, box.top : box.bottom])
    np.testing.assert_array_equal(whole.masks(0), masks)


def test_cache_tells_cropped_from_whole(release):
    root, _ = release
    whole, cropped = (open_dataset("ytvis", root, "train", crop_borders=choice)[0] for choice in (False, True))
    other = CroppedVideo(whole, Box(10, 144, 0, 136))
    digests = [read_content(video).digest for video in (whole, cropped, other, cropped)]
    assert len(set(digests)) == 3
    assert digests[1] == digests[3]
    content = read_content(cropped)
    whole.files[2].write_bytes(whole.files[2].read_bytes() + b"\0")
    with pytest.raises(ValueError, match="changed while it was read"):
        require_unchanged(cropped, content)


@pytest.mark.parametrize("name", ["torch", "pyav"])
def test_loaders_crop(release, name):
    video = open_dataset("ytvis", release[0], "train", crop_borders=True)[0]
    with open_loader(name, [video], (48, 68), torch.device("cpu"), workers=1) as loader:
        pixels = loader.batch(torch.tensor([4, 1]), torch.tensor([False, True])).numpy()
    expected = video.read([4, 1], (48, 68))
    np.testing.assert_array_equal(pixels, np.stack([expected[0], expected[1, :, ::-1]]))


def test_dali_refuses_to_crop(release, monkeypatch):
    monkeypatch.setattr("interpreter.data.loaders.open.dali_is_installed", lambda: True)
    video = open_dataset("ytvis", release[0], "train", crop_borders=True)[0]
    assert dali_obstacle([video.inner], torch.device("cpu")) is None
    assert "does not crop borders" in dali_obstacle([video], torch.device("cpu"))
    with pytest.raises(ValueError, match=r"--loader dali: DALI does not crop borders.*use --loader pyav"):
        open_loader("dali", [video], (48, 68), torch.device("cpu"))
