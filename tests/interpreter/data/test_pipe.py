"""Live streams give the same frames as a file with the same bytes, and report how they end."""

import doctest
import os
import threading
import time

import numpy as np
import pytest

from interpreter.data import VideoError, open_video
from interpreter.data.video import boxes, frames
from interpreter.data.video.pipe import LiveVideo

from ..streams import LIVE, piped, sent, stream, unseekable
from ..videos import encode, moving


def read(content, ahead=3, at_once=4):
    """All frames of a stream, and its error."""
    with piped(content) as file, LiveVideo(file, ahead) as live:
        frames = []
        while taken := live.take(at_once):
            frames += [frame.pixels for frame in taken]
        return frames, live


def of_file(path, content):
    """The frames of a file of these bytes."""
    path.write_bytes(content)
    return list(open_video(path).frames())


@pytest.mark.parametrize("kind", LIVE)
def test_stream_gives_the_frames_of_a_file(tmp_path, kind):
    content = stream(kind, moving(11))
    frames, live = read(content)
    assert live.error is None
    np.testing.assert_array_equal(frames, of_file(tmp_path / f"clip.{kind}", content))
    video = open_video(tmp_path / f"clip.{kind}")
    assert (live.fps, live.height, live.width) == (video.fps, 64, 96)


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_stream_is_turned_like_a_file(tmp_path, turn):
    path = encode(tmp_path / "a.mp4", moving(6), rotation=turn, container={"movflags": "+faststart"})
    frames, live = read(path.read_bytes())
    np.testing.assert_array_equal(frames, list(open_video(path).frames()))
    assert (live.height, live.width) == frames[0].shape[:2]


def test_file_object_without_descriptor_is_read():
    content = stream("mkv", moving(9))
    with LiveVideo(unseekable(content), ahead=2) as live:
        assert len(live.take(100)) == 9
        assert live.error is None


@pytest.mark.parametrize("share", [0.35, 0.6, 0.97])
@pytest.mark.parametrize("kind", LIVE)
def test_cut_stream_gives_the_whole_frames_and_an_error(tmp_path, kind, share):
    content = stream(kind, moving(20))
    whole = of_file(tmp_path / f"clip.{kind}", content)
    frames, live = read(content[: int(share * len(content))])
    assert 1 < len(frames) < 20
    np.testing.assert_array_equal(frames, whole[: len(frames)])
    assert isinstance(live.error, VideoError)
    assert str(live.error).startswith("standard input: ")


def test_stream_of_a_file_that_was_cut_gives_what_the_decoder_held_back(tmp_path):
    """Its last frames wait for others in the decoder when the cut packet comes."""
    path = encode(tmp_path / "a.mp4", moving(20), container={"movflags": "+faststart"}, bf=2)
    whole, content = list(open_video(path).frames()), path.read_bytes()
    frames, live = read(content[: int(0.7 * len(content))])
    assert isinstance(live.error, VideoError)
    assert live.held == 4
    assert len(frames) > 2
    np.testing.assert_array_equal(frames, whole[: len(frames)])


def test_stream_of_one_frame_is_whole():
    for kind in LIVE:
        frames, live = read(stream(kind, moving(1)))
        assert (len(frames), live.error) == (1, None), kind


def refused(tmp_path):
    """name -> (bytes, text of the error)."""
    return {
        "nothing": (b"", "nothing came"),
        "text": (b"this is no video\n" * 40, "it is no video"),
        "index at the end": (encode(tmp_path / "a.mp4", moving(5)).read_bytes(), "-c copy -f matroska"),
        "header alone": (stream("mkv", moving(5))[:300], "standard input: "),
        "sound": (b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00" + bytes(400), "standard input: "),
    }


@pytest.mark.parametrize("name", ["nothing", "text", "index at the end", "header alone", "sound"])
def test_what_cannot_be_streamed_is_refused(tmp_path, name):
    content, words = refused(tmp_path)[name]
    frames, live = read(content)
    assert not frames
    assert isinstance(live.error, VideoError)
    assert words in str(live.error)
    assert "\n" not in str(live.error)


def test_change_of_size_ends_the_stream():
    content = stream("bare", moving(6)) + stream("bare", moving(6, 48, 64))
    frames, live = read(content)
    assert len(frames) == 6
    assert "the size changes from 96x64 to 64x48 (width x height) at frame 6" in str(live.error)


@pytest.mark.parametrize("kind", LIVE)
def test_frames_come_before_the_stream_goes_on(kind):
    """After the first n + held pieces, at least n + 1 frames have arrived, although the writer sends nothing more."""
    pieces = sent(kind, moving(40))
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as file, LiveVideo(file, ahead=50) as live:
        os.write(writing, b"".join(pieces[:30]))
        given_up = time.monotonic() + 20
        frames = live.take(1, lambda: time.monotonic() > given_up)
        frames += live.take(29 - live.held, lambda: time.monotonic() > given_up)
        assert time.monotonic() < given_up
        assert len(frames) == 30 - live.held
    os.close(writing)


def test_stop_ends_a_stream_that_says_no_more():
    content, asked = stream("mkv", moving(40)), threading.Event()
    reading, writing = os.pipe()
    os.write(writing, content[: len(content) // 2])
    with os.fdopen(reading, "rb") as file, LiveVideo(file, ahead=50) as live:
        first = live.take(5)
        asked.set()
        rest = live.take(100, asked.is_set)
        assert len(first) == 5
        assert 0 < len(rest) < 30
        assert live.error is None  # the error did not come from the end of the stream
    os.close(writing)


def test_reader_ends_while_the_writer_waits():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as file:
        with LiveVideo(file, ahead=2) as live:
            assert live._thread.is_alive()
        assert not live._thread.is_alive()
    os.close(writing)


def test_examples_run():
    for module in (boxes, frames):
        result = doctest.testmod(module, extraglobs={"np": np})
        assert result.attempted
        assert not result.failed
