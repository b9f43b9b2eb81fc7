"""The end of a video: long last pictures are accepted, cut files refused, joined and changed streams distinguished."""

from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest

from interpreter.data import VideoError, open_video

from ..videos import cut, encode, moving

LATE = [Fraction(t, 10) for t in (50, 51, 52)]
HELD = [Fraction(t, 10) for t in range(4)]
UNEVEN = [Fraction(t, 10) for t in (0, 1, 20, 21, 22, 90)]
FORMATS = {
    "a.gif": ("gif", "rgb8", {"final_delay": "500"}),
    "a.mp4": ("libx264", "yuv420p", {}),
    "a.mov": ("mjpeg", "yuvj420p", {}),
    "a.mkv": ("libx264", "yuv420p", {}),
    "a.webm": ("libvpx-vp9", "yuv420p", {}),
    "a.avi": ("mpeg4", "yuv420p", {}),
    "a.flv": ("libx264", "yuv420p", {}),
    "a.apng": ("apng", "rgb24", {"final_delay": "5"}),
}


def write(path, frames, times, last, codec, pixels, options):
    """Frames at these times in seconds, the last one shown for ``last`` seconds."""
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream(codec, rate=10, options={"bf": "0"} if codec == "libx264" else {})
        (stream.height, stream.width), stream.pix_fmt = frames.shape[1:3], pixels
        if codec != "mpeg4":
            stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for frame, time in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pixels)
            picture.pts, picture.time_base = int(time * 1000), Fraction(1, 1000)
            packets += stream.encode(picture)
        packets += stream.encode()
        for packet, following in pairwise(packets):
            packet.duration = following.pts - packet.pts
        packets[-1].duration = int(last / packets[-1].time_base)
        file.mux(packets)
    return path


@pytest.mark.parametrize("times", [HELD, LATE, UNEVEN])
@pytest.mark.parametrize("last", [Fraction(1, 10), Fraction(5)])
@pytest.mark.parametrize("name", FORMATS)
def test_video_whose_last_picture_is_held_is_whole(tmp_path, name, times, last):
    video = open_video(write(tmp_path / name, moving(len(times)), times, last, *FORMATS[name]))
    video.check()
    assert video.num_frames == len(list(video.frames())) == len(times)
    assert video.read([len(times) - 1, 0]).shape[0] == 2


def test_wmv_that_starts_late_is_whole(tmp_path):
    path = write(tmp_path / "a.wmv", moving(3), LATE, Fraction(1, 10), "mpeg4", "yuv420p", {})
    assert open_video(path).num_frames == 3


def test_wmv_is_whole_if_it_is_as_long_as_its_header_states(tmp_path):
    path = write(tmp_path / "a.wmv", moving(4), HELD, Fraction(5), "mpeg4", "yuv420p", {})
    assert open_video(path).num_frames == 4  # the last picture is shown longer
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(VideoError, match=f"it ends after 4 frames, {len(content) - 1} of {len(content)} bytes"):
        open_video(path).check()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("name", FORMATS)
def test_same_videos_cut_are_damaged(tmp_path, name, share):
    times = [Fraction(t, 10) for t in range(30)]
    path = cut(write(tmp_path / name, moving(30), times, Fraction(5), *FORMATS[name]), share)
    with pytest.raises(VideoError, match="download or copy it again"):
        open_video(path).check()


def test_gif_with_bytes_after_its_end_is_whole(tmp_path):
    path = encode(tmp_path / "a.gif", moving(5), codec="gif", pixels="rgb8")
    content = path.read_bytes()
    for end in (b"", b"\0\0 anything"):
        path.write_bytes(content + end)
        assert open_video(path).num_frames == 5
    path.write_bytes(content[:-1])  # the end mark alone is missing
    assert open_video(path).num_frames == 5
    path.write_bytes(content[:-3])
    with pytest.raises(VideoError, match="ends inside frame 4"):
        open_video(path).check()


@pytest.mark.parametrize("name", ["a.h264", "a.ts"])
def test_change_of_size_says_which_and_what_to_do(tmp_path, name):
    small = encode(tmp_path / f"small_{name}", moving(10), g=5)
    large = encode(tmp_path / f"large_{name}", moving(10, 96, 128), g=5)
    path = tmp_path / name
    path.write_bytes(small.read_bytes() + large.read_bytes())
    expected = rf"size changes from 96x64 to 128x96 .* at frame 10; .*ffmpeg -i .*{name} -vf scale=96:64"
    for action in (lambda video: video.check(), lambda video: list(video.frames()), lambda video: video.read([0])):
        with pytest.raises(VideoError, match=expected) as error:
            action(open_video(path))
        assert "download" not in str(error.value)
        assert "damaged" not in str(error.value)


def test_change_of_pixel_format_is_read(tmp_path):
    parts = [encode(tmp_path / f"{p}.h264", moving(5), pixels=p, g=5, qp=0) for p in ("yuv420p", "yuv444p")]
    (tmp_path / "a.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    video = open_video(tmp_path / "a.h264")
    expected = np.concatenate([list(open_video(part).frames()) for part in parts])
    np.testing.assert_array_equal(np.stack(list(video.frames())), expected)
    np.testing.assert_array_equal(video.read([7, 2]), expected[[7, 2]])
