"""Files that name other files are not read as videos: otherwise an uploader could read files of this machine."""

import io

import pytest

from interpreter.data import VideoError, open_video
from interpreter.data.video.containers import REFERRING, declared, holding_formats
from interpreter.data.video.pipe import LiveVideo

from ..clips import make_clip

MPD = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
profiles="urn:mpeg:dash:profile:isoff-main:2011"
mediaPresentationDuration="PT0.3S"><Period><AdaptationSet>
<Representation id="1" mimeType="video/mp4" bandwidth="1">
<BaseURL>{path}</BaseURL></Representation></AdaptationSet></Period></MPD>"""
PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n",
    "hls, marked": "\ufeff#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {name}\n",
    "dash": MPD,
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.fixture
def secret(tmp_path):
    """A video on this machine that was not given to the program."""
    return make_clip(tmp_path / "secret.ts", codec="mpeg2video", fps=25)


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".m3u8", ".mp4", ".ts", ".mpd", ".txt"])
def test_a_playlist_is_refused_under_every_suffix(tmp_path, secret, kind, suffix):
    path = tmp_path / f"list{suffix}"
    path.write_text(PLAYLISTS[kind].format(path=secret, name=secret.name), encoding="utf-8")
    with pytest.raises(VideoError, match=f"list{suffix}: is a playlist, which names other files"):
        open_video(path)
    with pytest.raises(VideoError, match="is a playlist"):
        declared(path)


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_ffmpeg_opens_no_playlist_that_was_not_recognised(tmp_path, secret, kind, monkeypatch):
    monkeypatch.setattr("interpreter.data.video.containers.require_no_playlist", lambda path: None)
    path = tmp_path / "list.m3u8"
    path.write_text(PLAYLISTS[kind].format(path=secret, name=secret.name), encoding="utf-8")
    with pytest.raises(VideoError, match="cannot be decoded"):
        open_video(path)


@pytest.mark.parametrize("kind", ["hls", "concat"])
def test_a_live_stream_is_no_playlist(secret, kind):
    content = PLAYLISTS[kind].format(path=secret, name=secret)
    with LiveVideo(io.BytesIO(content.encode()), ahead=4) as live:
        assert live.take(1) == []
        assert "standard input: cannot be decoded" in str(live.error)


def test_formats_that_hold_their_video_are_read():
    formats = holding_formats().split(",")
    assert {"mov", "mp4", "matroska", "webm", "avi", "mpegts", "gif", "flv", "asf", "mxf"} <= set(formats)
    assert not REFERRING & set(formats)


def test_a_file_states_its_size_without_being_decoded(tmp_path):
    assert declared(make_clip(tmp_path / "clip.mp4")) == (64, 48, 9)
    width, height, frames = declared(make_clip(tmp_path / "clip.webm", codec="libvpx-vp9"))
    assert (width, height) == (64, 48)
    assert abs(frames - 9) <= 1  # WebM states a duration
    (tmp_path / "text.mp4").write_text("no video")
    assert declared(tmp_path / "text.mp4") == (0, 0, 0)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mpg"])
def test_frames_from_a_number_are_those_of_the_whole_video(tmp_path, name):
    path = make_clip(tmp_path / name, frames=40, fps=25, **({} if name == "clip.mp4" else {"codec": "mpeg2video"}))
    video = open_video(path)
    frames = list(video.frames())
    for start in (0, 13, 39):
        later = list(video.frames_from(start))
        assert len(later) == 40 - start
        assert all((one == other).all() for one, other in zip(later, frames[start:], strict=True))
    assert list(video.frames_from(40)) == []
