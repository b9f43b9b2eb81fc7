"""Damaged, truncated and missing videos give one clear error line, in every way of reading them."""

import numpy as np
import pytest
from PIL import Image

from interpreter.data import VideoError, open_video

from ..videos import cut, encode, moving


def assert_one_clear_line(error, path):
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert any(advice in message for advice in ("download", "restore", "give a", "make all"))


def test_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4: no such video"):
        open_video(tmp_path / "nothing.mp4")


@pytest.mark.parametrize("content", [b"", b"This is a text file, not a video.\n" * 50, bytes(4096)])
def test_file_without_video_is_refused(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError) as error:
        open_video(path)
    assert_one_clear_line(error, path)


def test_text_is_not_read_as_ansi_art(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("FFmpeg would draw this as a terminal screen.\n" * 20)
    with pytest.raises(VideoError) as error:
        open_video(path)
    assert_one_clear_line(error, path)


def test_sound_without_pictures_is_refused(tmp_path):
    import wave

    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", "NONE"))
        file.writeframes(bytes(16000))
    with pytest.raises(VideoError, match="no video stream") as error:
        open_video(path)
    assert_one_clear_line(error, path)


FILES = {
    "index_lost.mp4": {"codec": "libx264"},
    "index_first.mp4": {"codec": "libx264", "container": {"movflags": "faststart"}},
    "a.mkv": {"codec": "libx264", "g": 12},
    "a.avi": {"codec": "mpeg4", "g": 12},
    "a.webm": {"codec": "libvpx-vp9", "g": 10, "deadline": "realtime", "cpu-used": 8},
}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_found_by_every_way_of_reading(tmp_path, name, share):
    path = cut(encode(tmp_path / name, moving(60), **FILES[name]), share)
    for action in ("check", "num_frames", "frames", "read"):
        with pytest.raises(VideoError) as error:  # noqa: PT012 - opening may already find it
            video = open_video(path)
            if action == "check":
                video.check()
            elif action == "num_frames":
                _ = video.num_frames
            elif action == "frames":
                list(video.frames())
            else:
                video.read([0])
        assert_one_clear_line(error, path)


def test_mov_that_ends_inside_its_index_is_refused(tmp_path):
    path = encode(tmp_path / "a.mov", moving(5), container={"movflags": "faststart"})
    content = path.read_bytes()
    for length in range(24, content.index(b"mdat"), 16):
        path.write_bytes(content[:length])
        with pytest.raises(VideoError) as error:
            open_video(path).check()
        assert_one_clear_line(error, path)


def test_cut_shortly_before_the_end_is_found(tmp_path):
    # VP9 decodes half a frame without an error, and hardly a frame is missing: only the packet shows the damage.
    clip = {"codec": "libvpx-vp9", "g": 60, "lag-in-frames": 0, "container": {"movflags": "faststart"}}
    path = cut(encode(tmp_path / "a.mp4", moving(60), **clip), 0.995)
    with pytest.raises(VideoError, match="cut packet after frame 5"):
        open_video(path).check()


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_overwritten_bytes_are_found(tmp_path, name):
    path = encode(tmp_path / name, moving(60), g=12)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = np.random.default_rng(0).bytes(400)
    path.write_bytes(content)
    with pytest.raises(VideoError) as error:
        open_video(path).check()
    assert_one_clear_line(error, path)


def test_frames_before_the_damage_are_delivered(tmp_path):
    path = encode(tmp_path / "a.mkv", moving(60), g=12)
    whole = open_video(path).read([0, 1, 2])
    cut(path)
    stream = open_video(path).frames()
    np.testing.assert_array_equal(np.stack([next(stream) for _ in range(3)]), whole)
    with pytest.raises(VideoError, match="ends after"):
        list(stream)


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(VideoError, match="no jpg, png") as error:
        open_video(tmp_path)
    assert_one_clear_line(error, tmp_path)


def test_frames_of_two_sizes_are_refused(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "0.png")
    Image.new("RGB", (22, 10)).save(tmp_path / "1.png")
    video = open_video(tmp_path)
    for action in (video.check, lambda: list(video.frames()), lambda: video.read([1])):
        with pytest.raises(VideoError, match=r"1\.png: 10x22 .*0\.png is 10x20") as error:
            action()
        assert_one_clear_line(error, tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_truncated_frame_of_a_folder_is_refused(tmp_path, suffix, share):
    for t, frame in enumerate(moving(3)):
        Image.fromarray(frame).save(tmp_path / f"{t}.{suffix}")
    cut(tmp_path / f"1.{suffix}", share)
    video = open_video(tmp_path)
    np.testing.assert_array_equal(video.read([2]).shape, (1, 64, 96, 3))
    for action in (video.check, lambda: list(video.frames()), lambda: video.read([1])):
        with pytest.raises(VideoError, match="damaged") as error:
            action()
        assert_one_clear_line(error, tmp_path / f"1.{suffix}")
