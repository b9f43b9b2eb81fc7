"""``segment -``: labels are written window by window, and remain if the stream breaks off."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from interpreter import segment, segment_stream, segment_video
from interpreter.commands import run_command
from interpreter.data.video.frames import HeldFrames
from interpreter.data.video.pipe import LiveVideo
from interpreter.files import write_text
from interpreter.interrupts import Interrupted
from interpreter.locks import Lock, LockedError
from interpreter.methods.base import Segmenter
from interpreter.streaming import STREAM_FILES

from .clips import make_clip, read_annotations
from .streams import LIVE, piped, sent, stream, unseekable
from .videos import moving, save_frames

WAYS = {
    "features": {"masks_from": "slots"},
    "learned": {"association": "learned", "merge_threshold": 0.0, "num_slots": 6},
    "image": {"stage": "image"},
}


def frames_of(content):
    with LiveVideo(unseekable(content), ahead=9) as live:
        return np.stack([frame.pixels for frame in live.take(1000)])


def segment_standard_input(content, arguments, monkeypatch):
    """Run the command on these bytes; returns its exit status."""
    words = [str(argument) for argument in ("-", *arguments)]
    with piped(content) as file:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file, closed=False, isatty=lambda: False))
        with pytest.raises(SystemExit) as left:
            run_command(lambda: segment.main(words))
    return left.value.code


def require_files(out, count, size):
    """All files are complete and agree; returns the label maps, counted from 1."""
    assert sorted(path.name for path in out.iterdir()) == sorted(["Annotations", *STREAM_FILES])
    labels = read_annotations(out, "stream")
    assert labels.shape == (count, *size)
    with av.open(str(out / "overlay.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == count
    covered = np.zeros(labels.shape, int)
    entries = json.loads((out / "segments.json").read_text())
    for value, entry in zip(np.unique(labels), entries, strict=True):
        masks = [np.zeros(size, bool) if c is None else coco.decode(c) > 0 for c in entry["segmentations"]]
        np.testing.assert_array_equal(masks, labels == value)
        covered += masks
    assert (covered == 1).all()
    listed = {"id": 1, "name": "stream", "height": size[0], "width": size[1], "length": count}
    assert json.loads((out / "videos.json").read_text())["videos"] == [listed]
    assert {entry["video_id"] for entry in entries} == {1}
    Image.open(out / "preview.png").load()
    return labels


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LIVE)
def test_first_window_is_labelled_like_a_file(tmp_path, tiny_run, kind, way):
    content, settings = stream(kind, moving(9)), WAYS[way]
    with piped(content) as file:
        result = segment_stream(file, tiny_run, tmp_path / "out", window=4, seed=2, **settings)
    assert (result.frames, result.cut, result.window) == (9, "", 4)
    labels = require_files(tmp_path / "out", 9, (64, 96))
    folder = save_frames(tmp_path / "frames", frames_of(content)[:4], "{:05d}.png")
    whole = segment_video(folder, tiny_run, seed=2, **settings)
    np.testing.assert_array_equal(labels[:4], np.stack(list(whole.labels())) + 1)
    assert json.loads((tmp_path / "out/stream.json").read_text()) == {
        "window": 4,
        "delay": 8,  # a tenth of a second and five frames, which FFmpeg reads before the first
        "fps": "24",
        "size": [64, 96],
        "edges": "guided",
        "frames": 9,
        "cut": None,
    }


def test_a_scene_at_rest_keeps_its_numbers(tmp_path, tiny_run):
    scene = np.repeat(moving(1), 24, axis=0)
    with piped(stream("y4m", scene)) as file:
        segment_stream(file, tiny_run, tmp_path / "out", window=4, edges="none", **WAYS["features"])
    labels = read_annotations(tmp_path / "out", "stream")
    assert len(np.unique(labels[0])) > 1
    assert all((window == labels[:4]).all() for window in labels.reshape(6, 4, 64, 96))


def test_windows_are_as_long_as_in_training_by_default(tmp_path, tiny_run):
    for way in ("features", "learned"):
        with piped(stream("y4m", moving(7))) as file:
            assert segment_stream(file, tiny_run, tmp_path / "out", **WAYS[way]).window == 5


def test_central_square_is_segmented_like_a_file(tmp_path, tiny_run):
    content = stream("mkv", moving(5))
    options = {"crop": "central", "frame_size": (64, 64), "masks_from": "slots"}
    with piped(content) as file:
        segment_stream(file, tiny_run, tmp_path / "out", window=5, **options)
    folder = save_frames(tmp_path / "frames", frames_of(content), "{:05d}.png")
    expected = np.stack(list(segment_video(folder, tiny_run, **options).labels())) + 1
    np.testing.assert_array_equal(require_files(tmp_path / "out", 5, (64, 64)), expected)


@pytest.mark.parametrize("kind", LIVE)
def test_cut_stream_keeps_what_came(tmp_path, tiny_run, kind, monkeypatch, capsys):
    content, out = stream(kind, moving(20)), tmp_path / "out"
    content = content[: int(0.6 * len(content))]
    count = len(frames_of(content))
    window = next(length for length in (9, 10, 11) if count % length)  # the last window is shorter
    assert segment_standard_input(content, ["--run", tiny_run, "--out", out, "--window", window], monkeypatch) == 1
    require_files(out, count, (64, 96))
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].endswith(f"The stream was cut after {count} frames, which are labelled in {out}")
    assert f"labels are late by at most {window + 1} frames ({(window + 1) / 24:.2f} s" in printed.err
    assert f"stream: {count} frames of 64x96" in printed.out
    assert json.loads((out / "stream.json").read_text())["cut"].startswith("standard input: ")


def test_change_of_size_keeps_the_frames_before(tmp_path, tiny_run, monkeypatch, capsys):
    content = stream("bare", moving(6)) + stream("bare", moving(6, 48, 64))
    assert segment_standard_input(content, ["--run", tiny_run, "--out", tmp_path / "out"], monkeypatch) == 1
    require_files(tmp_path / "out", 6, (64, 96))
    assert "the size changes from 96x64 to 64x48" in capsys.readouterr().err


@contextmanager
def running(out, run, *options):
    """The command, reading a pipe that the test fills."""
    command = [sys.executable, "-m", "interpreter.segment", "-", "--run", run, "--out", out, *options]

    def heed_interrupts():  # background jobs of a shell start with these signals ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        [str(argument) for argument in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "400"},
        preexec_fn=heed_interrupts,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(path, process):
    until = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["mkv", "mpegts", "y4m"])  # WebM's encoder starts late
def test_labels_come_with_the_stated_delay(tmp_path, tiny_run, kind):
    """The writer sends the first frame and as many more as the delay, then waits. Labels are written nevertheless."""
    pieces, out = sent(kind, moving(30)), tmp_path / "out"
    with running(out, tiny_run, "--window", 6) as process:
        delay = 8
        for piece in pieces[: delay + 1]:
            process.stdin.write(piece)
            process.stdin.flush()
        wait_for(out / "Annotations/stream/00000.png", process)
        assert json.loads((out / "stream.json").read_text())["delay"] == delay
        process.stdin.write(b"".join(pieces[delay + 1 : 20]))
        process.stdin.flush()
        wait_for(out / "Annotations/stream/00011.png", process)  # 12 + 8 frames were sent
        assert not (out / "overlay.mp4").exists()
        process.stdin.write(b"".join(pieces[20:]))
        process.stdin.close()
        assert process.wait() == 0
    require_files(out, 30, (64, 96))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_labels_what_came(tmp_path, tiny_run, number):
    pieces, out = sent("y4m", moving(30)), tmp_path / "out"
    with running(out, tiny_run, "--window", 4) as process:
        process.stdin.write(b"".join(pieces[:14]))  # three windows, and two frames of a fourth
        process.stdin.flush()
        wait_for(out / "Annotations/stream/00011.png", process)
        process.send_signal(number)
        assert process.wait() == 128 + number
        errors = process.stderr.read().decode()
    require_files(out, 14, (64, 96))
    assert f"stopped by {signal.Signals(number).name}. The stream was cut after 14 frames" in errors
    assert "Traceback" not in errors


def test_killed_command_leaves_whole_label_maps_and_the_next_replaces_them(tmp_path, tiny_run):
    pieces, out = sent("y4m", moving(30)), tmp_path / "out"
    with running(out, tiny_run, "--window", 4) as process:
        process.stdin.write(b"".join(pieces[:14]))
        process.stdin.flush()
        wait_for(out / "Annotations/stream/00008.png", process)
        process.kill()
        process.wait()
    for path in (out / "Annotations/stream").glob("[0-9]*.png"):
        assert np.asarray(Image.open(path)).shape == (64, 96)
    assert not (out / "overlay.mp4").exists()
    assert json.loads((out / "stream.json").read_text())["frames"] is None
    with piped(stream("mkv", moving(3, 48, 64))) as file:
        segment_stream(file, tiny_run, out)
    require_files(out, 3, (48, 64))


def test_earlier_stream_stays_until_a_frame_comes(tmp_path, tiny_run):
    out = tmp_path / "out"
    with piped(stream("y4m", moving(3))) as file:
        segment_stream(file, tiny_run, out)
    with piped(b"no video" * 99) as file, pytest.raises(ValueError, match="it is no video"):
        segment_stream(file, tiny_run, out)
    require_files(out, 3, (64, 96))


def test_annotations_of_another_command_are_refused(tmp_path, tiny_run):
    clip = make_clip(tmp_path / "stream.mp4", frames=2)
    segment_video(clip, tiny_run, tmp_path / "out")
    with (
        piped(stream("y4m", moving(2))) as file,
        pytest.raises(ValueError, match="contains the files of a segmented video; give another"),
    ):
        segment_stream(file, tiny_run, tmp_path / "out")
    assert len(read_annotations(tmp_path / "out", "stream")) == 2
    write_text(tmp_path / "other" / "stream.json", "{}")
    lock = Lock(tmp_path / "other" / ".stream.lock")
    assert lock.take()
    with piped(stream("y4m", moving(2))) as file, pytest.raises(LockedError, match="is in use by process"):
        segment_stream(file, tiny_run, tmp_path / "other")
    lock.release()


def test_full_disk_keeps_the_label_maps(tmp_path, tiny_run, small_disk, monkeypatch, capsys):
    out = small_disk("150k") / "out"
    arguments = ["--run", tiny_run, "--out", out, "--window", 4, "--stage", "image"]
    assert segment_standard_input(stream("y4m", moving(120)), arguments, monkeypatch) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    count = len(list((out / "Annotations/stream").glob("[0-9]*.png")))
    assert 4 < count < 120
    assert f"the disk is full after {count} frames, whose label maps are in {out}/Annotations/stream" in errors[0]


def test_error_while_segmenting_completes_the_files(tmp_path, tiny_run, monkeypatch):
    from interpreter.methods.interpreter.online import OnlineSegmenter

    add, out = OnlineSegmenter.add, tmp_path / "out"

    def fail_later(self, video):
        if (out / "Annotations/stream/00007.png").exists():
            raise RuntimeError("out of memory")
        return add(self, video)

    monkeypatch.setattr(OnlineSegmenter, "add", fail_later)
    with piped(stream("y4m", moving(20))) as file, pytest.raises(RuntimeError, match="out of memory"):
        segment_stream(file, tiny_run, out, window=4)
    require_files(out, 8, (64, 96))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--masks-from", "tokens"], "--masks-from tokens needs all frames at once"),
        (["--window", "0"], "--window must be at least 1"),
        (["--num-slots", "300"], "a palette PNG can have at most 254"),
        (["--alpha", "2"], "between 0 and 1"),
        (["--formats", "coco"], "--formats is an option of files and folders"),
        (["--crop", "central"], "--crop central takes squares"),
    ],
)
def test_what_a_stream_cannot_have_is_one_line(tmp_path, tiny_run, options, words, monkeypatch, capsys):
    arguments = ["--run", tiny_run, "--out", tmp_path / "out", *options]
    assert segment_standard_input(stream("y4m", moving(2)), arguments, monkeypatch) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not (tmp_path / "out").exists()


def test_other_methods_are_refused(tmp_path, monkeypatch, capsys):
    arguments = ["--method", "cluster", "--out", tmp_path / "out"]
    assert segment_standard_input(b"", arguments, monkeypatch) == 1
    assert "a live stream needs --run DIR, a trained run of the method interpreter" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a live stream needs a run of the method interpreter"):
        Segmenter.online(SimpleNamespace())


def test_window_is_refused_for_a_file(tmp_path, tiny_run):
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    with pytest.raises(ValueError, match="--window is an option of live streams"):
        segment.main([str(clip), "--run", str(tiny_run), "--out", str(tmp_path / "out"), "--window", "4"])


def test_terminal_is_no_stream(tmp_path, tiny_run):
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "interpreter.segment", "-", "--run", str(tiny_run), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, stdin=terminal, capture_output=True, text=True, env={**os.environ, "COLUMNS": "400"})
    os.close(keyboard)
    os.close(terminal)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard input is a terminal, not a stream: pipe a video into it")


def test_interrupt_before_the_first_frame_leaves_nothing(tmp_path, tiny_run):
    reading, writing = os.pipe()

    class Asking:
        """A pipe; a signal arrives while nothing is sent."""

        def fileno(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return reading

        def read1(self, size):
            return os.read(reading, size)

    with pytest.raises(Interrupted):
        segment_stream(Asking(), tiny_run, tmp_path / "out")
    os.close(reading)
    os.close(writing)
    assert not (tmp_path / "out").exists()


def test_held_frames_are_a_video():
    frames = moving(5)
    video = HeldFrames(list(frames))
    video.check()
    np.testing.assert_array_equal(video.read([3, 0]), frames[[3, 0]])
    assert [frame.shape for frame in video.frames((8, 12))] == [(8, 12, 3)] * 5
