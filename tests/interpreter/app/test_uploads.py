"""Which files can be uploaded, with which messages others are refused, and where uploads are stored."""

import doctest
import errno
import os
import re
import socket

import numpy as np
import pytest
from PIL import Image

from interpreter import segment
from interpreter.app import clip as clip_module
from interpreter.app.clip import Clip
from interpreter.app.work import Cancelled
from interpreter.commands import run_command
from interpreter.data.video.file import VideoFile

from ..clips import make_clip
from .client import wait_for


def refused(server, tab, answer, status=422):
    """Send a file that must be refused; returns the error message. Nothing of the file may be stored."""
    assert answer.status == status
    assert server.files() == []
    assert list(server.folder.rglob("clip-*")) == []
    assert tab.state()["clip"] is None
    return answer.error


def command_says(path, tiny_run, monkeypatch, capsys):
    """The error line of the command segment, called in the folder of the file."""
    monkeypatch.chdir(path.parent)
    with pytest.raises(SystemExit) as left:
        run_command(lambda: segment.main([path.name, "--run", str(tiny_run), "--out", "out"]))
    assert left.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


@pytest.fixture
def narrow(serve):
    """A server that takes 1 MB and 10 frames."""
    return serve(megabytes=1, frames=10)


def test_declared_length_above_the_limit_is_refused(narrow):
    tab = narrow.client.open_tab()
    lines = [f"PUT /api/s/{tab.token}/clip?name=x.mp4 HTTP/1.1", f"Host: {narrow.client.place}", "X-Interpreter: 1"]
    answer = narrow.client.raw([*lines, "Content-Length: 1000001"])  # before anything of it is sent
    assert "x.mp4: larger than the 1 MB" in refused(narrow, tab, answer, 413)
    assert "--max-mb" in answer.error
    answer = narrow.client.raw([*lines, "Content-Length: 1000000"], bytes(10**6))
    assert "x.mp4" in refused(narrow, tab, answer)  # not a video, but small enough


def test_undeclared_length_above_the_limit_is_refused(narrow):
    tab = narrow.client.open_tab()
    lines = [f"PUT /api/s/{tab.token}/clip?name=x.mp4 HTTP/1.1", f"Host: {narrow.client.place}", "X-Interpreter: 1"]
    chunks = b"80000\r\n" + bytes(0x80000) + b"\r\n80000\r\n" + bytes(10**6 + 1 - 0x80000)  # ends within the second
    answer = narrow.client.raw([*lines, "Transfer-Encoding: chunked"], chunks)
    assert "x.mp4: larger than the 1 MB" in refused(narrow, tab, answer, 413)


def test_upload_that_breaks_off_leaves_nothing(narrow):
    tab = narrow.client.open_tab()
    head = f"PUT /api/s/{tab.token}/clip?name=x.mp4 HTTP/1.1\r\nHost: {narrow.client.place}\r\nX-Interpreter: 1\r\n"
    name, port = narrow.client.place.split(":")
    with socket.create_connection((name, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: 900000\r\n\r\n".encode() + bytes(400_000))
        wait_for(narrow.files)
    wait_for(lambda: not list(narrow.folder.rglob("clip-*")))
    assert tab.state()["clip"] is None


@pytest.mark.parametrize("frames", [11, 30])
def test_clip_with_too_many_frames_is_refused(narrow, tmp_path, frames):
    tab = narrow.client.open_tab()
    answer = tab.upload(make_clip(tmp_path / "long.mp4", frames=frames))
    line = refused(narrow, tab, answer)
    assert line.startswith(f"long.mp4: {frames} frames or more, but this server accepts 10")
    assert "--max-frames" in line


def test_clip_with_as_many_frames_as_allowed_is_taken(narrow, tmp_path):
    tab = narrow.client.open_tab()
    assert tab.upload(make_clip(tmp_path / "long.mp4", frames=10)).json["clip"]["frames"] == 10


def test_frames_too_large_to_decode_are_refused(server, tab, tmp_path):
    Image.fromarray(np.zeros((9000, 8000), np.uint8)).save(tmp_path / "wide.gif")
    assert "frames of 8000x9000 are too large" in refused(server, tab, tab.upload(tmp_path / "wide.gif"))


@pytest.mark.parametrize("name", ["walk.txt", "walk", "walk.mp4.py", "", "...", ".mp4", "walk.m3u8", "x.mp4/"])
def test_suffix_of_no_video_is_refused(server, tab, clip, name):
    assert "does not look like a video file" in refused(server, tab, tab.upload(clip.read_bytes(), name))


@pytest.mark.parametrize("kind", ["empty", "cut", "cut in the middle", "text"])
def test_damaged_file_is_refused_in_the_words_of_segment(
    server, tab, clip, tiny_run, tmp_path, kind, monkeypatch, capsys
):
    whole = clip.read_bytes()
    content = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],  # its table of contents was at the end
        "cut in the middle": _ahead(tmp_path)[:-3000],
        "text": b"this is a letter and no video\n" * 100,
    }[kind]
    path = tmp_path / "folder" / "clip.mp4"
    path.parent.mkdir()
    path.write_bytes(content)
    line = refused(server, tab, tab.upload(path))
    assert line == command_says(path, tiny_run, monkeypatch, capsys)
    assert line.startswith("clip.mp4: ")


def _ahead(folder):
    """A video whose table of contents comes first, so a missing part is noticed only at the end."""
    import av

    source, result = make_clip(folder / "whole.mp4", frames=30), folder / "ahead.mp4"
    with av.open(str(source)) as old, av.open(str(result), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return result.read_bytes()


def test_refused_file_leaves_the_clip_before_it(server, tab, clip):
    before = tab.upload(clip).json["clip"]
    pane = tab.segment("run-0")
    assert tab.upload(b"no video", "other.mp4").status == 422
    state = tab.state()
    assert (state["clip"], state["panes"]["main"]) == (before, pane)
    assert tab.get("frames/0").status == 200
    assert len(server.files()) == 1


NAMES = {
    "../../x.mp4": "x.mp4",
    "/etc/passwd.mp4": "passwd.mp4",
    "..\\..\\x.mp4": "x.mp4",
    "C:\\clips\\x.mp4": "x.mp4",
    "a\0b.mp4": "a_b.mp4",
    "a\nb.mp4": "a_b.mp4",
    "a%d*?<b>|.mp4": "a_d___b__.mp4",
    "...x.MP4": "x.mp4",
    "-rf.mp4": "-rf.mp4",
    "my walk (1).mp4": "my walk (1).mp4",
    "Größe.mp4": "Größe.mp4",
    "x" * 5000 + ".mp4": "x" * 100 + ".mp4",
    "字" * 500 + ".mp4": "字" * 33 + ".mp4",  # 100 bytes, cut at a whole character
}


def test_file_name_stays_in_the_folder_of_the_tab(server, tab, clip):
    for name, kept in NAMES.items():
        answer = tab.upload(clip.read_bytes(), name)
        assert answer.status == 200, answer
        assert answer.json["clip"]["name"] == kept
        (file,) = server.files()
        assert re.fullmatch(rf"[0-9a-f]{{16}}/clip-\d+/{re.escape(kept)}", file)
        assert (server.folder / file).read_bytes() == clip.read_bytes()
    tab.segment("run-0")
    assert [tab.download(format)[0] for format in ("png", "rle")] == [
        f"{'字' * 33}-{n}" for n in ("masks.zip", "segments.json")
    ]


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
    "m3u8 of ranges": '#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-MAP:URI="{0}"\n#EXTINF:9,\n{0}\n#EXT-X-ENDLIST\n',
    "concat": "ffconcat version 1.0\nfile '{}'\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>file://{}</BaseURL></Representation></AdaptationSet></Period></MPD>\n',
    "dash without xml": '<MPD type="static"><Period><BaseURL>{}</BaseURL></Period></MPD>\n',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns={}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "vobsub": "# VobSub index file, v7\nid: {}\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlist_shows_no_other_file(server, tab, clip, kind):
    for name, before in (("x.mp4", ""), ("x.mkv", "\ufeff"), ("x.ts", " \r\n\t"), ("x.gif", "\ufeff\n")):
        content = (before + PLAYLISTS[kind].format(clip)).encode()
        assert "is a playlist" in refused(server, tab, tab.upload(content, name))
        assert tab.get("frames/0").status == 422
    tab.post("segment", source="cluster", settings={})
    assert tab.state()["job"] is None


def test_frames_are_counted_only_up_to_the_limit(narrow, tmp_path, monkeypatch):
    """A raw stream has no stated length; its frames are counted by decoding them."""
    decoded = []
    stream = VideoFile._stream

    def count(video, size):
        for frame in stream(video, size):
            decoded.append(1)
            yield frame

    monkeypatch.setattr(VideoFile, "_stream", count)
    path = make_clip(tmp_path / "raw.h264", frames=60)
    assert "11 frames or more, but this server accepts 10" in narrow.client.open_tab().upload(path).error
    assert len(decoded) == 11


def test_counting_stops_when_the_page_is_closed(narrow, tmp_path):
    path = make_clip(tmp_path / "raw.h264", frames=9)

    def check():
        raise Cancelled

    with pytest.raises(Cancelled):
        Clip(1, path, 10, check)
    assert Clip(1, path, 10).video.num_frames == 9


def test_a_clip_is_read_again_after_an_error(clip, monkeypatch):
    shown = Clip(1, clip, 10)
    first = shown.frame(0)
    shown._cache.clear()
    shown._next, shown._decoding = 1, broken_frames()
    with pytest.raises(OSError, match="too many open files"):
        shown.frame(2)
    np.testing.assert_array_equal(shown.frame(2), list(shown.video.frames())[2])
    np.testing.assert_array_equal(shown.frame(0), first)


def broken_frames():
    raise OSError("too many open files")
    yield


def test_numbers_are_not_used_again_by_another_tab(server, clip):
    """Browsers cache pictures under the number of the clip."""
    numbers = [server.client.open_tab().upload(clip).json["clip"]["id"] for _ in range(3)]
    assert len(set(numbers)) == 3


def test_examples_of_safe_names():
    assert doctest.testmod(clip_module).attempted == 1
    assert doctest.testmod(clip_module).failed == 0


def test_full_disk_is_one_line_and_keeps_nothing(server, tab, clip, monkeypatch):
    def full(*more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("interpreter.app.server.Clip", full)
    line = refused(server, tab, tab.upload(clip))
    assert line.startswith("the disk of the server is full; remove other videos")
