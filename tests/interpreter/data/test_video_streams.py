"""Files with several picture streams: which of them is the video."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, features

from interpreter.data import VideoError, open_video
from interpreter.data.loaders import dali_obstacle, open_loader
from interpreter.data.loaders import open as loaders_module

from ..videos import encode, moving


def box(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


def jpeg(size=(40, 40)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def add_cover(path):
    """Put cover art before the tracks of an MP4 file whose index comes last, as programs that write tags do."""
    content = path.read_bytes()
    start = content.rindex(b"moov") - 4
    tags = box(b"ilst", box(b"covr", box(b"data", struct.pack(">II", 13, 0) + jpeg())))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    tagged = box(b"udta", box(b"meta", bytes(4) + handler + tags))
    path.write_bytes(content[:start] + box(b"moov", tagged + content[start + 8 :]))
    return path


def tracks(path, *sources, codec="mpeg4", still=None):
    """Write each source as a stream of one file; ``still`` is the number of one that is JPEG."""
    with av.open(str(path), "w") as file:
        streams = []
        for number, frames in enumerate(sources):
            stream = file.add_stream("mjpeg" if number == still else codec, rate=10)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuvj420p" if number == still else "yuv420p"
            streams.append(stream)
        packets = []
        for stream, frames in zip(streams, sources, strict=True):
            for t, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture.pts, picture.time_base = t, Fraction(1, 10)
                packets += stream.encode(picture)
            packets += stream.encode()
        file.mux(packets)
    return path


def sound(path, codec):
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        file.mux(stream.encode(samples))
        file.mux(stream.encode())
    return path


def assert_is(video, frames):
    """Every way of reading gives this stream."""
    assert (video.num_frames, video.height, video.width) == frames.shape[:3]
    assert video.fps == 10
    decoded = np.stack(list(video.frames()))
    assert np.abs(decoded - frames.astype(float)).mean() < 12
    picked = [len(frames) - 1, 0, len(frames) // 2]
    np.testing.assert_array_equal(video.read(picked), decoded[picked])
    with open_loader("pyav", [video], frames.shape[1:3], torch.device("cpu"), workers=1) as loader:
        loaded = loader.batch(torch.tensor(picked), torch.zeros(3, dtype=bool))
    np.testing.assert_array_equal(loaded, decoded[picked])


def test_cover_art_before_the_video_is_not_the_video(tmp_path):
    path = add_cover(encode(tmp_path / "a.mp4", moving(8), fps=10))
    with av.open(str(path)) as file:
        assert [stream.width for stream in file.streams.video] == [40, 96]
    assert_is(open_video(path), moving(8))


def test_attached_picture_of_matroska_is_not_the_video(tmp_path):
    plain = encode(tmp_path / "plain.mkv", moving(8), fps=10)
    with av.open(str(plain)) as source, av.open(str(tmp_path / "a.mkv"), "w") as file:
        file.add_attachment("cover.jpg", "image/jpeg", jpeg((400, 400)))
        stream = file.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                file.mux(packet)
    assert_is(open_video(tmp_path / "a.mkv"), moving(8))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_single_picture_before_the_video_is_not_the_video(tmp_path, name):
    path = tracks(tmp_path / name, moving(1, 128, 128), moving(8), still=0)
    assert_is(open_video(path), moving(8))


def test_short_stream_before_the_video_is_not_the_video(tmp_path):
    assert_is(open_video(tracks(tmp_path / "a.mp4", moving(3, 128, 128), moving(9))), moving(9))


def test_of_streams_of_one_length_the_default_is_the_video(tmp_path):
    path = tracks(tmp_path / "a.mp4", moving(8), moving(9, 128, 128))
    with av.open(str(path)) as file:
        assert [bool(stream.disposition & av.stream.Disposition.default) for stream in file.streams] == [True, False]
    assert_is(open_video(path), moving(8))


def test_without_a_default_the_largest_stream_is_the_video(tmp_path):
    assert_is(open_video(tracks(tmp_path / "a.mkv", moving(9), moving(8, 128, 128))), moving(8, 128, 128))


@pytest.mark.parametrize("order", [1, -1])
def test_a_stream_of_an_unknown_codec_is_not_the_video(tmp_path, order):
    known, unknown = moving(8), moving(8, 128, 192)
    path = tracks(tmp_path / "a.mov", *[known, unknown][::order], codec="libx264")
    before, first, second = path.read_bytes().split(b"avc1")
    names = [b"avc1", b"xxxx"][::order]
    path.write_bytes(before + names[0] + first + names[1] + second)
    assert_is(open_video(path), known)


def test_a_file_whose_only_codec_is_unknown_is_no_video(tmp_path):
    path = tracks(tmp_path / "a.mov", moving(3), codec="libx264")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"xxxx"))
    with pytest.raises(VideoError, match=r"a\.mov: holds no video stream that FFmpeg decodes"):
        open_video(path)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not write AVIF")
@pytest.mark.parametrize("count", [1, 10])
def test_all_frames_of_an_animated_avif_are_read(tmp_path, count):
    pictures = [Image.fromarray(frame) for frame in moving(count)]
    path = tmp_path / "a.avif"
    pictures[0].save(path, save_all=count > 1, append_images=pictures[1:], duration=100, quality=90)
    video = open_video(path)
    assert video.num_frames == len(list(video.frames())) == count
    assert np.abs(video.read([count - 1])[0] - moving(count)[-1].astype(float)).mean() < 12


def test_sound_with_cover_art_is_no_video(tmp_path):
    art = b"\0image/jpeg\0\3\0" + jpeg()
    frame = b"APIC" + struct.pack(">IH", len(art), 0) + art
    size = bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0))
    song = sound(tmp_path / "plain.mp3", "mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(b"ID3\3\0\0" + size + frame + song)
    for path in (tmp_path / "a.mp3", add_cover(sound(tmp_path / "a.m4a", "aac"))):
        with av.open(str(path)) as file:
            assert len(file.streams.video) == 1
        with pytest.raises(VideoError, match=r"holds only cover art.*no video; give a video file") as error:
            open_video(path)
        assert str(path) in str(error.value)


def test_animated_webp_is_refused_by_its_name(tmp_path):
    pictures = [Image.fromarray(frame) for frame in moving(3)]
    pictures[0].save(tmp_path / "a.webp", save_all=True, append_images=pictures[1:])
    with pytest.raises(VideoError, match="does not decode animated WebP; convert it"):
        open_video(tmp_path / "a.webp")


@pytest.mark.parametrize("length", range(16, 21))
def test_webp_that_ends_in_its_header_is_refused(tmp_path, length):
    path = tmp_path / "a.webp"
    path.write_bytes(b"RIFF\x10\0\0\0WEBPVP8X\x0a\0\0\0"[:length])
    with pytest.raises(VideoError, match=r"a\.webp: "):
        open_video(path)


def test_dali_is_not_asked_to_choose_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders_module, "dali_is_installed", lambda: True)
    video = open_video(tracks(tmp_path / "a.mkv", moving(1), moving(8), codec="libvpx-vp9"))
    assert "first of several picture streams" in dali_obstacle([video], torch.device("cpu"))
