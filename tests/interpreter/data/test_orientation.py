"""All eight orientations, from the container, the bitstream and EXIF data, against NumPy."""

import io

import av
import numpy as np
import pytest
import torch
from av.bitstream import BitStreamFilterContext
from PIL import Image

from interpreter.data import VideoError, open_video
from interpreter.data.loaders import dali_obstacle, open_loader
from interpreter.data.loaders import open as loaders_module
from interpreter.data.video.orientation import UPRIGHT

from ..videos import encode, moving

ONE = 1 << 16
LOSSLESS = {"codec": "libx264rgb", "pixels": "rgb24", "qp": 0}

# What (x, y) becomes: (a x + c y, b x + d y), and the same written with NumPy for frames [T, H, W, 3].
MATRICES = {
    "upright": ((1, 0, 0, 1), lambda f: f),
    "mirrored": ((-1, 0, 0, 1), lambda f: f[:, :, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda f: f[:, ::-1]),
    "half turn": ((-1, 0, 0, -1), lambda f: np.rot90(f, 2, (1, 2))),
    "clockwise": ((0, 1, -1, 0), lambda f: np.rot90(f, -1, (1, 2))),
    "counterclockwise": ((0, -1, 1, 0), lambda f: np.rot90(f, 1, (1, 2))),
    "transposed": ((0, 1, 1, 0), lambda f: f.swapaxes(1, 2)),
    "transposed and half turn": ((0, -1, -1, 0), lambda f: np.rot90(f.swapaxes(1, 2), 2, (1, 2))),
}
# The number of each in EXIF.
EXIF = ["upright", "mirrored", "half turn", "upside down", "transposed", "clockwise", "transposed and half turn"]
EXIF.append("counterclockwise")


def with_matrix(path, frames, a, b, c, d):
    plain = encode(path.with_name("plain.mkv"), frames, g=4, **LOSSLESS)
    with av.open(str(plain)) as source, av.open(str(path), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        stream.set_display_matrix([int(e * ONE) for e in (a, b, 0, c, d, 0)] + [0, 0, 1 << 30])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                file.mux(packet)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("name", MATRICES)
def test_display_matrix_is_applied_by_every_way_of_reading(tmp_path, name, suffix):
    matrix, turned = MATRICES[name]
    frames = moving(6)
    video = open_video(with_matrix(tmp_path / f"a.{suffix}", frames, *matrix))
    expected = turned(frames)
    assert (video.height, video.width) == expected.shape[1:3]
    np.testing.assert_array_equal(np.stack(list(video.frames())), expected)
    np.testing.assert_array_equal(video.read([5, 1]), expected[[5, 1]])  # the second run starts at a key frame
    for loader in ("pyav", "torch"):
        with open_loader(loader, [video], expected.shape[1:3], torch.device("cpu"), workers=1) as opened:
            loaded = opened.batch(torch.tensor([5, 1]), torch.tensor([False, True]))
        np.testing.assert_array_equal(loaded, np.stack([expected[5], expected[1][:, ::-1]]))


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("name", ["a.avi", "a.mov", "a.mkv"])
def test_exif_orientation_of_motion_jpeg_is_applied(tmp_path, name, number):
    exif, frames = Image.Exif(), []
    exif[0x0112] = number
    with av.open(str(tmp_path / name), "w") as file:
        stream = file.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
        for t, frame in enumerate(moving(3)):
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, "JPEG", exif=exif, quality=95)
            frames.append(np.asarray(Image.open(buffer)))
            packet = av.Packet(buffer.getvalue())
            packet.stream, packet.time_base = stream, stream.codec_context.time_base or 1 / stream.average_rate
            packet.pts = packet.dts = t
            packet.is_keyframe = True
            file.mux(packet)
    expected = MATRICES[EXIF[number - 1]][1](np.stack(frames))
    decoded = np.stack(list(open_video(tmp_path / name).frames()))
    assert decoded.shape == expected.shape
    assert np.abs(decoded - expected.astype(float)).mean() < 4  # two JPEG decoders


def test_exif_orientation_of_an_apng_turns_all_frames(tmp_path):
    pictures, exif = [Image.fromarray(frame) for frame in moving(3)], Image.Exif()
    exif[0x0112] = 6
    pictures[0].save(tmp_path / "a.apng", "PNG", save_all=True, append_images=pictures[1:], exif=exif)
    expected = MATRICES["clockwise"][1](moving(3))
    np.testing.assert_array_equal(np.stack(list(open_video(tmp_path / "a.apng").frames())), expected)


def test_orientation_in_the_bitstream_lasts(tmp_path):
    # FFmpeg attaches it to the frames of key pictures alone.
    plain = encode(tmp_path / "plain.mkv", moving(8), g=4, bf=0)
    frames = np.stack(list(open_video(plain).frames()))
    with av.open(str(plain)) as source, av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        # A quarter turn counterclockwise, as the standard counts.
        insert = BitStreamFilterContext(
            "h264_metadata=display_orientation=insert:rotate=90:flip=horizontal", source.streams.video[0], stream
        )
        for packet in source.demux(video=0):
            for filtered in insert.filter(packet if packet.size else None):
                filtered.stream = stream
                file.mux(filtered)
    with av.open(str(tmp_path / "a.mkv")) as file:
        angles = [frame.rotation for frame in file.decode(video=0)]
    assert set(angles) == {0, -90}
    video = open_video(tmp_path / "a.mkv")
    assert video.orientation.transposed
    turned = video.orientation.turn(frames[6])
    np.testing.assert_array_equal(video.read([6])[0], turned)
    np.testing.assert_array_equal(list(video.frames())[6], turned)


@pytest.mark.parametrize("matrix", [(2, 0, 0, 1), (0.5, 0.001, -0.001, 0.5), (0, 0, 0, 0)])
def test_scale_rounding_and_an_empty_matrix_turn_nothing(tmp_path, matrix):
    video = open_video(with_matrix(tmp_path / "a.mp4", moving(2), *matrix))
    assert video.orientation == UPRIGHT
    np.testing.assert_array_equal(video.read([1]), moving(2)[[1]])


@pytest.mark.parametrize("matrix", [(0.866, 0.5, -0.5, 0.866), (1, 0, 0.3, 1), (1, 0, 0, 0)])
def test_other_matrices_are_refused(tmp_path, matrix):
    path = with_matrix(tmp_path / "a.mp4", moving(2), *matrix)
    with pytest.raises(VideoError, match=r"neither turns by a multiple of 90 degrees.*ffmpeg -i .*a\.mp4") as error:
        open_video(path)
    assert "download" not in str(error.value)


def test_orientation_that_changes_is_refused(tmp_path):
    exif = Image.Exif()
    content = b""
    for t, frame in enumerate(moving(4)):
        exif[0x0112] = 6 if t < 2 else 3
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", exif=exif)
        content += buffer.getvalue()
    (tmp_path / "a.mjpeg").write_bytes(content)
    with pytest.raises(VideoError, match="orientation changes at frame 2") as error:
        open_video(tmp_path / "a.mjpeg").check()
    assert "download" not in str(error.value)


def test_dali_refuses_to_mirror(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders_module, "dali_is_installed", lambda: True)
    video = open_video(with_matrix(tmp_path / "a.mp4", moving(2), *MATRICES["mirrored"][0]))
    assert "ignores the rotation or mirroring" in dali_obstacle([video], torch.device("cuda"))
