"""The command segment and segment_video: options, errors, signals and memory."""

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from interpreter import SegmentedVideo, method_options, segment, segment_video
from interpreter.commands import run_command
from interpreter.data import open_video
from interpreter.segmentation import FILES, Segmentation

from .clips import SOURCES, make_clip, make_folder, read_annotations


def fail(arguments, capsys):
    """Run the command, which must fail with one line; returns it."""
    with pytest.raises(SystemExit) as left:
        run_command(lambda: segment.main([str(a) for a in arguments]))
    assert left.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("stage", ["video", "image"])
@pytest.mark.parametrize("source", SOURCES)
def test_command_segments_any_video(tmp_path, tiny_run, source, stage, capsys):
    path, out = SOURCES[source](tmp_path), tmp_path / "new" / "out"
    arguments = [str(path), "--run", str(tiny_run), "--out", str(out), "--stage", stage]
    assert segment.main(arguments) == 0
    printed = capsys.readouterr().out
    segmented = segment_video(path, tiny_run, stage=stage)
    video = segmented.video
    np.testing.assert_array_equal(read_annotations(out, video.name), np.stack(list(segmented.labels())) + 1)
    assert f"{video.name}: {len(video)} frames of {video.height}x{video.width}" in printed
    assert all(str(out / name) in printed for name in (f"Annotations/{video.name}", *FILES))


def test_same_seed_same_files_another_seed_other_slots(tmp_path, tiny_run):
    clip = make_clip(tmp_path / "clip.mp4", frames=5)
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        segment_video(clip, tiny_run, tmp_path / out, seed=seed)
    a, b, c = ((tmp_path / out / "slots.safetensors").read_bytes() for out in "abc")
    assert a == b
    assert a != c
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize("stage", ["video", "image"])
def test_edges_are_guided_unless_told_otherwise(tmp_path, tiny_run, stage):
    clip = make_clip(tmp_path / "clip.mp4", frames=3)
    maps = {}
    for out, options in {"default": (), "guided": ("--edges", "guided"), "none": ("--edges", "none")}.items():
        arguments = [clip, "--run", tiny_run, "--out", tmp_path / out, "--stage", stage, "--seed", 1, *options]
        segment.main([str(argument) for argument in arguments])
        maps[out] = read_annotations(tmp_path / out, "clip") - 1
    np.testing.assert_array_equal(maps["default"], maps["guided"])
    segmented = segment_video(clip, tiny_run, stage=stage, seed=1)
    segmentation = segmented.segmentation
    np.testing.assert_array_equal(maps["none"], segmentation.labels(size=(48, 64)))
    guided = segmentation.label_maps((48, 64), segmented.video.frames())
    np.testing.assert_array_equal(maps["guided"], np.stack([m.labels for m in guided]))
    with pytest.raises(ValueError, match="edges 'sharp': choose from guided, none"):
        segment_video(clip, tiny_run, edges="sharp")


def test_central_square_is_segmented_like_a_clip_of_that_square(tmp_path, tiny_run):
    clip = make_folder(tmp_path / "clip", frames=3)
    square, video = tmp_path / "square", open_video(clip)
    left, side = (video.width - video.height) // 2, video.height
    square.mkdir()
    for t, frame in enumerate(video.frames()):
        Image.fromarray(frame[:, left : left + side]).save(square / f"{t:05d}.png")
    size = ["--frame-size", "64", "64"]
    segment.main([str(clip), "--run", str(tiny_run), "--out", str(tmp_path / "a"), "--crop", "central", *size])
    segment.main([str(square), "--run", str(tiny_run), "--out", str(tmp_path / "b"), *size])
    np.testing.assert_array_equal(read_annotations(tmp_path / "a", "clip"), read_annotations(tmp_path / "b", "square"))
    with pytest.raises(ValueError, match=r"--crop central takes squares, which --frame-size 64 96 would distort"):
        segment_video(clip, tiny_run, crop="central", frame_size=(64, 96))
    with pytest.raises(ValueError, match="crop 'random': choose from none, central"):
        segment_video(clip, tiny_run, crop="random")


def test_frame_size_sets_the_patch_grid(tmp_path, tiny_run):
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    assert segment_video(clip, tiny_run).segmentation.grid == (4, 6)
    segmented = segment_video(clip, tiny_run, frame_size=(96, 80))
    assert segmented.segmentation.grid == (6, 5)
    assert next(segmented.labels()).shape == (48, 64)
    assert next(segmented.labels((11, 13))).shape == (11, 13)


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

    def heed_interrupts():  # background jobs of a shell start with these signals ignored
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

    # Both are longer than the queue of the encoder, whose length depends on the machine.
    peak(100)
    short, long = peak(100), peak(600)
    # MB; 500 frames are 360 MB of pixels and 120 MB of labels, but 1 MB of slots. Peaks differ by up to 50 by chance.
    assert long - short < 90


def mistakes():
    """name -> (make(tmp_path, tiny_run, image_run) -> the arguments, text of the error)."""

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
        return [
            make_clip(path / "clip.mp4", frames=2),
            "--run",
            image_run(),
            "--out",
            path / "out",
            "--association",
            "learned",
        ]

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
        "neither run nor method": (with_clip("--out", "OUT"), "give --run DIR"),
        "no run": (with_clip("--run", "no-run", "--out", "OUT"), "no run directory at no-run"),
        "file as run": (with_clip("--run", "CLIP", "--out", "OUT"), "clip.mp4"),
        "file as out": (with_clip("--run", "RUN", "--out", "CLIP"), "is a file; give a directory"),
        "image stage only": (image_only, "train --stage video --run"),
        "out is the input": (onto_input, "would overwrite"),
        "out holds the input": (onto_overlay, "would overwrite"),
        "out holds annotations": (onto_truth, "not from this command"),
        "frame size": (with_clip("--run", "RUN", "--out", "OUT", "--frame-size", "60", "90"), "--frame-size 64 96"),
        "too many segments": (with_clip("--run", "RUN", "--out", "OUT", "--num-slots", "300"), "can have at most 254"),
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
    segmented = segment_video(make_clip(tmp_path / "clip.mp4", frames=2), image_run(), tmp_path / "out", stage="image")
    assert "video_slots" not in segmented.segmentation.tensors
    assert read_annotations(tmp_path / "out", "clip").max() <= segmented.segmentation.num_segments


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
    segmented = SegmentedVideo(open_video(folder), Segmentation((1, 1), torch.ones(4, 1, 1)))
    assert len(segmented.video) == 4
    segment.print_report(segmented, np.ones(1), tmp_path / "out")
    assert "left out: 1 .jpg not numbered like the frames (cover [x].jpg)" in capsys.readouterr().out


def test_segments_without_pixels_are_named(tmp_path, capsys):
    segmented = SegmentedVideo(open_video(make_folder(tmp_path / "frames")), Segmentation((1, 1), torch.ones(4, 1, 4)))
    segment.print_report(segmented, np.array([0.5, 0.0, 0.5, 0.0]), tmp_path / "out")
    assert "empty segments, without a pixel in any frame: 2, 4" in capsys.readouterr().out
    segment.print_report(segmented, np.array([0.5, 0.1, 0.3, 0.1]), tmp_path / "out")
    assert "empty segments" not in capsys.readouterr().out


@pytest.mark.parametrize(("options", "words"), [((), "--merge-threshold"), (("--run", "RUN"), "--stage {image,video}")])
def test_help_lists_the_settings_of_the_method(tiny_run, options, words, capsys):
    with pytest.raises(SystemExit) as left:
        segment.main([str(tiny_run) if option == "RUN" else option for option in (*options, "--help")])
    assert left.value.code == 0
    assert words in capsys.readouterr().out


def test_settings_are_keywords_of_segment_video(tmp_path, tiny_run):
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    learned = partial(segment_video, clip, tiny_run, association="learned")
    assert [learned(merge_threshold=x).segmentation.num_segments for x in (0.0, 2.0)] == [3, 1]
    assert learned(merge_threshold=0.0, num_slots=6).segmentation.num_segments == 6
    assert segment_video(clip, tiny_run, num_slots=6).segmentation.num_segments == 6
    with pytest.raises(ValueError, match="--num-slots must be at least 1, got 0"):
        segment_video(clip, tiny_run, num_slots=0)
    with pytest.raises(ValueError, match="no meaning with --stage image"):
        segment_video(clip, tiny_run, stage="image", merge_threshold=0.1)


@pytest.mark.parametrize("edges", ["guided", "none"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_clip_is_opened_once_and_streamed_twice(tmp_path, tiny_run, kind, edges, monkeypatch):
    """Once to encode it, and once to draw the overlay and guide the edges. Counting frames decodes nothing."""
    clip = make_clip(tmp_path / "clip.mp4", frames=3) if kind == "file" else make_folder(tmp_path / "frames")
    opened, streamed = [], []
    open_once, video_type = segment.open_video, type(open_video(clip))
    stream = video_type._stream
    monkeypatch.setattr(segment, "open_video", lambda path, name: opened.append(path) or open_once(path, name))
    monkeypatch.setattr(video_type, "_stream", lambda self, size: streamed.append(size) or stream(self, size))
    segment.main([str(clip), "--run", str(tiny_run), "--out", str(tmp_path / "out"), "--edges", edges])
    assert opened == [clip]
    assert streamed == [(64, 96), None]


def test_another_method_than_that_of_the_run_is_refused(tmp_path, tiny_run, monkeypatch):
    monkeypatch.setitem(method_options.METHODS, "other", method_options.METHODS["interpreter"])
    with pytest.raises(ValueError, match="is a run of the method interpreter, not of other; leave --method out"):
        segment.main([str(tmp_path), "--run", str(tiny_run), "--out", "out", "--method", "other"])
