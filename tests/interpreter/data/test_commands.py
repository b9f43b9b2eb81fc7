"""``python -m interpreter.data``: verify and convert."""

import json

import numpy as np
import pytest
from PIL import Image

from interpreter.data import open_dataset
from interpreter.data.__main__ import main
from interpreter.data.datasets.releases import RELEASES

from ..videos import cut, encode, moving, write_frames
from .releases import compressed, write_fbms, write_ytvis, ytvis_annotation, ytvis_video

SIZE = (24, 40)


@pytest.fixture
def ytvis(tmp_path):
    """Three annotated videos of two frames."""
    videos = [ytvis_video(n, f"video{n}", 2, SIZE) for n in range(3)]
    masks = np.zeros((3, *SIZE), bool)
    for n in range(3):
        masks[n, 4 + n : 12, 5:20] = True
    tracks = [[compressed(masks[n]), None] for n in range(3)]
    write_ytvis(tmp_path / "YT", videos, [ytvis_annotation(n, videos[n], tracks[n]) for n in range(3)])
    return tmp_path / "YT", masks


@pytest.mark.parametrize("kind", sorted(RELEASES))
@pytest.mark.parametrize("exists", [False, True])
def test_verify_of_nothing_says_where_to_get_it(tmp_path, capsys, kind, exists):
    root = tmp_path / "data"
    if exists:
        root.mkdir()
    assert main(["verify", kind, "--root", str(root)]) == 1
    output = capsys.readouterr().out
    assert "missing: " in output
    assert str(root) in output
    for location in RELEASES[kind].locations:
        assert location in output
    assert RELEASES[kind].tree in output


def test_verify_counts_what_is_there(ytvis, capsys):
    root, _ = ytvis
    assert main(["verify", "ytvis", "--root", str(root)]) == 0
    output = capsys.readouterr().out
    assert "train: 3 videos, 6 frames, 6 of them with masks, 0 problems" in output
    assert "missing: holdout: " in output
    assert "missing: valid: " in output
    assert main(["verify", "ytvis", "--root", str(root), "--split", "train"]) == 0
    assert "missing" not in capsys.readouterr().out
    assert main(["verify", "ytvis", "--root", str(root), "--split", "valid"]) == 1


def test_verify_names_every_corrupt_and_missing_file(ytvis, capsys):
    root, _ = ytvis
    frames = root / "train/JPEGImages"
    cut(frames / "video0/00000.jpg", 0.8)
    (frames / "video0/00005.jpg").unlink()
    Image.new("RGB", (4, 4)).save(frames / "video1/00005.jpg")
    content = json.loads((root / "train.json").read_text())
    content["annotations"][2]["segmentations"][0]["counts"] += "0"
    (root / "train.json").write_text(json.dumps(content))
    assert main(["verify", "ytvis", "--root", str(root), "--split", "train"]) == 1
    output = capsys.readouterr().out
    assert "train: 3 videos, 2 frames, 1 of them with masks, 4 problems" in output
    assert f"{frames}/video0/00000.jpg: damaged" in output
    assert f"{frames}/video0/00005.jpg: missing" in output
    assert f"{frames}/video1/00005.jpg: 4x4" in output
    assert f"{root}/train.json: video 2: frame 0" in output


def test_verify_names_every_damaged_mask(tmp_path, capsys):
    masks = {t: np.zeros((20, 30), int) for t in range(3)}
    truth = write_fbms(tmp_path, "Testset", "bear01", 3, masks, [0, 255])
    for t in (0, 2):
        cut(truth / f"bear01_{t:04d}_gt.ppm")
    assert main(["verify", "fbms", "--root", str(tmp_path), "--split", "test"]) == 1
    output = capsys.readouterr().out
    assert "1 of them with masks, 2 problems" in output
    assert "bear01_0000_gt.ppm: damaged mask" in output
    assert "bear01_0002_gt.ppm: damaged mask" in output


def test_verify_proves_the_hold_out_is_left_out_and_lists_it(tmp_path, capsys):
    root = tmp_path / "YT"
    write_ytvis(root, [ytvis_video(n + 1, f"v{n}", 1, (8, 8)) for n in range(602)], [])
    manifest = tmp_path / "lists" / "holdout.json"
    assert main(["verify", "ytvis", "--root", str(root), "--split", "holdout", "--manifest", str(manifest)]) == 0
    assert "hold-out: 2 videos; training: 600 videos, of which 0 are in the hold-out" in capsys.readouterr().out
    listed = json.loads(manifest.read_text())
    assert listed == {"split": "holdout", "videos": [{"id": 601, "name": "v600"}, {"id": 602, "name": "v601"}]}
    copied = root / "train/JPEGImages/v3/00000.jpg"
    copied.write_bytes((root / "train/JPEGImages/v601/00000.jpg").read_bytes())
    assert main(["verify", "ytvis", "--root", str(root), "--split", "holdout"]) == 1
    assert "v3 and" in capsys.readouterr().out


def test_verify_compares_the_last_300_with_the_rest(tmp_path, capsys):
    root, manifest = tmp_path / "YT", tmp_path / "last.json"
    write_ytvis(root, [ytvis_video(n + 1, f"v{n}", 1, (8, 8)) for n in range(302)], [])
    arguments = ["verify", "ytvis", "--root", str(root), "--split", "last-300", "--manifest", str(manifest)]
    assert main(arguments) == 0
    assert "last-300: 300 videos; training: 2 videos, of which 0 are in the last-300" in capsys.readouterr().out
    listed = json.loads(manifest.read_text())
    assert (listed["split"], len(listed["videos"]), listed["videos"][0]) == ("last-300", 300, {"id": 3, "name": "v2"})
    copied = root / "train/JPEGImages/v0/00000.jpg"
    copied.write_bytes((root / "train/JPEGImages/v301/00000.jpg").read_bytes())
    assert main(arguments) == 1


def test_converted_data_set_reads_the_same(ytvis, tmp_path, capsys):
    root, masks = ytvis
    out = tmp_path / "out"
    assert main(["convert", "ytvis", "--root", str(root), "--out", str(out), "--split", "train"]) == 0
    before, after = open_dataset("ytvis", root, "train"), open_dataset("davis", out, "train")
    assert [video.name for video in after.videos] == [video.name for video in before.videos]
    for index in range(3):
        np.testing.assert_array_equal(after.masks(index), np.stack([masks[index], np.zeros(SIZE)]))
        assert [f.read_bytes() for f in after[index].files] == [f.read_bytes() for f in before[index].files]
    assert json.loads((out / "converted-train.json").read_text()) == {
        "origin": "ytvis",
        "split": "train",
        "num_videos": 3,
    }
    assert f"--data davis --year 2017 --root {out}" in capsys.readouterr().out
    assert main(["verify", "davis", "--root", str(out), "--split", "train"]) == 0


def test_interrupted_conversion_continues_and_keeps_sparse_masks(tmp_path, monkeypatch):
    from interpreter.data import convert

    for name in ("bear01", "bear02"):
        write_fbms(tmp_path / "FBMS", "Testset", name, 4, {1: np.ones((20, 30), int)}, [0, 255])
    command = ["convert", "fbms", "--root", str(tmp_path / "FBMS"), "--out", str(tmp_path / "out"), "--split", "test"]
    write, written = convert.write_video, []

    def killed(out, name, masks, frames):
        written.append(name)
        if written == ["bear01", "bear02"]:
            raise KeyboardInterrupt
        write(out, name, masks, frames)

    monkeypatch.setattr(convert, "write_video", killed)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert main(command) == 0
    assert written == ["bear01", "bear02", "bear02"]
    dataset = open_dataset("davis", tmp_path / "out", "test")
    np.testing.assert_array_equal(dataset.mask_frames(1), [1])
    assert (dataset.masks(1)[1] == 1).all()


def test_conversion_of_films_loses_no_pixel(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    encode(tmp_path / "in" / "deep" / "a.mp4", moving(3))
    (tmp_path / "in" / "broken.mp4").write_text("no film")
    assert main(["convert", "folder", "--root", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    before, after = open_dataset("folder", tmp_path / "in")[0], open_dataset("davis", tmp_path / "out", "all")[0]
    assert after.name == "deep-a"
    np.testing.assert_array_equal(after.read(range(3)), before.read(range(3)))


def test_split_of_another_origin_is_not_mixed_in(ytvis, tmp_path):
    write_frames(tmp_path / "in" / "clip", 1, SIZE)
    out = str(tmp_path / "out")
    main(["convert", "folder", "--root", str(tmp_path / "in"), "--out", out])
    with pytest.raises(ValueError, match=r"converted-all\.json: this split was made with origin=folder \(now ytvis\)"):
        main(["convert", "ytvis", "--root", str(ytvis[0]), "--out", out])


def test_two_names_that_collide_are_an_error(tmp_path):
    write_frames(tmp_path / "in" / "a" / "b", 1, SIZE)
    write_frames(tmp_path / "in" / "a-b", 1, SIZE)
    with pytest.raises(ValueError, match="two videos would both be called 'a-b'"):
        main(["convert", "folder", "--root", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
