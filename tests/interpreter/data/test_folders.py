"""Folders of videos: which files are videos or frames, links, and the message about files that are not read."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from interpreter.data import VideoError, open_dataset, open_video
from interpreter.data.__main__ import main
from interpreter.data.images import natural_key
from interpreter.data.tree import split_frames
from interpreter.store.ray import videos_among

from ..videos import encode, moving, write_frames

SIZE = (20, 30)


def picture(path, size=SIZE, value=90, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (value, 40, 200)).save(path, **options)
    return path


def videos_of(root):
    """Name and number of frames of each video, and the message about files that are left out."""
    dataset = open_dataset("folder", root)
    assert dataset.skipped == []
    return {video.name: video.num_frames for video in dataset.videos}, dataset.left_out


@pytest.fixture
def film():
    def write(path, frames=3):
        path.parent.mkdir(parents=True, exist_ok=True)
        return encode(path, moving(frames), codec="mpeg4", container={"movflags": "faststart"})

    return write


@pytest.mark.parametrize("below", ["", "channel"])
def test_videos_beside_their_thumbnails_and_notes_are_the_videos(tmp_path, film, below):
    home = tmp_path / "root" / below
    for i in range(3):
        film(home / f"clip {i} [dQw4w9WgXcQ].mp4", 2 + i)
        picture(home / f"clip {i} [dQw4w9WgXcQ].{('jpg', 'webp', 'png')[i]}")
        (home / f"clip {i} [dQw4w9WgXcQ].info.json").write_text("{}")
    for name in ("clip 3.mp4.part", "clip 0.en.vtt", "Thumbs.db", "desktop.ini", ".DS_Store", "._clip 0.mp4", "Icon\r"):
        (home / name).write_bytes(b"\0\5\x16\7")
    picture(home / "@eaDir" / "clip0.mp4" / "thumb_1.jpg")
    picture(home / "__MACOSX" / "00000.jpg")
    videos, left_out = videos_of(tmp_path / "root")
    assert list(videos.values()) == [2, 3, 4]
    for part in ("3 .json (", "1 .jpg beside video files", "1 .webp beside", "1 .part (clip 3.mp4.part)", "1 .vtt ("):
        assert part in left_out
    for system in ("Thumbs", "desktop", "DS_Store", "._", "Icon", "eaDir", "MACOSX"):
        assert system not in left_out
    assert "\n" not in left_out


def test_a_folder_with_a_video_file_is_no_folder_of_frames(tmp_path, film):
    film(tmp_path / "v" / "clip.MP4")
    write_frames(tmp_path / "v", 4, SIZE)
    assert videos_of(tmp_path) == ({"v/clip": 3}, "left out: 4 .jpg beside video files (00000.jpg, 00001.jpg, …)")
    with pytest.raises(VideoError, match=r"v: holds video files \(clip\.MP4\), so it is no folder of frames"):
        open_video(tmp_path / "v")


def test_covers_and_notes_among_frames_are_left_out_and_named(tmp_path, capsys):
    write_frames(tmp_path / "v", 4, SIZE)
    picture(tmp_path / "v" / "cover.jpg", (7, 7))
    (tmp_path / "v" / "notes").touch()
    picture(tmp_path / "folder.jpg")
    picture(tmp_path / "v" / "depth" / "0.png")
    videos, left_out = videos_of(tmp_path)
    assert videos == {"v": 4}
    for part in (
        "1 .jpg not numbered like the frames (cover.jpg)",
        "1 .jpg alone in a folder (folder.jpg)",
        "1 folder below frames (depth)",
        "1 file without suffix (notes)",
    ):
        assert part in left_out
    assert [path.name for path in open_video(tmp_path / "v").others] == ["cover.jpg"]
    assert main(["verify", "folder", "--root", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "folder: 1 videos, 4 frames, 0 of them with masks, 0 problems" in output
    assert f"  {left_out}" in output


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.jpg", "1.jpg", "0.png", "1.png"], r"the same frame twice \(0\.jpg, 0\.png\)"),
        (["1.jpg", "01.jpg", "2.jpg"], r"the same frame twice \(01\.jpg, 1\.jpg\)"),
        (["rgb_0.png", "rgb_1.png", "depth_0.png", "depth_1.png"], r"2 sequences of images \(depth_0\.png …, rgb_0"),
    ],
)
def test_frames_that_are_there_twice_are_an_error(tmp_path, names, message):
    for name in names:
        picture(tmp_path / "v" / name)
    with pytest.raises(VideoError, match=message):
        open_video(tmp_path / "v")
    with pytest.raises(VideoError, match=message):
        open_dataset("folder", tmp_path)


def test_photos_are_no_video(tmp_path):
    for name in ("cat.jpg", "dog.jpg"):
        picture(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"left out: 2 \.jpg not numbered alike \(cat\.jpg, dog\.jpg\)"):
        open_dataset("folder", tmp_path)
    with pytest.raises(VideoError, match="not numbered alike"):
        open_video(tmp_path)


def test_frames_are_ordered_by_number_despite_zeros_and_suffixes(tmp_path):
    names = ["8.JPG", "9.jpg", "010.png", "0011.bmp", "100.webp"]
    for name in names:
        picture(tmp_path / name)
    assert [path.name for path in open_video(tmp_path).files] == names
    assert sorted(["01", "1", "2", "001"], key=natural_key) == ["001", "01", "1", "2"]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["IMG_8.JPG", "IMG_9.JPG", "img_6.jpg", "img_7.jpg"], ["img_6.jpg", "img_7.jpg", "IMG_8.JPG", "IMG_9.JPG"]),
        (["A_2_b.png", "a_10_B.png", "a_1_b.png"], ["a_1_b.png", "A_2_b.png", "a_10_B.png"]),
    ],
)
def test_case_makes_no_difference_to_the_order_of_frames(names, order):
    assert [path.name for path in split_frames([Path(name) for name in names]).frames] == order


def test_the_same_frame_twice_is_found_whatever_its_case():
    names = ["IMG_1.JPG", "IMG_2.jpg", "img_1.png", "img_2.png"]
    assert "same frame twice (IMG_1.JPG, img_1.png)" in split_frames([Path(name) for name in names]).problem


def test_accents_are_the_same_however_they_are_stored(tmp_path):
    stored, written = (unicodedata.normalize(form, "é") for form in ("NFD", "NFC"))
    names = [f"{(stored, written)[i % 2]}{i}.jpg" for i in range(11)]
    for name in names:
        picture(tmp_path / "JPEGImages" / stored / name)
        mask = picture(tmp_path / "Annotations" / written / f"{written}{name[-5:-4]}.png")
        Image.fromarray(np.ones(SIZE, np.uint8)).save(mask)
    dataset = open_dataset("folder", tmp_path)
    assert [path.name for path in dataset[0].files] == names
    assert dataset.masks(0)[:10].all()


def test_each_folder_is_read_once_whatever_links_lead_to_it(tmp_path, film):
    root, outside = tmp_path / "root", tmp_path / "outside"
    film(root / "z" / "clip.mp4")
    film(outside / "deep" / "far.mp4")
    film(tmp_path / "beside" / "other.mp4")  # which only a link to a folder above the root leads to
    write_frames(root / "frames", 2, SIZE)
    for target, link in [
        (".", root / "self"),
        (".", root / "z" / "again"),
        ("..", root / "z" / "up"),
        ("../..", root / "z" / "higher"),
        ("z", root / "a"),
        ("frames", root / "b"),
        ("z/clip.mp4", root / "a.mp4"),
        (outside, root / "more"),
        (outside / "deep", root / "most"),
        (outside / "deep" / "far.mp4", root / "c.mp4"),
        ("gone.mp4", root / "broken.mp4"),
        ("circle2", root / "circle1"),
        ("circle1", root / "circle2"),
    ]:
        os.symlink(target, link)
    os.mkfifo(root / "pipe.mp4")
    videos, left_out = videos_of(root)
    assert videos == {"frames": 2, "more/deep/far": 3, "z/clip": 3}
    assert "3 broken links (broken.mp4, circle1, …)" in left_out
    assert "1 neither file nor folder (pipe.mp4)" in left_out
    for name in ("a.mp4", "c.mp4"):
        assert name in left_out
    os.symlink(root, tmp_path / "link")
    assert videos_of(tmp_path / "link")[0] == videos


def test_a_frame_that_is_a_broken_link_is_missing_not_left_out(tmp_path):
    write_frames(tmp_path / "v", 3, SIZE)
    os.symlink("nowhere.jpg", tmp_path / "v" / "00099.jpg")
    with pytest.raises(VideoError, match=r"00099\.jpg: damaged or no image .*No such file"):
        open_dataset("folder", tmp_path)


def test_camera_files_are_videos_and_raw_pictures_are_named(tmp_path, film, capsys):
    for number, suffix in enumerate((".mkv", ".avi", ".divx", ".M2TS")):
        source = film(tmp_path / f"clip{number}{'.ts' if suffix == '.M2TS' else '.avi'}")
        source.rename(tmp_path / f"clip{number}{suffix}")
    assert [video.name for video in open_dataset("folder", tmp_path).videos] == ["clip0", "clip1", "clip2", "clip3"]
    for number in range(3):
        picture(tmp_path / "scans" / f"{number}.tif")
    assert videos_of(tmp_path)[1] == (
        "left out: 3 .tif (0.tif, 1.tif, …); frames are read from jpg, jpeg, png, bmp and webp, convert the others"
    )
    assert main(["verify", "folder", "--root", str(tmp_path / "scans")]) == 1
    assert "3 .tif (0.tif" in capsys.readouterr().out
    with pytest.raises(VideoError, match=r"no jpg, png, bmp or webp images in this folder, it holds 0\.tif"):
        open_video(tmp_path / "scans")


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_an_animated_image_is_no_frame(tmp_path, suffix):
    write_frames(tmp_path / "v", 3, SIZE, name="{:05d}." + suffix)
    images = [Image.new("RGB", SIZE[::-1], (value, 0, 0)) for value in (0, 99, 200)]
    images[0].save(tmp_path / "v" / f"00001.{suffix}", save_all=True, append_images=images[1:])
    video = open_video(tmp_path / "v")
    for action in (video.check, lambda: video.read([1])):
        with pytest.raises(VideoError, match=rf"00001\.{suffix}: animated, 3 pictures where one is expected"):
            action()


def test_a_phone_image_with_a_second_picture_inside_is_a_frame(tmp_path):
    images = [Image.new("RGB", SIZE[::-1], (value, 0, 0)) for value in (0, 99)]
    for number in range(2):
        images[0].save(tmp_path / f"{number}.jpg", format="MPO", save_all=True, append_images=images[1:])
    open_video(tmp_path).check()


def test_one_image_is_a_video_only_where_its_name_is_a_number(tmp_path):
    picture(tmp_path / "a" / "00000.png")
    picture(tmp_path / "b" / "cover.png")
    picture(tmp_path / "c" / "poster1.png")
    write_frames(tmp_path / "c" / "frames", 2, SIZE)
    videos, left_out = videos_of(tmp_path)
    assert videos == {"a": 1, "c/frames": 2}
    assert left_out == "left out: 2 .png alone in a folder (cover.png, poster1.png)"
    assert open_video(tmp_path / "b").num_frames == 1  # requested by name


def test_frames_in_the_root_have_their_masks_next_to_them(tmp_path):
    for frames, masks in (("plain", "plain/masks"), ("layout/JPEGImages", "layout/Annotations")):
        for path in write_frames(tmp_path / frames, 2, SIZE):
            mask = picture(tmp_path / masks / f"{path.stem}.png")
            Image.fromarray(np.ones(SIZE, np.uint8)).save(mask)
        root = tmp_path / frames.split("/")[0]
        dataset = open_dataset("folder", root)
        assert [video.name for video in dataset.videos] == [root.name]
        assert dataset.masks(0).all()
        assert dataset.left_out == ""


def test_what_lies_beside_the_layout_is_named(tmp_path, film):
    write_frames(tmp_path / "JPEGImages" / "v", 2, SIZE)
    film(tmp_path / "clip.mp4")
    (tmp_path / "ImageSets").mkdir()
    left_out = videos_of(tmp_path)[1]
    assert "1 file beside JPEGImages (clip.mp4)" in left_out
    assert "1 folder beside JPEGImages (ImageSets)" in left_out


def test_names_are_unique_even_with_two_suffixes(tmp_path, film):
    for name in ("a.mp4", "a.mp4.avi", "b.mp4"):
        film(tmp_path / name)
    assert list(videos_of(tmp_path)[0]) == ["a", "a.mp4.avi", "b"]


def test_left_out_stays_one_short_line(tmp_path):
    write_frames(tmp_path / "v", 2, SIZE)
    for number in range(30):
        (tmp_path / f"x{number}.s{number}").touch()
    left_out = videos_of(tmp_path)[1]
    assert left_out.endswith("22 of other kinds")
    assert len(left_out) < 300


def test_frames_of_published_layouts_follow_the_same_rule(tmp_path):
    write_frames(tmp_path / "JPEGImages" / "480p" / "bear", 2, SIZE)
    picture(tmp_path / "JPEGImages" / "480p" / "bear" / "cover.jpg", (4, 4))
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "train.txt").write_text("bear\n")
    dataset = open_dataset("davis", tmp_path, "train")
    assert dataset[0].num_frames == 2
    assert dataset.left_out == "left out: 1 .jpg not numbered like the frames (cover.jpg)"


def test_split_frames_of_nothing_is_nothing():
    assert split_frames([]) == ([], [], "")


def test_unreadable_folder_is_named_and_the_others_are_read(tmp_path, monkeypatch):
    for name in ("a", "private", "z"):
        write_frames(tmp_path / name, 2, SIZE)
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert videos_of(tmp_path) == ({"a": 2, "z": 2}, "left out: 1 folder that cannot be read (private)")
    with pytest.raises(PermissionError):
        open_dataset("folder", tmp_path / "private")


def write_gif(path):
    images = [Image.new("P", SIZE[::-1], value) for value in (0, 99, 200)]
    images[0].save(path, save_all=True, append_images=images[1:])


def test_a_single_gif_beside_frames_is_their_preview(tmp_path):
    write_frames(tmp_path / "v", 4, SIZE)
    write_gif(tmp_path / "v" / "preview.gif")
    assert videos_of(tmp_path) == ({"v": 4}, "left out: 1 .gif beside frames (preview.gif)")
    assert open_video(tmp_path / "v").num_frames == 4


def test_gifs_beside_their_thumbnails_are_videos(tmp_path):
    for number in range(2):
        write_gif(tmp_path / f"clip{number}.gif")
        picture(tmp_path / f"clip{number}.jpg")
    assert list(videos_of(tmp_path)[0]) == ["clip0", "clip1"]


def test_the_distributed_cache_skips_what_the_system_left():
    names = {"a.mp4": "file", "b": "directory", "Thumbs.db": "file", "@eaDir": "directory", ".c.mp4": "file"}
    entries = [{"name": f"bucket/{name}", "type": kind} for name, kind in names.items()]
    assert [item["name"] for item in videos_among(entries)] == ["a.mp4", "b"]
