"""Frames of files and folders match an independent decoder, in every way of reading them."""

import os
import pickle
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import map_coordinates

from interpreter.data import FrameFolder, open_video

from ..videos import cut, encode, moving

CODECS = {
    "h264.mp4": {"codec": "libx264", "g": 12, "bf": 3},
    "one_key.mp4": {"codec": "libx264", "g": 250},
    "open_gop.mp4": {"codec": "libx264", "g": 12, "x264-params": "open-gop=1:bframes=3"},
    "h264.mkv": {"codec": "libx264", "g": 12},
    "late.mkv": {"codec": "libx264", "g": 12, "start": 240},
    "late.mp4": {"codec": "libx264", "g": 12, "start": 240},
    "same_times.mkv": {"codec": "libx264", "g": 12, "fps": 3000},  # Matroska rounds to milliseconds
    "mpeg2.mkv": {"codec": "mpeg2video", "g": 12, "bf": 2},
    "h264.ts": {"codec": "libx264", "g": 12},
    "mpeg4.avi": {"codec": "mpeg4", "g": 12, "bf": 2},
    "vp9.webm": {"codec": "libvpx-vp9", "g": 10, "deadline": "realtime", "cpu-used": 8},
    "anim.gif": {"codec": "gif", "pixels": "rgb8"},
    "gray.mp4": {"codec": "libx264", "pixels": "gray"},
    "deep.mp4": {"codec": "libx264", "pixels": "yuv420p10le"},
    "odd.mp4": {"codec": "libx264", "pixels": "yuv444p"},
    "odd.mkv": {"codec": "ffv1", "pixels": "yuv420p"},
}


@pytest.fixture(scope="module", params=CODECS)
def clip(request, tmp_path_factory):
    size = (33, 47) if "odd" in request.param else (64, 96)
    path = tmp_path_factory.mktemp("clip") / request.param
    return encode(path, moving(31, *size), **CODECS[request.param])


def decode_independently(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_frames_match_independent_decoder(clip):
    expected = decode_independently(clip).astype(float)
    video = open_video(clip)
    frames = np.stack(list(video.frames()))
    assert frames.dtype == np.uint8
    assert video.num_frames == len(video) == len(frames) == len(expected) == 31
    assert frames.shape[1:3] == (video.height, video.width)
    # FFmpeg's default conversion repeats chroma instead of interpolating it, which is visible on coloured blocks.
    assert np.abs(frames - expected).mean() < 6
    order = np.abs(frames[:, None] - expected[None]).mean((2, 3, 4)).argmin(1)
    np.testing.assert_array_equal(order, np.arange(31))


def test_read_equals_frames(clip):
    video = open_video(clip)
    frames = np.stack(list(video.frames()))
    for indices in ([0], [30], [17], [5, 5, 30, 0, 16, 17], [29, 12, 24, 11], range(31)):
        np.testing.assert_array_equal(open_video(clip).read(indices), frames[list(indices)])
    assert video.read([]).shape == (0, video.height, video.width, 3)
    np.testing.assert_array_equal(video.read([3, 1], (20, 30)), np.stack(list(video.frames((20, 30))))[[3, 1]])


@pytest.mark.parametrize(("name", "pixels", "codec"), [("a.mkv", "bgr0", "ffv1"), ("a.mp4", "rgb24", "libx264rgb")])
def test_lossless_video_returns_its_source(tmp_path, name, pixels, codec):
    source = moving(13, 33, 47)
    options = {"qp": 0} if codec == "libx264rgb" else {}
    path = encode(tmp_path / name, source, codec=codec, pixels=pixels, **options)
    np.testing.assert_array_equal(np.stack(list(open_video(path).frames())), source)
    np.testing.assert_array_equal(open_video(path).read([12, 4]), source[[12, 4]])


def test_colours_are_those_of_the_standard(real_clips):
    """Against ITU-R BT.601, limited range, with chroma samples on the left of their pixels, in float64."""
    with av.open(str(real_clips["bikes"])) as container:
        planes = next(container.decode(video=0)).to_ndarray(format="yuv420p").astype(float)
    video = open_video(real_clips["bikes"])
    height, width = video.height, video.width
    chroma = planes[height:].reshape(2, height // 2, width // 2) - 128
    where = np.meshgrid((np.arange(height) + 0.5) / 2 - 0.5, np.arange(width) / 2, indexing="ij")
    u, v = (map_coordinates(plane, where, order=3, mode="nearest") for plane in chroma)
    y = 1.164384 * (planes[:height] - 16)
    expected = np.stack([y + 1.596027 * v, y - 0.391762 * u - 0.812968 * v, y + 2.017232 * u], axis=-1).clip(0, 255)
    difference = video.read([0])[0] - expected
    assert np.abs(difference).mean() < 0.4  # rounding alone gives 0.25
    assert abs(difference.mean()) < 0.1


def test_gray_level_survives_yuv(tmp_path):
    levels = np.arange(16, 256, 16, dtype=np.uint8)
    source = np.broadcast_to(levels[:, None, None, None], (15, 32, 32, 3))
    path = encode(tmp_path / "gray.mp4", source, qp=0)
    means = [frame.mean() for frame in open_video(path).frames()]
    np.testing.assert_allclose(means, levels, atol=1)  # limited-range YUV has 220 levels for 256


def test_decoding_is_bit_exact_between_runs(real_clips):
    first, second = (np.stack(list(open_video(real_clips["carphone_pristine"]).frames())) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["carphone_pristine", "carphone_distorted", "bikes"])
def test_real_clip(real_clips, name):
    video = open_video(real_clips[name])
    expected = decode_independently(real_clips[name])
    assert video.name == name
    assert (video.num_frames, video.height, video.width) == expected.shape[:3]
    picked = [video.num_frames - 1, 0, 77]
    np.testing.assert_array_equal(video.read(picked), np.stack(list(video.frames()))[picked])
    assert np.abs(video.read(picked) - expected[picked].astype(float)).mean() < 3


def test_frame_rate_is_exact(real_clips, tmp_path):
    assert open_video(real_clips["carphone_pristine"]).fps == Fraction(30000, 1001)
    Image.fromarray(moving(1)[0]).save(tmp_path / "0.png")
    assert open_video(tmp_path).fps == 24


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_display_matrix_turns_frames(tmp_path, rotation):
    lossless = {"codec": "libx264rgb", "pixels": "rgb24", "qp": 0}
    source = moving(3)
    video = open_video(encode(tmp_path / "turned.mp4", source, rotation=rotation, **lossless))
    expected = np.rot90(source, rotation // 90, axes=(1, 2))  # positive is counterclockwise
    np.testing.assert_array_equal(video.read([0, 1, 2]), expected)
    np.testing.assert_array_equal(np.stack(list(video.frames())), expected)
    assert (video.height, video.width) == expected.shape[1:3]


def test_one_frame_videos(tmp_path):
    source = moving(1)
    for path in (tmp_path / "a.mp4", tmp_path / "a.webm"):
        encode(path, source, codec="libvpx-vp9" if path.suffix == ".webm" else "libx264")
        assert open_video(path).num_frames == len(list(open_video(path).frames())) == 1
    (tmp_path / "folder").mkdir()
    Image.fromarray(source[0]).save(tmp_path / "folder" / "only.png")
    np.testing.assert_array_equal(open_video(tmp_path / "folder").read([0, 0]), source[[0, 0]])


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path):
    # A clip cut without re-encoding keeps the frames since the last key frame and hides them; here 20 of 30.
    path = encode(tmp_path / "cut.mp4", moving(30), g=12, start=-20)
    video = open_video(path)
    assert video.num_frames == len(list(video.frames())) == 10
    np.testing.assert_array_equal(video.read([7]), np.stack(list(video.frames()))[[7]])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "untagged.mkv"])
def test_longer_sound_is_not_taken_for_missing_frames(tmp_path, name):
    path = tmp_path / name
    with av.open(str(path), "w") as file:
        picture, sound = file.add_stream("mpeg4", rate=24), file.add_stream("aac", rate=16000)
        picture.height, picture.width, picture.pix_fmt = 64, 96, "yuv420p"
        for frame in moving(12):
            file.mux(picture.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(picture.encode())
        for t in range(40):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 16000, 1000 * t
            file.mux(sound.encode(samples))
        file.mux(sound.encode())
    if name == "untagged.mkv":  # as browsers record it: no duration per stream
        path.write_bytes(path.read_bytes().replace(b"DURATION", b"NOTATION"))
    assert open_video(path).num_frames == 12


def test_late_start_is_not_taken_for_missing_frames(tmp_path):
    path = encode(tmp_path / "late.mkv", moving(12), start=240)
    path.write_bytes(path.read_bytes().replace(b"DURATION", b"NOTATION"))  # leaves the duration of the whole file
    assert open_video(path).num_frames == 12


def test_folder_is_read_in_natural_order(tmp_path):
    source = moving(12)
    for t, frame in enumerate(source):
        Image.fromarray(frame).save(tmp_path / f"frame{t}.{'png' if t % 2 else 'bmp'}")
    (tmp_path / "notes.txt").write_text("not a frame")
    video = open_video(tmp_path)
    assert isinstance(video, FrameFolder)
    assert video.name == tmp_path.name
    np.testing.assert_array_equal(np.stack(list(video.frames())), source)
    np.testing.assert_array_equal(video.read([11, 2, 10, 2]), source[[11, 2, 10, 2]])


def test_size_is_applied_to_every_frame(tmp_path):
    video = open_video(encode(tmp_path / "a.mp4", moving(3)))
    assert [frame.shape for frame in video.frames((20, 31))] == [(20, 31, 3)] * 3
    for size in ((0, 5), (5,), (5, -1)):
        with pytest.raises(ValueError, match="size must be"):
            video.frames(size)
        with pytest.raises(ValueError, match="size must be"):
            video.read([0], size)


def test_index_out_of_range_names_the_range(tmp_path):
    video = open_video(encode(tmp_path / "a.mp4", moving(3)))
    for index in (3, -1):
        with pytest.raises(IndexError, match=r"frame -?\d of .*a\.mp4: it has frames 0 to 2"):
            video.read([0, index])


def test_name_with_colon_and_percent(tmp_path, monkeypatch):
    encode(tmp_path / "a.mp4", moving(3)).rename(tmp_path / "10:30 100%d.take2.mp4")
    monkeypatch.chdir(tmp_path)
    video = open_video("10:30 100%d.take2.mp4")
    assert (video.name, video.num_frames) == ("10:30 100%d.take2", 3)


def test_relative_folder_has_a_name(tmp_path, monkeypatch):
    Image.fromarray(moving(1)[0]).save(tmp_path / "0.png")
    monkeypatch.chdir(tmp_path)
    assert open_video(".").name == tmp_path.name


def test_video_can_be_pickled(tmp_path):
    video = open_video(encode(tmp_path / "a.mp4", moving(5)))
    copy = pickle.loads(pickle.dumps(video))
    np.testing.assert_array_equal(copy.read([4]), video.read([4]))


def test_memory_does_not_grow_with_the_video(real_clips):
    video = open_video(real_clips["bikes"])
    frame_bytes = video.height * video.width * 3
    tracemalloc.start()
    try:
        count = sum(1 for _ in video.frames())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 250
    assert peak < 5 * frame_bytes  # a frame, the one before it and working space


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to count open files")
def test_files_are_closed(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(31), g=10)
    broken = cut(encode(tmp_path / "b.mkv", moving(31), g=10))
    before = len(os.listdir("/proc/self/fd"))
    video = open_video(path)
    video.check()
    abandoned, finished = video.frames(), video.frames()
    next(abandoned)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    abandoned.close()
    list(finished)
    video.read([25, 3])
    with pytest.raises(ValueError, match="ends after"):
        open_video(broken).check()
    assert len(os.listdir("/proc/self/fd")) == before
