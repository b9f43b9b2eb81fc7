"""Files of a segmented video are read back and compared with its label maps."""

import doctest
import errno
import json
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco
from safetensors import safe_open

from interpreter import segmentation
from interpreter.data import open_dataset, open_video
from interpreter.metrics import PROTOCOLS, score_video
from interpreter.render import overlay
from interpreter.render.preview import PREVIEW_WIDTH
from interpreter.segmentation import Segmentation, SegmentedVideo, check_output

from .clips import SOURCES, make_clip, read_annotations
from .videos import encode

OUTPUTS = ["Annotations", "overlay.mp4", "preview.png", "segments.json", "slots.safetensors", "videos.json"]


def invented(video, segments=5, seed=0, image_only=False, edges="guided"):
    """A segmentation with several segments of similar size, which tiny runs do not produce."""
    torch.manual_seed(seed)
    attention = torch.softmax(4 * torch.randn(len(video), 24, 7), -1).half()
    tensors = {"image_slots": torch.randn(len(video), 7, 8), "image_attention": attention}
    across = None
    if not image_only:
        across = torch.softmax(4 * torch.randn(len(video), 7, segments), -1)
        tensors |= {"video_slots": torch.randn(segments, 8), "video_attention": across}
    return SegmentedVideo(video, Segmentation((4, 6), attention, across, tensors), edges)


@pytest.mark.parametrize("edges", ["guided", "none"])
@pytest.mark.parametrize("image_only", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_written_files_agree_with_the_label_maps(tmp_path, source, image_only, edges):
    video = open_video(SOURCES[source](tmp_path))
    segmented = invented(video, image_only=image_only, edges=edges)
    out, size = tmp_path / "out", (video.height, video.width)
    shares = segmented.write(out, alpha=0.4)
    assert sorted(p.name for p in out.iterdir()) == OUTPUTS

    soft = segmented.segmentation.masks().mT.unflatten(2, (4, 6))
    upsampled = F.interpolate(soft, size, mode="bilinear").argmax(1).numpy()
    ids = read_annotations(out, video.name)
    assert ids.shape == (len(video), *size)
    same = (ids == upsampled + 1).mean()
    assert same > 0.999 if edges == "none" else same < 0.99  # ties within rounding may be broken either way
    labels = np.stack(list(segmented.labels()))
    np.testing.assert_array_equal(ids, labels + 1)
    counts = np.bincount(labels.ravel(), minlength=segmented.segmentation.num_segments)
    np.testing.assert_allclose(shares, counts / labels.size)

    entries = json.loads((out / "segments.json").read_text())
    assert len(entries) == (counts > 0).sum()
    for index, entry in zip(np.flatnonzero(counts), entries, strict=True):
        assert entry["video_id"] == 1
        for mask, code in zip(labels == index, entry["segmentations"], strict=True):
            decoded = np.zeros(size, bool) if code is None else coco.decode(code).astype(bool)
            np.testing.assert_array_equal(decoded, mask)

    with av.open(str(out / "overlay.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == video.fps
        painted = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    assert len(painted) == len(video)
    for frame, maps, read in zip(video.frames(), labels, painted, strict=True):
        assert read.shape[:2] == tuple(side + side % 2 for side in size)
        # Brightness only: the file holds colours at half the resolution.
        difference = (read[: size[0], : size[1]].astype(float) - overlay(frame, maps, 0.4)) @ (0.21, 0.72, 0.07)
        assert abs(difference).mean() < 8  # compression; without the paint it would be 20 to 50

    with Image.open(out / "preview.png") as image:
        assert image.width == PREVIEW_WIDTH * min(6, len(video))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mp4", "mpeg4")])
def test_overlay_keeps_the_aspect_of_pixels(tmp_path, name, codec, turned):
    """Masks are of stored pixels; the overlay keeps the aspect of a pixel, which a quarter turn inverts."""
    aspect = Fraction(4, 3)
    with av.open(str(tmp_path / name), "w") as file:
        stream = file.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        if turned:
            stream.set_display_rotation(90)
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        file.mux(stream.encode())
    video = open_video(tmp_path / name)
    expected, size = (1 / aspect, (64, 48)) if turned else (aspect, (48, 64))
    assert video.pixel_aspect == expected
    invented(video).write(tmp_path / "out")
    with av.open(str(tmp_path / "out" / "overlay.mp4")) as file:
        assert file.streams.video[0].sample_aspect_ratio == expected
        assert (file.streams.video[0].height, file.streams.video[0].width) == size
    assert read_annotations(tmp_path / "out", video.name).shape[1:] == size
    with Image.open(tmp_path / "out" / "preview.png") as image:
        shown = round(PREVIEW_WIDTH * size[0] / (size[1] * expected))
        assert image.height / 2 == pytest.approx(shown, rel=0.06)  # but for the gaps


@pytest.mark.parametrize("image_only", [False, True])
def test_slots_are_enough_to_segment_again(tmp_path, image_only):
    video = open_video(make_clip(tmp_path / "clip.mp4"))
    segmented = invented(video, image_only=image_only)
    segmented.write(tmp_path)
    with safe_open(tmp_path / "slots.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()["video"])
    expected = {"grid": [4, 6], "source": "clip.mp4", "fps": "30000/1001", "size": [48, 64], "edges": "guided"}
    assert metadata == expected
    assert tensors["image_attention"].dtype == torch.float16
    assert tensors.keys() == segmented.segmentation.tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, segmented.segmentation.tensors[name]), name
    factors = tensors["image_attention"], tensors.get("video_attention")
    again = SegmentedVideo(video, Segmentation(tuple(metadata["grid"]), *factors))
    np.testing.assert_array_equal(np.stack(list(again.labels())), np.stack(list(segmented.labels())))


def test_writing_again_replaces_everything(tmp_path):
    out = tmp_path / "out"
    invented(open_video(make_clip(tmp_path / "clip.mp4", frames=9))).write(out)
    segmented = invented(open_video(make_clip(tmp_path / "clip.mp4", frames=2)))
    segmented.write(out)
    np.testing.assert_array_equal(read_annotations(out, "clip"), np.stack(list(segmented.labels())) + 1)
    invented(open_video(make_clip(tmp_path / "other.mp4", frames=1))).write(out)
    assert sorted(p.name for p in (out / "Annotations").iterdir()) == ["clip", "other"]
    assert sorted(p.name for p in out.iterdir()) == OUTPUTS


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_what_was_there(tmp_path, monkeypatch, error):
    out, video = tmp_path / "out", open_video(make_clip(tmp_path / "clip.mp4"))
    invented(video, seed=1).write(out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    write, count = segmentation.write_palette_png, iter(range(100))

    def write_four(labels, path):
        if next(count) == 4:
            raise error
        write(labels, path)

    monkeypatch.setattr(segmentation, "write_palette_png", write_four)
    with pytest.raises(type(error), match="nothing was written" if isinstance(error, OSError) else None):
        invented(video, seed=2).write(out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_video_that_changes_meanwhile_is_refused(tmp_path):
    video = open_video(make_clip(tmp_path / "clip.mp4", frames=5))
    segmented = invented(video)
    for frames in (3, 7):
        make_clip(tmp_path / "clip.mp4", frames=frames)
        with pytest.raises(ValueError, match=r"changed while it was (segmented|read)"):
            segmented.write(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_more_segments_than_a_palette_holds_are_refused(tmp_path):
    video = open_video(make_clip(tmp_path / "clip.mp4", frames=1))
    with pytest.raises(ValueError, match="255 segments"):
        invented(video, segments=255).write(tmp_path / "out")


def test_checking_the_output_creates_nothing(tmp_path):
    video = open_video(make_clip(tmp_path / "clip.mp4", frames=1))
    before = sorted(tmp_path.rglob("*"))
    check_output(tmp_path / "new" / "out", video, alpha=0.5)
    assert sorted(tmp_path.rglob("*")) == before


def test_guide_of_a_turned_video_is_turned_like_its_label_maps(tmp_path):
    """A bright disc on dark ground, in a video that is shown after a quarter turn."""
    rows, columns = np.mgrid[:96, :128]
    disc = (rows - 30) ** 2 + (columns - 80) ** 2 < 400
    frames = np.where(disc[None, :, :, None], np.uint8(230), np.uint8(40)) * np.ones((3, 1, 1, 3), np.uint8)
    encode(tmp_path / "turned.mp4", frames, rotation=90)
    video = open_video(tmp_path / "turned.mp4")
    truth = next(video.frames())[:, :, 0] > 128
    assert truth.shape == (128, 96)
    object_share = F.avg_pool2d(torch.from_numpy(truth)[None].float(), 16).flatten().expand(3, -1)
    soft = Segmentation((8, 6), torch.stack([1 - object_share, object_share], -1).half())
    wrong = {}
    for edges in ("guided", "none"):
        SegmentedVideo(video, soft, edges).write(tmp_path / edges)
        wrong[edges] = ((read_annotations(tmp_path / edges, "turned") == 2) != truth).sum()
    assert wrong["guided"] < wrong["none"] / 3


@pytest.mark.parametrize("size", [None, (11, 13)])
def test_label_maps_one_by_one_are_those_of_all_frames(tmp_path, size):
    segmentation = invented(open_video(make_clip(tmp_path / "clip.mp4", frames=19))).segmentation
    maps = list(segmentation.label_maps(size))
    np.testing.assert_array_equal(np.stack([m.labels for m in maps]), segmentation.labels(size=size))
    for labels, areas in maps:
        np.testing.assert_array_equal(areas, np.bincount(labels.ravel(), minlength=5))


@pytest.mark.parametrize("image_only", [False, True])
def test_label_map_of_one_frame_is_that_of_the_whole_video(tmp_path, image_only):
    video = open_video(make_clip(tmp_path / "clip.mp4"))
    segmented = invented(video, image_only=image_only)
    whole = list(segmented.labels())
    for number in (0, 5, 8):
        frame = video.read([number])[0]
        part = segmented.segmentation.part(slice(number, number + 1))
        (alone,) = part.label_maps(frame.shape[:2], [frame])
        np.testing.assert_array_equal(alone.labels, whole[number])


def test_guided_edges_are_nearer_to_the_truth(scenes):
    """Soft masks of the true objects, averaged over patches of 4 pixels, on frames whose objects are known exactly."""
    dataset = open_dataset("synthetic", scenes, "val")
    for index, video in enumerate(dataset.videos):
        truth = dataset.masks(index)
        onehot = F.one_hot(torch.from_numpy(truth.astype(np.int64))).movedim(3, 1).float()
        soft = Segmentation((32, 48), F.avg_pool2d(onehot, 4).flatten(2).mT.half())
        miou = {}
        for edges in ("none", "guided"):
            pred = np.stack(list(SegmentedVideo(video, soft, edges).labels()))
            miou[edges] = np.nanmean(score_video(PROTOCOLS["interpreter"], pred, truth, void=255)["miou_video"])
        assert miou["guided"] > miou["none"] + 0.004


@pytest.mark.parametrize("edges", ["guided", "none"])
def test_label_maps_decode_at_their_size_and_only_for_guided_edges(tmp_path, edges, monkeypatch):
    video = open_video(make_clip(tmp_path / "clip.mp4", frames=9))
    segmented, streamed = invented(video, edges=edges), []
    stream = type(video)._stream
    monkeypatch.setattr(type(video), "_stream", lambda self, size: streamed.append(size) or stream(self, size))
    native, small = list(segmented.labels()), list(segmented.labels((24, 32)))
    assert (native[0].shape, small[0].shape) == ((48, 64), (24, 32))
    assert streamed == ([None, (24, 32)] if edges == "guided" else [])
    expected = segmented.segmentation.label_maps((24, 32), video.frames((24, 32)) if edges == "guided" else None)
    np.testing.assert_array_equal(np.stack(small), np.stack([maps.labels for maps in expected]))
    streamed.clear()
    segmented.write(tmp_path / "out")
    assert streamed == [None]  # the frames that are painted guide the edges too


@pytest.mark.parametrize("edges", ["guided", "none"])
def test_writing_keeps_a_few_frames_in_memory(tmp_path, edges, monkeypatch):
    video = open_video(make_clip(tmp_path / "clip.mp4", frames=50))
    seen, most = [], 0
    stream = type(video)._stream

    def counted(self, size):
        nonlocal most
        for frame in stream(self, size):
            seen.append(weakref.ref(frame))
            most = max(most, sum(reference() is not None for reference in seen))
            yield frame

    monkeypatch.setattr(type(video), "_stream", counted)
    invented(video, edges=edges).write(tmp_path / "out")
    assert len(seen) == 50
    assert most <= 2 * segmentation.LABELS_AT_ONCE


def test_examples():
    failed, tried = doctest.testmod(segmentation)
    assert (failed, tried > 0) == (0, True)


FRAME = np.zeros((48, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ([FRAME] * 8, "the guide has 8 frames, but 9 were segmented"),
        ([FRAME] * 3, "the guide has 3 frames, but 9 were segmented"),
        ([], "the guide has 0 frames, but 9 were segmented"),
        ([FRAME] * 10, "the guide has more frames than the 9 that were segmented"),
        ([FRAME, FRAME[:, 1:]], r"frame 1 of the guide is uint8 \[48, 63, 3\], .* 48x64 need uint8 \[48, 64, 3\]"),
        ([*[FRAME] * 8, FRAME / 255.0], r"frame 8 of the guide is float64 \[48, 64, 3\]"),
        ([FRAME[:, :, 0]], r"frame 0 of the guide is uint8 \[48, 64\]"),
    ],
)
def test_guide_that_does_not_fit_is_refused(tmp_path, guide, message):
    soft = invented(open_video(make_clip(tmp_path / "clip.mp4", frames=9))).segmentation
    with pytest.raises(ValueError, match=message):
        list(soft.label_maps((48, 64), guide))
    assert len(list(soft.label_maps((48, 64), (FRAME for _ in range(9))))) == 9
