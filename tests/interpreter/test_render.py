"""Files and pictures are read back by common programs."""

import errno
import json
import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from interpreter import render
from interpreter.render import curves
from interpreter.render.rle import RleSpool, RleWriter
from interpreter.render.video import VideoWriter

RED = np.array([200, 30, 60], np.uint8)


def moving_square(frames=6, size=(32, 48)):
    labels = np.zeros((frames, *size), np.uint8)
    for t in range(frames):
        labels[t, 8:20, 4 + 3 * t : 16 + 3 * t] = 3
    labels[2:4, 24:30, 30:40] = 7
    return labels


def test_davis_palette_has_its_well_known_colours():
    assert render.PALETTE.shape == (256, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0), 255: (224, 224, 192)}
    assert {i: tuple(render.PALETTE[i].tolist()) for i in known} == known
    assert len(np.unique(render.PALETTE, axis=0)) == len(np.unique(render.DISPLAY_PALETTE, axis=0)) == 256


def test_palette_png_round_trips(tmp_path):
    labels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    path = tmp_path / "clip" / "00000.png"
    render.write_palette_png(labels[:, ::2], path)  # not contiguous
    with Image.open(path) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels[:, ::2])
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), render.PALETTE[labels[:, ::2]])
    assert [p.name for p in path.parent.iterdir()] == ["00000.png"]
    with pytest.raises(ValueError, match="uint8"):
        render.write_palette_png(labels.astype(int), path)


def test_overlay_mixes_colours_and_draws_inner_contours():
    frame, labels = np.full((32, 48, 3), 100, np.uint8), moving_square()[0]
    out = render.overlay(frame, labels, 0.5)
    colour = render.DISPLAY_PALETTE[3]
    np.testing.assert_allclose(out[14, 10].astype(int), (100 + colour.astype(int)) // 2, atol=1)
    np.testing.assert_array_equal(out[8, 4:16], np.broadcast_to(colour, (12, 3)))  # top row of the square
    np.testing.assert_array_equal(out[7, 4:16], np.broadcast_to(render.DISPLAY_PALETTE[0], (12, 3)))  # just outside
    upside_down = render.overlay(frame, labels[::-1, ::-1], 0.5)
    np.testing.assert_array_equal(upside_down[::-1, ::-1], out)  # edges count from both sides
    assert (frame == 100).all()


def test_overlay_shows_the_frame_at_alpha_0_and_labels_at_1():
    frame, labels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8), moving_square()[0]
    inside = slice(9, 19), slice(5, 15)  # of the square, without its contour
    np.testing.assert_array_equal(render.overlay(frame, labels, 0)[inside], frame[inside])
    np.testing.assert_array_equal(render.overlay(frame, labels, 1), render.segment_image(labels))
    with pytest.raises(ValueError, match="labels"):
        render.overlay(frame, labels[:-1])


def test_background_is_not_painted():
    frame, labels = np.full((32, 48, 3), 100, np.uint8), moving_square()[0]
    out, ground = render.overlay(frame, labels, 0.5, background=0), labels == 0
    assert (out[ground] == 100).all()
    np.testing.assert_array_equal(out[~ground], render.overlay(frame, labels, 0.5)[~ground])
    empty = {"masks": np.zeros_like(labels)[None]}
    for background, gray in ((None, False), (0, True)):
        grid = render.mask_grid(frame[None], empty, background=background)
        assert (grid[3 * len(grid) // 4, grid.shape[1] // 2] == 100).all() == gray


@pytest.mark.parametrize("fps", [25, Fraction(30000, 1001), 23.976])
@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_mp4_is_read_back(tmp_path, fps, size):
    path = tmp_path / "new" / "clip.mp4"
    with VideoWriter(path, fps, size) as video:
        for t in range(7):
            frame = np.full((*size, 3), RED, np.uint8)
            frame[:, 10 * t : 10 * t + 10] = 255
            video.write(frame)
        assert not path.exists()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
        assert stream.average_rate == (Fraction(2997, 125) if fps == 23.976 else Fraction(fps))
    assert len(frames) == 7
    assert [frame.time for frame in frames] == pytest.approx([t / float(fps) for t in range(7)], abs=1e-4)
    for t, frame in enumerate(frames):
        pixels = frame.to_ndarray(format="rgb24").astype(int)
        np.testing.assert_allclose(pixels[30, 10 * t + 5], 255, atol=6)
        np.testing.assert_allclose(pixels[30, 85], RED.astype(int), atol=6)  # colours survive the 4:2:0 round trip
    content = path.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")  # the index is in front: playing starts at once
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("aspect", [Fraction(1), Fraction(64, 45), Fraction(45, 64)])
def test_mp4_keeps_the_aspect_of_a_pixel(tmp_path, aspect):
    with VideoWriter(tmp_path / "clip.mp4", 25, (17, 33), aspect) as video:
        video.write(np.zeros((17, 33, 3), np.uint8))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
        assert container.streams.video[0].sample_aspect_ratio == aspect
        assert container.streams.video[0].codec_context.sample_aspect_ratio == aspect
        assert (frame.height, frame.width) == (18, 34)
    with pytest.raises(ValueError, match="pixel_aspect must be positive"):
        VideoWriter(tmp_path / "clip.mp4", 25, (16, 16), Fraction(0))


WRITE_MOVING_BLOCKS = """
import sys
import numpy as np
from interpreter.render.video import VideoWriter
blocks = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
with VideoWriter(sys.argv[1], 25, (48, 64)) as video:
    for shift in range(12):
        video.write(np.roll(blocks, 3 * shift, 1))
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs MALLOC_PERTURB_ of the GNU C library, which fills new memory"
)
def test_same_frames_same_bytes_whatever_the_memory_held_before(tmp_path):
    contents = set()
    for number in (0, 1, 85, 170):
        path = tmp_path / f"{number}.mp4"
        environment = {**os.environ, "MALLOC_PERTURB_": str(number)}
        subprocess.run([sys.executable, "-c", WRITE_MOVING_BLOCKS, path], env=environment, check=True)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_failed_video_leaves_nothing_behind(tmp_path):
    path = tmp_path / "clip.mp4"

    def write(frames, fail):
        with VideoWriter(path, 25, (16, 16)) as video:
            for frame in frames:
                video.write(frame)
            if fail:
                raise KeyError("stopped")

    black = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(KeyError, match="stopped"):
        write([black], fail=True)
    with pytest.raises(ValueError, match="no frame"):
        write([], fail=False)
    with pytest.raises(ValueError, match="frame must be"):
        write([black[:8]], fail=False)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"an older file")
    with pytest.raises(KeyError):
        write([black], fail=True)
    assert path.read_bytes() == b"an older file"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
@pytest.mark.parametrize("count", [1, 40], ids=["at the end", "while writing"])
def test_full_disk_is_one_clear_line(tmp_path, monkeypatch, count):
    path = tmp_path / "clip.mp4"
    monkeypatch.setattr("interpreter.files.token_hex", lambda count: "0")
    (tmp_path / ".clip.mp4.0.tmp").symlink_to("/dev/full")
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)

    def write():
        with VideoWriter(path, 25, (128, 128)) as video:
            for _ in range(count):
                video.write(noise)

    with pytest.raises(OSError, match="the disk is full") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def decode(segmentation, size):
    return np.zeros(size, np.uint8) if segmentation is None else coco.decode(segmentation)


def rle_entries(path, video_id, labels):
    with RleWriter(path) as writer:
        for frame in labels:
            writer.write(video_id, frame)
    return json.loads(path.read_text())


def test_rle_round_trips(tmp_path):
    labels = moving_square()
    entries = rle_entries(tmp_path / "results.json", 12, labels)
    assert [(e["video_id"], e["category_id"], len(e["segmentations"])) for e in entries] == [(12, 1, 6)] * 3
    for entry, label in zip(entries, (0, 3, 7), strict=True):
        assert 0 <= entry["score"] <= 1
        masks = np.stack([decode(s, labels.shape[1:]) for s in entry["segmentations"]])
        np.testing.assert_array_equal(masks, labels == label)
    assert [s is None for s in entries[2]["segmentations"]] == [True, True, False, False, True, True]


def test_rle_names_segments_and_leaves_hidden_pixels_out(tmp_path):
    labels = moving_square()
    whole = rle_entries(tmp_path / "whole.json", 1, labels)
    path = tmp_path / "named.json"
    with RleWriter(path, hidden=0, names={7: "dog", 9: "absent"}) as writer:
        for frame in labels:
            writer.write(1, frame)
    assert json.loads(path.read_text()) == [whole[1], whole[2] | {"name": "dog"}]


def test_rle_writer_keeps_videos_apart(tmp_path):
    first, second = moving_square(), moving_square(3, (40, 60))
    path = tmp_path / "results.json"
    with RleWriter(path) as writer:
        for labels in first[:3]:
            writer.write("a", labels)
        for labels in second:
            writer.write("b", labels)
        for labels in first[3:]:
            writer.write("a", labels)
        assert not path.exists()
    alone = tmp_path / "alone.json"
    assert json.loads(path.read_text()) == [*rle_entries(alone, "a", first), *rle_entries(alone, "b", second)]


def test_failed_rle_writer_leaves_nothing_behind(tmp_path):
    path = tmp_path / "results.json"

    def write():
        with RleWriter(path) as writer:
            writer.write(1, np.zeros((4, 4), np.uint8))
            writer.write(1, np.zeros((4, 5), np.uint8))

    with pytest.raises(ValueError, match="differ in size"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_mask_grid_has_a_row_for_each_segmentation():
    labels = moving_square()
    frames = np.full((*labels.shape, 3), 90, np.uint8)
    two = render.mask_grid(frames, labels, width=900)
    four = render.mask_grid(frames, {"ours": labels, "k-means": labels}, truth=labels, width=900)
    assert two.dtype == np.uint8
    assert two.shape[1] == four.shape[1] == 900
    assert abs(four.shape[0] - 2 * two.shape[0]) <= 10
    colours = {tuple(c) for c in four.reshape(-1, 3).tolist()}
    assert tuple(render.DISPLAY_PALETTE[3].tolist()) in colours
    assert (0, 0, 0) in colours
    with pytest.raises(ValueError, match="truth"):
        render.mask_grid(frames, labels, truth=labels[:2])


def test_curves_are_drawn_for_every_finite_quantity(tmp_path):
    records = [{"stage": s, "step": i, "loss": 2 / (i + 1), "lr": 1e-4, "note": "x"} for s in "ab" for i in range(100)]
    records += [{"stage": "a", "step": 200, "loss": float("nan"), "lr": None, "speed": 3.0, "done": True}, {"loss": 1}]
    series = curves._series(records)
    assert list(series) == ["loss", "lr", "speed"]
    assert [len(points) for points in series["loss"].values()] == [100, 100]
    path = tmp_path / "curves.png"
    render.plot_curves(records, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("L")).std() > 5
    with pytest.raises(ValueError, match="nothing to plot"):
        render.plot_curves([{"loss": 1.0}], path)


def test_spooled_rle_is_the_same_file(tmp_path):
    labels = moving_square()
    rle_entries(tmp_path / "a.json", "x y", labels)
    with RleSpool(tmp_path / "b.json", "x y", tmp_path / "codes") as spool:
        for frame in labels:
            spool.write(frame)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert not (tmp_path / "codes").exists()
