"""MOVi converted from its TensorFlow release: bytes kept, interruptions resumed, damage named."""

import json
import re
import shutil
import sys

import numpy as np
import pytest

from interpreter.data import open_dataset
from interpreter.data.__main__ import main
from interpreter.data.datasets.movi import convert_movi
from interpreter.data.images import read_rgb

from ..videos import cut
from .releases import damage, movi_video, write_movi

needs_extra = pytest.mark.usefixtures("_tfds")


@pytest.fixture(scope="module")
def _tfds(request):
    if any(item.path != request.path for item in request.session.items):
        pytest.skip("TensorFlow and Triton cannot share a process; run this file alone")
    pytest.importorskip("tensorflow_datasets", reason="the extra movi is not installed: tensorflow-datasets")
    pytest.importorskip("tensorflow", reason="the extra movi is not installed: tensorflow-cpu")


@pytest.fixture(scope="module")
def videos():
    return [movi_video(seed) for seed in range(5)]


@pytest.fixture
def release(tmp_path, videos):
    """Five videos in shards of two, two and one."""
    records = [record for _, _, record in videos]
    return write_movi(tmp_path / "tfds", [records[:2], records[2:4], records[4:]])


@needs_extra
def test_conversion_keeps_every_pixel_and_id(release, videos, tmp_path):
    out = tmp_path / "MOVi-E"
    assert main(["convert", "movi", "--root", str(tmp_path / "tfds"), "--out", str(out)]) == 0
    dataset = open_dataset("movi", out, "train")
    assert [video.name for video in dataset.videos] == [f"train-{n:05d}" for n in range(5)]
    for index, (frames, masks, _) in enumerate(videos):
        np.testing.assert_array_equal(dataset[index].read(range(3)), frames)
        np.testing.assert_array_equal(dataset.masks(index), masks)
    manifest = json.loads((out / "movi-train.json").read_text())
    assert manifest == {"release": "movi_e/256x256/1.0.0", "split": "train", "num_videos": 5}


@needs_extra
def test_killed_conversion_continues(release, videos, tmp_path, monkeypatch):
    from interpreter.data.datasets import movi

    out, write = tmp_path / "out", movi.write_video

    def killed(root, name, masks, frames):
        if name == "train-00003":
            (root / "JPEGImages/480p" / f".{name}.partial").mkdir()
            raise KeyboardInterrupt
        write(root, name, masks, frames)

    monkeypatch.setattr(movi, "write_video", killed)
    with pytest.raises(KeyboardInterrupt):
        convert_movi(release, out)
    assert not (out / "ImageSets/2017/train.txt").exists()  # half a split cannot be read
    written = []
    monkeypatch.setattr(movi, "write_video", lambda root, name, *rest: (written.append(name), write(root, name, *rest)))
    convert_movi(release, out)
    assert written == ["train-00003", "train-00004"]
    np.testing.assert_array_equal(open_dataset("movi", out, "train").masks(3), videos[3][1])
    assert not list(out.rglob("*.partial"))


@needs_extra
def test_corrupt_shard_is_named_and_the_rest_is_kept(release, tmp_path):
    shard = release / "movi_e-train.tfrecord-00001-of-00003"
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 4] ^= 16  # in the first record of the shard, as its checksum shows
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"tfrecord-00001-of-00003: damaged .*rerun .* continue from video 2 of train"):
        convert_movi(release, tmp_path / "out")
    assert (tmp_path / "out/JPEGImages/480p/train-00001").is_dir()
    shard.write_bytes(whole)
    assert convert_movi(release, tmp_path / "out") == ["train"]


@needs_extra
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.999])
def test_cut_shard_is_named_and_shifts_no_video(release, videos, tmp_path, share):
    shard = release / "movi_e-train.tfrecord-00001-of-00003"
    whole = shard.read_bytes()
    cut(shard, share)
    with pytest.raises(ValueError, match="tfrecord-00001-of-00003: damaged"):
        convert_movi(release, tmp_path / "out")
    shard.write_bytes(whole)
    convert_movi(release, tmp_path / "out")
    dataset = open_dataset("movi", tmp_path / "out", "train")
    for index, (_, masks, _) in enumerate(videos):
        np.testing.assert_array_equal(dataset.masks(index), masks)


@needs_extra
def test_missing_shards_are_named_before_anything_is_written(release, tmp_path):
    (release / "movi_e-train.tfrecord-00001-of-00003").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 shards of train are missing: .*00001-of-00003"):
        convert_movi(release, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_extra
def test_another_release_is_not_mixed_in(release, tmp_path):
    convert_movi(release, tmp_path / "out")
    info = release / "dataset_info.json"
    info.write_text(info.read_text().replace("1.0.0", "1.1.0"))
    shutil.move(release, release.with_name("1.1.0"))
    with pytest.raises(ValueError, match=r"was made with release=movi_e/256x256/1\.0\.0"):
        convert_movi(tmp_path / "tfds", tmp_path / "out")


@needs_extra
@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
def test_damaged_description_is_one_clear_error(release, tmp_path, name):
    (release / name).write_text((release / name).read_text()[:-40])
    with pytest.raises(ValueError, match=r"damaged dataset_info\.json or features\.json"):
        convert_movi(release, tmp_path / "out")


def test_missing_extra_names_the_installation(release, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(RuntimeError, match="pip install tensorflow-cpu tensorflow-datasets"):
        convert_movi(release, tmp_path / "out")


def test_movi_with_triton_loaded_is_an_error(release, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", object())
    with pytest.raises(RuntimeError, match="TensorFlow and Triton cannot share a process"):
        convert_movi(release, tmp_path / "out")


def test_no_release_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="gs://kubric-public/tfds/movi_e/256x256"):
        convert_movi(tmp_path, tmp_path / "out")
    write_movi(tmp_path / "a", [[]])
    write_movi(tmp_path / "b", [[]])
    with pytest.raises(ValueError, match="several releases"):
        convert_movi(tmp_path, tmp_path / "out")


@needs_extra
def test_damaged_movi_shards(tmp_path):
    videos = [movi_video(seed) for seed in range(3)]
    release = write_movi(tmp_path / "in", [[videos[0][2], videos[1][2]], [videos[2][2]]])
    shard, rng = release / "movi_e-train.tfrecord-00000-of-00002", np.random.default_rng(0)
    whole, refused = shard.read_bytes(), 0
    for _ in range(6):
        shard.write_bytes(damage(whole, rng))
        message = ""
        try:
            convert_movi(release, tmp_path / "out")
        except ValueError as error:
            message = str(error)
            refused += 1
        assert re.search(r"^$|tfrecord-0000[01]-of-00002: damaged", message)
        for index in range(3):  # the files that were written are right, however many there are
            for number, file in enumerate(sorted((tmp_path / f"out/JPEGImages/480p/train-{index:05d}").glob("*.png"))):
                np.testing.assert_array_equal(read_rgb(file), videos[index][0][number])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused >= 5
