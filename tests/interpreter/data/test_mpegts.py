"""MPEG-TS files joined with cat are read in full; files with missing packets are refused, with the position."""

import re
from itertools import pairwise

import av
import numpy as np
import pytest

from interpreter.data import VideoError, open_video
from interpreter.data.video.containers import find_gaps

from ..videos import encode, moving

CODECS = {"h264": {"codec": "libx264", "bf": 2}, "hevc": {"codec": "libx265"}, "mpeg2": {"codec": "mpeg2video"}}
VIDEO = 0x100  # the number that FFmpeg gives the first stream


@pytest.fixture(scope="module", params=CODECS)
def piece(request, tmp_path_factory):
    if request.param == "hevc" and "libx265" not in av.codecs_available:
        pytest.skip("this PyAV does not encode HEVC")
    path = tmp_path_factory.mktemp("piece") / f"{request.param}.ts"
    return encode(path, moving(20), g=5, **CODECS[request.param])


def packets_of(path, length=188):
    content = path.read_bytes()
    return [content[start : start + length] for start in range(0, len(content), length)]


def number(packet):
    return (packet[1] & 0x1F) << 8 | packet[2]


def pictures(packets):
    """Places of the packets of each picture, and whether it is a key frame."""
    frames = []
    for place, packet in enumerate(packets):
        if number(packet) == VIDEO:
            if packet[1] & 0x40:
                frames.append(([], bool(packet[3] & 0x20 and packet[4] and packet[5] & 0x40)))
            frames[-1][0].append(place)
    return frames


def counters_from(packets, first):
    """The same packets as another program would have written them: their counters start elsewhere."""
    return [p[:3] + bytes([p[3] & 0xF0 | (p[3] + first & 0xF)]) + p[4:] for p in packets]


@pytest.mark.parametrize("shift", [0, 1, 5])
def test_joined_pieces_are_read_in_full(tmp_path, piece, shift):
    frames = np.stack(list(open_video(piece).frames()))
    path = tmp_path / "joined.ts"
    path.write_bytes(piece.read_bytes() + b"".join(counters_from(packets_of(piece), shift)) + piece.read_bytes())
    video = open_video(path)
    assert video.num_frames == 60
    np.testing.assert_array_equal(np.stack(list(video.frames())), np.concatenate([frames] * 3))
    np.testing.assert_array_equal(video.read([59, 21]), frames[[19, 1]])
    assert len(find_gaps(path, VIDEO)[0]) >= 1


def test_pieces_of_other_lengths_are_read_in_full(tmp_path, piece):
    short = encode(tmp_path / "short.ts", moving(3), g=5)
    for name, parts in {"a": (piece, short), "b": (short, piece)}.items():
        path = tmp_path / f"{name}.ts"
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        if "h264" in piece.name:  # FFmpeg does not change the decoder in the middle
            assert open_video(path).num_frames == 23


def test_joint_is_found_after_a_picture_that_fills_its_packets(tmp_path, piece):
    packets = packets_of(piece)
    last = pictures(packets)[-1][0][-1]
    packet = packets[last]
    payload = packet[5 + packet[4] :] if packet[3] & 0x20 else packet[4:]
    packets[last] = packet[:3] + bytes([packet[3] & 0x1F]) + payload + bytes(184 - len(payload))  # zeros, not padding
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(packets + counters_from(packets_of(piece), 5)))
    joints, gap = find_gaps(path, VIDEO)
    assert (len(joints), gap) == (1, None)


@pytest.mark.parametrize("joined", [False, True])
def test_lost_packets_are_found_where_they_are_missing(tmp_path, piece, joined):
    packets = packets_of(piece)
    path = tmp_path / "lost.ts"
    inside = [
        place
        for place, packet in enumerate(packets[:-1])
        if number(packet) == number(packets[place + 1]) == VIDEO and not (packet[1] | packets[place + 1][1]) & 0x40
    ]
    third = pictures(packets)[2][0][0]  # the first ones are decoded to open the file, before anything is searched
    inside = [place for place in inside if place > third]
    for place in inside[:: max(1, len(inside) // 8)]:
        before = packets if joined else []
        path.write_bytes(b"".join(before + packets[:place] + packets[place + 1 :]))
        starts = sum(number(packet) == VIDEO and packet[1] & 0x40 > 0 for packet in before + packets[:place])
        with pytest.raises(VideoError, match=r"packets are missing after frame \d+, before byte \d+") as error:
            open_video(path).check()
        frame, position = map(int, re.search(r"frame (\d+), before byte (\d+)", str(error.value)).groups())
        assert abs(frame - (starts - 1)) <= 1
        assert position == 188 * (len(before) + place)


def test_losses_that_resemble_a_joint_are_found(tmp_path, piece):
    packets = packets_of(piece)
    table = next(packet for packet in packets if number(packet) == 0)
    path = tmp_path / "lost.ts"
    several = 0
    for (places, _), (following, key) in pairwise(pictures(packets)[1:]):
        if key:  # the end of a picture before a key frame and, likely, a table
            remaining = [packet for place, packet in enumerate(packets) if place != places[-1]]
            between = any(number(packet) == 0 for packet in packets[places[-1] : following[0]])
            if len(places) == 1 or not between:
                continue
            several += 1
        else:  # a whole picture, with a table in its place
            remaining = [table if place == places[0] else packet for place, packet in enumerate(packets)]
            remaining = [packet for place, packet in enumerate(remaining) if place not in places[1:]]
        path.write_bytes(b"".join(remaining))
        assert find_gaps(path, VIDEO)[1] is not None
    assert several or "mpeg2" not in piece.name  # other pictures fit one packet


def test_damage_right_behind_a_joint_is_found(tmp_path, piece):
    packets = packets_of(piece)
    first = [place for place, packet in enumerate(packets) if number(packet) == VIDEO][:6]
    for place in first[1:]:
        path = tmp_path / "lost.ts"
        path.write_bytes(piece.read_bytes() + b"".join(packets[:place] + packets[place + 1 :]))
        with pytest.raises(VideoError, match="packets are missing after frame"):
            open_video(path).check()


def test_piece_that_was_cut_before_it_was_joined_is_refused(tmp_path, piece):
    content = piece.read_bytes()
    for end in (len(content) // 2 + 1, len(content) - 188 * 3 - 7):
        path = tmp_path / "cut.ts"
        path.write_bytes(content[:end] + content)
        with pytest.raises(VideoError, match="download or copy it again"):
            open_video(path).check()
        path.write_bytes(content[:end])
        with pytest.raises(VideoError, match="download or copy it again"):
            open_video(path).check()


def test_packets_of_cameras_are_read(tmp_path, piece):
    stamped = b"".join(bytes(4) + packet for packet in packets_of(piece))
    path = tmp_path / "a.m2ts"
    path.write_bytes(stamped + stamped)
    assert open_video(path).num_frames == 40
    assert find_gaps(path, VIDEO)[1] is None
    lost = [place for place, packet in enumerate(packets_of(piece)) if number(packet) == VIDEO][2]
    path.write_bytes(stamped[: 192 * lost] + stamped[192 * (lost + 1) :])
    assert find_gaps(path, VIDEO)[1] >= 192 * lost
