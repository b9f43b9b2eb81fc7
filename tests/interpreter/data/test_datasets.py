"""Opening a data set: videos are found, damaged ones are skipped and named, wrong options are explained."""

import numpy as np
import pytest

from interpreter.data import VideoError, open_dataset

from ..videos import cut, encode, moving, save_frames


def test_folder_finds_files_and_frames_at_any_depth(tmp_path):
    (tmp_path / "more" / "deep").mkdir(parents=True)
    encode(tmp_path / "clip10.mp4", moving(3))
    encode(tmp_path / "clip2.avi", moving(4), codec="mpeg4")
    encode(tmp_path / "more" / "deep" / "clip.webm", moving(5), codec="libvpx-vp9")
    save_frames(tmp_path / "more" / "frames", moving(6))
    save_frames(tmp_path / ".trash" / "old", moving(2))
    (tmp_path / "readme.txt").write_text("not a video")
    dataset = open_dataset("folder", tmp_path)
    assert [v.name for v in dataset.videos] == ["clip2", "clip10", "more/deep/clip", "more/frames"]
    assert [v.num_frames for v in dataset.videos] == [4, 3, 5, 6]
    assert len(dataset) == 4
    assert dataset.masks(0) is None
    assert dataset.mask_frames(0).dtype == np.int64
    assert dataset.skipped == []
    assert dataset.report() == ""


def test_folder_in_youtube_vis_layout_takes_frames_only(tmp_path):
    for name in ("0043f083b5", "00ad5016a4"):
        save_frames(tmp_path / "JPEGImages" / name, moving(2))
        save_frames(tmp_path / "Annotations" / "480p" / name, moving(2))
    assert [v.name for v in open_dataset("folder", tmp_path).videos] == ["00ad5016a4", "0043f083b5"]


def test_single_video_is_a_data_set(tmp_path):
    path = encode(tmp_path / "my clip.mp4", moving(3))
    save_frames(tmp_path / "frames", moving(2))
    assert [v.name for v in open_dataset("folder", path).videos] == ["my clip"]
    assert [v.name for v in open_dataset("folder", str(tmp_path / "frames")).videos] == ["frames"]


def test_names_are_unique(tmp_path):
    encode(tmp_path / "clip.mp4", moving(2))
    encode(tmp_path / "clip.avi", moving(2), codec="mpeg4")
    save_frames(tmp_path / "a" / "clip", moving(2))
    assert [v.name for v in open_dataset("folder", tmp_path).videos] == ["a/clip", "clip.avi", "clip.mp4"]


def test_damaged_videos_are_skipped_counted_and_named(tmp_path):
    encode(tmp_path / "good.mp4", moving(5))
    cut(encode(tmp_path / "half.mp4", moving(30)))
    cut(encode(tmp_path / "half.mkv", moving(30), g=5))
    cut(encode(tmp_path / "half.avi", moving(30), codec="mpeg4"))
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello")
    save_frames(tmp_path / "frames", moving(3))
    cut(tmp_path / "frames" / "00001.jpg")
    dataset = open_dataset("folder", tmp_path)
    assert [v.name for v in dataset.videos] == ["good"]
    names = [path.name for path, _ in dataset.skipped]
    assert names == ["empty.mp4", "frames", "half.avi", "half.mkv", "half.mp4", "text.mp4"]
    report = dataset.report()
    assert report.startswith("Skipped 6 of 7 videos: ")
    assert "\n" not in report
    assert all(name in report for name in names)


def test_nothing_left_is_an_error_that_names_all(tmp_path):
    cut(encode(tmp_path / "half.mp4", moving(30)))
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match=r"no video is left.*Skipped 2 of 2 videos.*empty\.mp4.*half\.mp4"):
        open_dataset("folder", tmp_path)


def test_mistakes_are_explained(tmp_path):
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileNotFoundError, match="no folders of numbered frames in it or below it; it holds notes"):
        open_dataset("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_dataset("folder", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="choose from synthetic, folder, davis, ytvis, ytvos, movi, segtrack, fbms"):
        open_dataset("imagenet", tmp_path)
    with pytest.raises(ValueError, match="no splits"):
        open_dataset("folder", tmp_path, "train")


def test_real_clips_open(real_clips):
    dataset = open_dataset("folder", next(iter(real_clips.values())).parent)
    assert {v.name: v.num_frames for v in dataset.videos} == {
        "bigbuckbunny": 132,
        "bikes": 250,
        "carphone_distorted": 120,
        "carphone_pristine": 120,
    }
