"""What segmenting a video writes is read back and compared with what the model said."""

import errno
import json
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco
from safetensors import safe_open

from interpreter import SegmentedVideo, segment, segment_video
from interpreter.commands import run_command
from interpreter.data import open_video
from interpreter.methods.interpreter.segmenter import Segmentation, Segmenter
from interpreter.render import overlay
from profiling.timing import peak_bytes

OUTPUTS = ["Annotations", "overlay.mp4", "preview.png", "segments.json", "slots.safetensors"]


def make_clip(path, frames=9, size=(48, 64), pixels="yuv420p", codec="libx264", fps=Fraction(30000, 1001)):
    """A disc that crosses blocky noise."""
    rng = np.random.default_rng(0)
    ground = rng.integers(40, 120, (size[0] // 8 + 1, size[1] // 8 + 1, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    rows, columns = np.mgrid[: size[0], : size[1]]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        for t in range(frames):
            frame = ground[: size[0], : size[1]].copy()
            frame[(rows - size[0] / 2) ** 2 + (columns - 4 - 3 * t) ** 2 < 100] = (230, 200, 40)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def make_folder(path, frames=4, size=(45, 63)):
    path.mkdir()
    for t, frame in enumerate(np.random.default_rng(1).integers(0, 256, (frames, *size, 3), np.uint8)):
        Image.fromarray(frame).save(path / f"frame{t}.jpg")
    return path


SOURCES = {
    "mp4": lambda p: make_clip(p / "clip.mp4"),
    "one frame": lambda p: make_clip(p / "one.mp4", frames=1),
    "odd size": lambda p: make_clip(p / "odd.mp4", frames=3, size=(49, 35), pixels="yuv444p"),
    "grayscale": lambda p: make_clip(p / "gray.mkv", frames=3, pixels="gray", codec="ffv1"),
    "folder": lambda p: make_folder(p / "frames"),
}


def invented(video, segments=5, seed=0, image_only=False):
    """A segmentation with several segments of the same importance, such as no tiny run gives."""
    torch.manual_seed(seed)
    frames = len(video)
    image = torch.softmax(4 * torch.randn(frames, 24, 7), -1).half()
    if image_only:
        return SegmentedVideo(video, Segmentation((4, 6), torch.randn(frames, 7, 8), image, None, None))
    across = torch.softmax(4 * torch.randn(frames, 7, segments), -1)
    slots = torch.randn(frames, 7, 8), image, torch.randn(segments, 8), across
    return SegmentedVideo(video, Segmentation((4, 6), *slots))


def read_annotations(out, name):
    files = sorted((out / "Annotations" / name).iterdir())
    assert [f.name for f in files] == [f"{t:05d}.png" for t in range(len(files))]
    assert {Image.open(f).mode for f in files} == {"P"}
    return np.stack([np.asarray(Image.open(f)) for f in files])


def fail(arguments, capsys):
    """Run the command, which must fail with one line; returns it."""
    with pytest.raises(SystemExit) as left:
        run_command(lambda: segment.main([str(a) for a in arguments]))
    assert left.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("image_only", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_everything_written_agrees_with_the_model(tmp_path, source, image_only):
    video = open_video(SOURCES[source](tmp_path))
    found, out, size = invented(video, image_only=image_only), tmp_path / "out", (video.height, video.width)
    found.write(out, alpha=0.4)
    assert sorted(p.name for p in out.iterdir()) == OUTPUTS

    soft = found.segmentation.masks().mT.unflatten(2, (4, 6))
    wanted = F.interpolate(soft, size, mode="bilinear").argmax(1).numpy()
    ids = read_annotations(out, video.name)
    assert ids.shape == (len(video), *size)
    assert (ids == wanted + 1).mean() > 0.999  # ties within rounding may fall either way
    labels = np.stack(list(found.labels()))
    np.testing.assert_array_equal(ids, labels + 1)
    counts = np.bincount(labels.ravel(), minlength=found.segmentation.num_segments)
    np.testing.assert_allclose(found.shares, counts / labels.size)

    entries = json.loads((out / "segments.json").read_text())
    assert len(entries) == (counts > 0).sum()
    for index, entry in zip(np.flatnonzero(counts), entries, strict=True):
        assert entry["video_id"] == video.name
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
        assert image.width == segment.PREVIEW_WIDTH * min(6, len(video))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.mp4", "mpeg4")])
def test_pictures_of_pixels_that_are_not_square_are_shown_undistorted(tmp_path, name, codec, turned):
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
        shown = round(segment.PREVIEW_WIDTH * size[0] / (size[1] * expected))
        assert image.height / 2 == pytest.approx(shown, rel=0.06)  # but for the gaps


@pytest.mark.parametrize("image_only", [False, True])
def test_slots_are_enough_to_segment_again(tmp_path, image_only):
    video = open_video(make_clip(tmp_path / "clip.mp4"))
    found = invented(video, image_only=image_only)
    found.write(tmp_path)
    with safe_open(tmp_path / "slots.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = json.loads(file.metadata()["video"])
    assert metadata == {"grid": [4, 6], "source": "clip.mp4", "fps": "30000/1001", "size": [48, 64]}
    assert tensors["image_attention"].dtype == torch.float16
    for name, tensor in tensors.items():
        assert torch.equal(tensor, getattr(found.segmentation, name)), name
    stored = {"video_slots": None, "video_attention": None, **tensors}
    again = SegmentedVideo(video, Segmentation(tuple(metadata["grid"]), **stored))
    np.testing.assert_array_equal(np.stack(list(again.labels())), np.stack(list(found.labels())))


@pytest.mark.parametrize("stage", ["video", "image"])
@pytest.mark.parametrize("source", SOURCES)
def test_command_segments_any_video(tmp_path, tiny_run, source, stage, capsys):
    path, out = SOURCES[source](tmp_path), tmp_path / "new" / "out"
    arguments = [str(path), "--run", str(tiny_run), "--out", str(out), "--stage", stage]
    assert segment.main(arguments) == 0
    printed = capsys.readouterr().out
    found = segment_video(path, tiny_run, stage=stage)
    video = found.video
    assert found.shares is None
    np.testing.assert_array_equal(read_annotations(out, video.name), np.stack(list(found.labels())) + 1)
    assert f"{video.name}: {len(video)} frames of {video.height}x{video.width}" in printed
    assert all(str(out / name) in printed for name in (f"Annotations/{video.name}", *OUTPUTS[1:]))


def test_same_seed_same_files_another_seed_other_slots(tmp_path, tiny_run):
    clip = make_clip(tmp_path / "clip.mp4", frames=5)
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        segment_video(clip, tiny_run, tmp_path / out, seed=seed)
    a, b, c = ((tmp_path / out / "slots.safetensors").read_bytes() for out in "abc")
    assert a == b
    assert a != c
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_frame_size_sets_the_patch_grid(tmp_path, tiny_run):
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    assert segment_video(clip, tiny_run).segmentation.grid == (4, 6)
    found = segment_video(clip, tiny_run, frame_size=(96, 80))
    assert found.segmentation.grid == (6, 5)
    assert next(found.labels()).shape == (48, 64)
    assert next(found.labels((11, 13))).shape == (11, 13)


def test_writing_again_replaces_everything(tmp_path):
    out = tmp_path / "out"
    invented(open_video(make_clip(tmp_path / "clip.mp4", frames=9))).write(out)
    found = invented(open_video(make_clip(tmp_path / "clip.mp4", frames=2)))
    found.write(out)
    np.testing.assert_array_equal(read_annotations(out, "clip"), np.stack(list(found.labels())) + 1)
    invented(open_video(make_clip(tmp_path / "other.mp4", frames=1))).write(out)
    assert sorted(p.name for p in (out / "Annotations").iterdir()) == ["clip", "other"]
    assert sorted(p.name for p in out.iterdir()) == OUTPUTS


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_what_was_there(tmp_path, monkeypatch, error):
    out, video = tmp_path / "out", open_video(make_clip(tmp_path / "clip.mp4"))
    invented(video, seed=1).write(out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    write, count = segment.write_palette_png, iter(range(100))

    def write_four(labels, path):
        if next(count) == 4:
            raise error
        write(labels, path)

    monkeypatch.setattr(segment, "write_palette_png", write_four)
    with pytest.raises(type(error), match="nothing was written" if isinstance(error, OSError) else None):
        invented(video, seed=2).write(out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("room", [8, 60, 100])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, tiny_run, small_disk, capsys, room):
    out = small_disk(f"{room}k") / "out"
    clip = make_clip(tmp_path / "clip.mp4", frames=20, size=(120, 160))
    line = fail([clip, "--run", tiny_run, "--out", out, "--stage", "image"], capsys)
    assert "the disk is full" in line
    assert str(out) in line
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_nothing(tmp_path, tiny_run, number):
    clip, out = make_clip(tmp_path / "clip.mp4", frames=250, size=(360, 480)), tmp_path / "out"
    command = [sys.executable, "-m", "interpreter.segment", clip, "--run", tiny_run, "--out", out]

    def heed_interrupts():  # a shell's background jobs are born deaf to them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [str(a) for a in command]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts) as process:
        while process.poll() is None and not list(out.glob(".segment-*/Annotations/clip/00003.png")):
            time.sleep(0.01)
        process.send_signal(number)
        errors = process.communicate()[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert not list(out.iterdir())


def test_memory_does_not_grow_with_the_video(tmp_path, tiny_run):
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        pytest.skip("peak memory can be reset and read on Linux only")

    def peak(frames):
        clip = make_clip(tmp_path / f"{frames}.mp4", frames, size=(400, 600))
        refs.write_text("5")  # resets the peak
        segment_video(clip, tiny_run, tmp_path / "out", stage="image")
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024

    # Both are longer than the queue of the encoder, whose length follows the machine.
    peak(100)
    short, long = peak(100), peak(600)
    # MB; 500 frames are 360 MB of pixels and 120 MB of labels, but 1 MB of slots. Peaks differ by up to 50 by chance.
    assert long - short < 90


def test_attention_is_held_once(tmp_path, tiny_run, monkeypatch):
    """Memory beyond slots and attention is that of a short video. 24x36 patches, 32 slots: 55 kB a frame."""

    def encode(backbone, frames, precision):  # what the backbone takes for a batch would hide the rest
        return (torch.zeros(1) for _ in frames)

    monkeypatch.setattr("interpreter.methods.interpreter.segmenter.encode", encode)
    segmenter = Segmenter.from_run(tiny_run, "image")
    segmenter.grid = (24, 36)
    segmenter._draw_image_slots = lambda features, _: (
        torch.rand(len(features), 32, 16),
        torch.rand(len(features), 864, 32),
    )

    def beyond(frames):
        video = open_video(make_clip(tmp_path / f"{frames}.mp4", frames))
        peak = peak_bytes(lambda: sum(1 for _ in SegmentedVideo(video, segmenter.segment(video)).labels()), "cpu")
        return peak - (2 * 864 * 32 + 4 * 32 * 16) * frames

    assert beyond(256) < 1.1 * beyond(64)  # held twice, the attention alone would double it


def test_a_video_that_changes_while_it_is_encoded_is_an_error(tmp_path, tiny_run):
    segmenter = Segmenter.from_run(tiny_run, "image")
    for frames in (4, 6):
        video = open_video(make_clip(tmp_path / "clip.mp4", frames=5))
        assert video.num_frames == 5
        make_clip(tmp_path / "clip.mp4", frames)
        with pytest.raises(ValueError, match=r"clip.mp4 changed while it was"):
            segmenter.segment(video)


def mistakes():
    """name -> (make(tmp_path, tiny_run, image_run) -> the arguments, what the line must say)."""

    def with_file(name, content):
        def make(path, run, image_run):
            (path / name).write_bytes(content)
            return [path / name, "--run", run, "--out", path / "out"]

        return make

    def truncated(path, run, image_run):
        clip = make_clip(path / "cut.mp4", frames=30)
        clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
        return [clip, "--run", run, "--out", path / "out"]

    def with_clip(*options):
        def make(path, run, image_run):
            clip = make_clip(path / "clip.mp4", frames=2)
            places = {"CLIP": clip, "RUN": run, "PATH": path, "OUT": path / "out"}
            return [clip, *(places.get(option, option) for option in options)]

        return make

    def image_only(path, run, image_run):
        return [make_clip(path / "clip.mp4", frames=2), "--run", image_run(), "--out", path / "out"]

    def onto_input(path, run, image_run):
        folder = make_folder(path / "frames")
        return [folder, "--run", run, "--out", folder]

    def onto_overlay(path, run, image_run):
        return [make_clip(path / "overlay.mp4", frames=2), "--run", run, "--out", path]

    def onto_truth(path, run, image_run):
        (path / "Annotations" / "clip").mkdir(parents=True)
        return [make_clip(path / "clip.mp4", frames=2), "--run", run, "--out", path]

    return {
        "no such file": (lambda p, run, _: [p / "no.mp4", "--run", run, "--out", p / "out"], "no such video file"),
        "empty file": (with_file("empty.mp4", b""), "empty"),
        "text file": (with_file("text.mp4", b"this is no video\n" * 40), "no video"),
        "truncated file": (truncated, "truncated"),
        "empty folder": (lambda p, run, _: [p, "--run", run, "--out", p / "out"], "no jpg, png"),
        "no run": (with_clip("--run", "no-run", "--out", "OUT"), "no run directory at no-run"),
        "file as run": (with_clip("--run", "CLIP", "--out", "OUT"), "clip.mp4"),
        "file as out": (with_clip("--run", "RUN", "--out", "CLIP"), "is a file; give a directory"),
        "image stage only": (image_only, "train --stage video --run"),
        "out is the input": (onto_input, "would overwrite"),
        "out holds the input": (onto_overlay, "would overwrite"),
        "out holds annotations": (onto_truth, "not from this command"),
        "frame size": (with_clip("--run", "RUN", "--out", "OUT", "--frame-size", "60", "90"), "--frame-size 64 96"),
        "alpha": (with_clip("--run", "RUN", "--out", "OUT", "--alpha", "2"), "between 0 and 1"),
    }


@pytest.mark.parametrize("mistake", mistakes())
def test_mistakes_are_one_clear_line(tmp_path, tiny_run, image_run, capsys, mistake):
    make, words = mistakes()[mistake]
    arguments = make(tmp_path, tiny_run, image_run)
    before = sorted(tmp_path.rglob("*"))
    line = fail(arguments, capsys)
    assert words in line
    assert sorted(tmp_path.rglob("*")) == before


def test_run_without_video_stage_segments_frames(tmp_path, image_run):
    found = segment_video(make_clip(tmp_path / "clip.mp4", frames=2), image_run(), tmp_path / "out", stage="image")
    assert found.segmentation.video_slots is None
    assert read_annotations(tmp_path / "out", "clip").max() <= found.segmentation.num_segments


def test_video_that_changes_meanwhile_is_refused(tmp_path):
    video = open_video(make_clip(tmp_path / "clip.mp4", frames=5))
    found = invented(video)
    for frames in (3, 7):
        make_clip(tmp_path / "clip.mp4", frames=frames)
        with pytest.raises(ValueError, match="changed while it was"):
            found.write(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_more_segments_than_a_palette_holds_are_refused(tmp_path):
    video = open_video(make_clip(tmp_path / "clip.mp4", frames=1))
    with pytest.raises(ValueError, match="255 segments"):
        invented(video, segments=255).write(tmp_path / "out")


def test_unknown_option_is_a_usage_error(tiny_run, capsys):
    with pytest.raises(SystemExit) as left:
        segment.main(["clip.mp4", "--run", str(tiny_run), "--out", "out", "--sed", "1"])
    assert left.value.code == 2
    assert "--sed" in capsys.readouterr().err


def test_importing_the_package_stays_light():
    code = "import sys, interpreter; assert 'torch' not in sys.modules; interpreter.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'interpreter' has no attribute 'nothing'" in done.stderr


def test_images_that_are_no_frames_are_named(tmp_path, capsys):
    folder = make_folder(tmp_path / "frames [x]")
    Image.new("RGB", (9, 9)).save(folder / "cover [x].jpg")
    found = invented(open_video(folder))
    assert len(found.video) == 4
    found.write(tmp_path / "out")
    segment._print_report(found, tmp_path / "out", "video")
    assert "left out: 1 .jpg not numbered like the frames (cover [x].jpg)" in capsys.readouterr().out
