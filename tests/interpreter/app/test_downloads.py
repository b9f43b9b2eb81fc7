"""Files of the segments: those that `segment` writes, without hidden segments and with the segments' names."""

import io
import json
import zipfile
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from interpreter import segment_video

from ..clips import make_clip


@pytest.fixture(scope="module")
def written(tmp_path_factory, clip, tiny_run):
    """What the command segment writes for the same clip."""
    out = tmp_path_factory.mktemp("written")
    segment_video(clip, tiny_run, out)
    return out


@pytest.fixture(scope="module")
def labels(segmented):
    """Numbers of the segments, [T, H, W]."""
    return np.stack(list(segmented.labels())) + 1


@pytest.fixture(scope="module")
def hidden(labels):
    """The largest segment, which the tests hide."""
    return int(np.bincount(labels.ravel()).argmax())


@pytest.fixture(scope="module")
def named(labels, hidden):
    """The largest of the others, which the tests name."""
    return int(np.bincount(labels[labels != hidden]).argmax())


@pytest.fixture
def ready(tab, clip):
    """A tab with segments."""
    tab.upload(clip)
    tab.segment("run-0")
    return tab


@pytest.fixture
def corrected(ready, hidden, named):
    """A tab with a hidden and a named segment."""
    ready.edit("hide", hidden)
    ready.edit("name", named, name="the disc")
    return ready


def decode(content, format):
    with av.open(io.BytesIO(content)) as file:
        stream = file.streams.video[0]
        return stream, np.stack([frame.to_ndarray(format=format) for frame in file.decode(video=0)])


def test_pngs_are_those_of_segment(ready, written):
    name, content = ready.download("png")
    assert name == "walk-masks.zip"
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert archive.namelist() == [f"Annotations/walk/{t:05d}.png" for t in range(5)]
    for file in archive.namelist():
        assert archive.read(file) == (written / file).read_bytes()


def test_rle_is_that_of_segment(ready, written):
    name, content = ready.download("rle")
    assert name == "walk-segments.json"
    assert content == (written / "segments.json").read_bytes()


def test_overlay_is_that_of_segment(ready, written):
    name, content = ready.download("overlay", opacity=0.5)
    assert name == "walk-overlay.mp4"
    assert content == (written / "overlay.mp4").read_bytes()
    assert ready.download("overlay", opacity=0.2)[1] != content
    assert ready.download("overlay")[1] == content  # half by default


def test_pngs_leave_out_what_is_hidden(corrected, labels, hidden, named):
    archive = zipfile.ZipFile(io.BytesIO(corrected.download("png")[1]))
    assert archive.read("names.txt").decode() == f"{named} the disc\n"
    for t in range(5):
        image = Image.open(archive.open(f"Annotations/walk/{t:05d}.png"))
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), np.where(labels[t] == hidden, 0, labels[t]))


def test_rle_leaves_out_what_is_hidden(corrected, labels, hidden, named, written):
    entries = json.loads(corrected.download("rle")[1])
    expected = json.loads((written / "segments.json").read_text())
    present = np.unique(labels).tolist()
    del expected[present.index(hidden)]
    present.remove(hidden)
    expected[present.index(named)]["name"] = "the disc"
    assert entries == expected
    codes = entries[present.index(named)]["segmentations"]
    masks = [np.zeros((48, 64), bool) if code is None else coco.decode(code).astype(bool) for code in codes]
    np.testing.assert_array_equal(np.stack(masks), labels == named)


def test_cutout_shows_the_visible_segments_alone(corrected, labels, hidden, segmented):
    name, content = corrected.download("cutout")
    assert name == "walk-cutout.mp4"
    stream, rgba = decode(content, "rgba")
    assert (stream.average_rate, stream.height, stream.width) == (Fraction(30000, 1001), 48, 64)
    visible = labels != hidden
    np.testing.assert_array_equal(rgba[..., 3], np.where(visible, 255, 0))
    frames = np.stack(list(segmented.video.frames()))
    np.testing.assert_array_equal(rgba[..., :3], np.where(visible[..., None], frames, 0))


def test_cutout_without_hidden_segments_is_the_whole_video(ready, segmented):
    _, rgba = decode(ready.download("cutout")[1], "rgba")
    np.testing.assert_array_equal(rgba[..., :3], np.stack(list(segmented.video.frames())))
    assert (rgba[..., 3] == 255).all()


def test_overlay_does_not_tint_what_is_hidden(ready, labels, hidden, named, segmented):
    frames = np.stack(list(segmented.video.frames())).astype(int)
    # Away from edges, because outlines are drawn there and the codec blurs them.
    inside = {id: np.stack([_eroded(frame == id) for frame in labels]) for id in (hidden, named)}
    assert inside[hidden].any()
    assert inside[named].any()

    def changes():
        _, shown = decode(ready.download("overlay", opacity=0.9)[1], "rgb24")
        difference = np.abs(shown.astype(int) - frames).mean(-1)
        return {id: difference[mask].mean() for id, mask in inside.items()}

    before = changes()
    ready.edit("hide", hidden)
    after = changes()
    assert before[hidden] > 50
    assert after[hidden] < 12
    assert after[named] == pytest.approx(before[named], rel=0.2)


def _eroded(mask, times=3):
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask


def test_merged_segments_are_one_in_every_file(ready, labels, hidden, named):
    kept, gone = sorted((hidden, named))
    ready.edit("merge", gone, kept)
    archive = zipfile.ZipFile(io.BytesIO(ready.download("png")[1]))
    maps = np.stack([np.asarray(Image.open(archive.open(name))) for name in archive.namelist()])
    assert gone not in maps
    assert (maps[np.isin(labels, (kept, gone))] == kept).mean() > 0.95
    entries = json.loads(ready.download("rle")[1])
    assert len(entries) == len(np.unique(maps))
    areas = [sum(int(coco.area(code)) for code in entry["segmentations"] if code) for entry in entries]
    assert areas == [int((maps == id).sum()) for id in np.unique(maps)]


def test_everything_hidden_gives_empty_files(ready):
    ready.edit("hide", *(s["id"] for s in ready.state()["panes"]["main"]["segments"]))
    assert json.loads(ready.download("rle")[1]) == []
    archive = zipfile.ZipFile(io.BytesIO(ready.download("png")[1]))
    assert not any(np.asarray(Image.open(archive.open(name))).any() for name in archive.namelist())
    assert not decode(ready.download("cutout")[1], "rgba")[1].any()


def test_files_are_attachments_until_the_segments_change(server, ready):
    for format in ("png", "rle"):
        name, _ = ready.download(format)
        assert ready.get(f"download/{format}").headers["content-disposition"] == f'attachment; filename="{name}"'
    assert set(ready.state()["downloads"]) == {"png", "rle"}
    assert len(server.files()) == 3
    ready.edit("hide", 1)
    assert ready.state()["downloads"] == {}
    assert ready.get("download/png").status == 404
    assert [name.rpartition("/")[2] for name in server.files()] == ["walk.mp4"]


def test_download_has_the_state_at_its_start(ready, labels, hidden):
    ready.edit("hide", hidden)
    ready.edit("undo")
    archive = zipfile.ZipFile(io.BytesIO(ready.download("png")[1]))
    np.testing.assert_array_equal(np.asarray(Image.open(archive.open("Annotations/walk/00000.png"))), labels[0])
    assert "names.txt" not in archive.namelist()


def test_pixels_that_are_not_square_stay_so(tab, tmp_path):
    source = make_clip(tmp_path / "square.mp4", frames=3)
    wide = tmp_path / "wide.mp4"
    with av.open(str(source)) as old, av.open(str(wide), "w") as new:
        stream = new.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for frame in old.decode(video=0):
            new.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        new.mux(stream.encode())
    assert tab.upload(wide).json["clip"]["aspect"] == pytest.approx(4 / 3)
    tab.segment("run-0")
    for format in ("cutout", "overlay"):
        stream, frames = decode(tab.download(format)[1], "rgb24")
        assert frames.shape == (3, 48, 64, 3)
        assert stream.sample_aspect_ratio == Fraction(4, 3)
