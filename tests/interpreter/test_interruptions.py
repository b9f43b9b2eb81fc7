"""Runs that are interrupted or shared: exit statuses, files that remain, and locks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from PIL import Image

from interpreter import cache, evaluate, segment, train, training
from interpreter.data import open_video
from interpreter.data.__main__ import main as data
from interpreter.data.scenes import generate as synthetic
from interpreter.data.scenes import generate_scenes
from interpreter.engine.checkpoint import load_checkpoint
from interpreter.engine.records import RunLog
from interpreter.evaluation import output
from interpreter.interrupts import Interrupted, StopRequest
from interpreter.locks import Lock, LockedError

from .runs import TWO_RANKS, curve, start, wait_for_step
from .videos import digest

LONG = ["--steps", "100000", "--checkpoint-every", "100000"]


def interrupt(*_, **__):
    """A function that a test inserts at the point where the signal arrives."""
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("the signal did not interrupt")


def main_thread_is_in(function):
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


@pytest.fixture
def interruptible():
    with StopRequest(at_once=True) as stop:
        yield stop


def test_a_run_directory_has_one_trainer_at_a_time(image_run, image_options, video_options):
    run = image_run()
    shutil.rmtree(run / "image")
    process = start(["--run", str(run), *image_options, *LONG])
    wait_for_step(process, "image", 1)
    before = (run / "config.json").read_bytes()
    for options in (image_options, video_options):
        with pytest.raises(
            LockedError, match=rf"{run} is in use by process {process.pid} since .* \(\S*python"
        ) as caught:
            train.main(["--run", str(run), *options])
        assert "interpreter.train --run" in str(caught.value)
        assert str(caught.value).endswith(". Wait for it, stop it with kill, or give another --run")
    assert (run / "config.json").read_bytes() == before
    process.kill()
    process.communicate()
    (run / "samples" / ".image-000000.png.0.tmp").write_bytes(b"half")
    train.main(["--run", str(run), *image_options])
    assert load_checkpoint(run / "image").step == 3
    assert not list(run.rglob(".*"))


def test_a_run_that_cannot_begin_leaves_no_directory(tmp_path, image_options):
    with pytest.raises(FileNotFoundError, match="absent"):
        train.main(["--run", str(tmp_path / "new" / "run"), *image_options, "--backbone", str(tmp_path / "absent")])
    assert not (tmp_path / "new").exists()


def test_a_later_stage_refuses_an_unfinished_one(image_run, image_options, video_options, capfd):
    run = image_run()
    config = json.loads((run / "config.json").read_text())
    config["stages"]["image"]["optim"]["steps"] = 2000  # as after a signal, or with a larger --steps
    (run / "config.json").write_text(json.dumps(config))
    text = f"the image stage of {run} is unfinished: step 3 of 2000"
    for command in (train.main, cache.main):
        options = video_options if command is train.main else []
        with pytest.raises(ValueError, match=f"{text}. Rerun its training command .* --allow-unfinished"):
            command(["--run", str(run), *options])
    assert not (run / "video").exists()
    capfd.readouterr()
    train.main(["--run", str(run), *video_options, "--allow-unfinished"])
    assert text in capfd.readouterr().err
    train.main(["--run", str(run), *video_options, "--steps", "4", "--allow-unfinished"])
    train.main(["--run", str(run), *image_options])
    train.main(["--run", str(run), *video_options, "--steps", "5"])  # the same weights, finished now
    assert load_checkpoint(run / "video").step == 5


def test_use_of_an_unfinished_run_says_so(tmp_path, tiny_run, capfd):
    run, out = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "out"
    config = json.loads((run / "config.json").read_text())
    config["stages"]["video"]["optim"]["steps"] = 4
    (run / "config.json").write_text(json.dumps(config))
    frames = tmp_path / "frames"
    frames.mkdir()
    for t in range(2):
        Image.fromarray(np.full((48, 64, 3), 90 * t, np.uint8)).save(frames / f"{t}.png")
    segment.main([str(frames), "--run", str(run), "--out", str(out), "--association", "learned"])
    assert capfd.readouterr().err.count(f"the video stage of {run} is unfinished: step 3 of 4") == 1
    segment.main([str(frames), "--run", str(run), "--out", str(out), "--stage", "image"])
    assert "unfinished" not in capfd.readouterr().err


def test_signal_interrupts_before_the_first_step_then_saves(image_run, image_options, monkeypatch):
    run = image_run()
    shutil.rmtree(run / "image")
    arguments = ["--run", str(run), *image_options, *LONG, "--sample-every", "1"]
    drawn, sample_grid = [], training.sample_grid

    def draw(*arguments):
        drawn.append(len(drawn))
        if len(drawn) in (1, 4):
            interrupt()
        return sample_grid(*arguments)

    monkeypatch.setattr(training, "sample_grid", draw)
    with StopRequest(at_once=True) as stop, pytest.raises(Interrupted):
        train.main(arguments)
    assert stop.number == signal.SIGTERM
    assert load_checkpoint(run / "image") is None
    with StopRequest(at_once=True) as stop, pytest.raises(Interrupted) as caught:
        train.main(arguments)  # draws at steps 0 and 1, and is interrupted while it draws at 2
    assert (stop.number, caught.value.number) == (0, signal.SIGTERM)
    assert load_checkpoint(run / "image").step == 2
    assert not (run / "samples" / "image-000002.png").exists()
    train.main([*arguments, "--steps", "3"])
    assert (run / "samples" / "image-000002.png").exists()  # nothing is missing in the end
    assert [record["step"] for record in curve(run, "image")] == [1, 2, 3]


def test_a_second_signal_ends_at_once():
    code = (
        "import signal, time; from interpreter.interrupts import *\n"
        "with StopRequest() as stop:\n"
        "    signal.raise_signal(15); signal.raise_signal(15)  # one Ctrl-C may come twice\n"
        "    print(stop.number, flush=True); stop._since -= SAME_SIGNAL_SECONDS; signal.raise_signal(15)\n"
        "    print('still there')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "15\n", "")


def test_nohup_is_respected():
    code = (
        "import signal; from interpreter.interrupts import *; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with StopRequest(at_once=True): signal.raise_signal(signal.SIGHUP); print('still there')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "still there\n"


@pytest.mark.parametrize("command", ["train", "data.synthetic"])
def test_help_for_a_reader_that_leaves_is_quiet(command):
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", f"interpreter.{command}", "--help"], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert process.returncode in (0, 141)
    assert process.stderr == b""


def test_training_whose_reader_leaves_saves_and_is_quiet(image_run, image_options):
    run = image_run()
    shutil.rmtree(run / "image")
    process = start(["--run", str(run), *image_options, *LONG])
    wait_for_step(process, "image", 1)
    process.stderr.close()
    assert process.wait(60) == 141
    assert load_checkpoint(run / "image").step == curve(run, "image")[-1]["step"]


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_training_whose_terminal_closes_saves(image_run, image_options):
    run = image_run()
    shutil.rmtree(run / "image")
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "interpreter.train", "--run", str(run), *image_options, *LONG],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    text = b""
    while b"loss" not in text:
        text += os.read(ours, 65536)
    assert b"nan" not in text
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert load_checkpoint(run / "image").step == curve(run, "image")[-1]["step"]


def test_the_progress_bar_shows_no_loss_before_there_is_one(tmp_path):
    with RunLog(tmp_path / "image", 0, 10, 4) as log:
        log.advance(1, 0.0)
        assert "loss" not in log.progress.tasks[0].fields["status"]
        log.record(2, {"loss": 0.5})
        log.advance(2, 0.0)
        assert log.progress.tasks[0].fields["status"].startswith("loss 0.5000  ")


@pytest.mark.slow
def test_two_ranks_that_get_a_signal_save_and_the_job_fails(image_run, image_options):
    run = image_run()
    shutil.rmtree(run / "image")
    job = start(["--run", str(run), *image_options, *LONG], TWO_RANKS)
    wait_for_step(job, "image", 1)
    ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if "interpreter.train" in p.cmdline()]
    second = next(p for p in ranks if p.environ()["RANK"] == "1")
    second.send_signal(signal.SIGTERM)  # one is enough: they agree
    _, text = job.communicate(timeout=120)
    assert job.returncode != 0
    assert text.count("stopped by SIGTERM. What is finished is saved.") == 1
    assert load_checkpoint(run / "image").step == curve(run, "image")[-1]["step"]


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGKILL, False)],
)
def test_interrupted_generation_leaves_nothing_behind(tmp_path, number, whole_group):
    command = [sys.executable, "-m", "interpreter.data.synthetic", "--root", str(tmp_path / "scenes")]
    command += ["--num-videos", "600", "--size", "160", "240", "--num-frames", "100", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    workers = []
    while len(workers) < 2 or not list((tmp_path / "scenes").glob("*/480p/.*.partial")):
        assert process.poll() is None
        time.sleep(0.05)
        workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number) if whole_group else process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert errors == f"stopped by {number.name}. What is finished is saved. Rerun the same command to continue.\n"
        assert not list((tmp_path / "scenes").rglob(".*"))


def test_killed_generation_is_completed_with_the_same_scenes(tmp_path):
    options = {"size": (48, 64), "num_frames": 3}
    generate_scenes(tmp_path / "whole", 3, workers=1, **options)
    generate_scenes(tmp_path / "killed", 1, workers=1, **options)
    half = tmp_path / "killed/Annotations_unsupervised/480p/.train-00009.partial"
    half.mkdir()  # of a video that is not requested again
    generate_scenes(tmp_path / "killed", 3, workers=2, **options)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert not half.exists()


def test_a_worker_ends_with_its_parent_whatever_it_renders(tmp_path):
    with synthetic._Worker(tmp_path, synthetic._Recipe(0, (32, 32), 100_000, "train")) as worker:
        worker._send("0")
        worker._process.stdin.close()  # as when the parent is gone
        worker._process.stdin = None
        assert worker._process.wait(60) == 0


def test_a_worker_that_dies_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("interpreter.data.scenes.generate._Worker._send", lambda self, line: self._process.kill())
    with pytest.raises(ChildProcessError, match="a process that renders scenes ended with status -9"):
        generate_scenes(tmp_path, 3, workers=2)


@pytest.mark.parametrize(
    "where", ["interpreter.data.convert.write_video", "interpreter.data.datasets.layout.Path.rename"]
)
def test_interrupted_conversion_continues(where, tmp_path, scenes, monkeypatch, interruptible):
    arguments = ["convert", "davis", "--root", str(scenes), "--split", "val", "--year", "2017"]
    assert data([*arguments, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupt)
        with pytest.raises(Interrupted):
            data([*arguments, "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").rglob(".*"))
    interruptible.number = 0
    assert data([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("phase", ["checking", "hashing", "verify"])
def test_interruption_does_not_wait_for_threads_that_only_read(
    phase, image_run, image_options, scenes, monkeypatch, interruptible
):
    training = (train.main, ["--run", str(image_run()), *image_options, "--steps", "4"])
    commands = {
        "checking": training,
        "hashing": training,
        "verify": (data, ["verify", "davis", "--root", str(scenes), "--year", "2017"]),
    }
    endless = threading.Event()

    def read(*_):
        while not main_thread_is_in("result"):  # it waits for the results of the threads
            if endless.wait(0.01):
                return  # another thread was first
        os.kill(os.getpid(), signal.SIGINT)
        assert endless.wait(60), "the interruption waited for this thread"

    places = {
        "checking": "interpreter.data.video.FrameFolder.check",
        "hashing": "interpreter.store.fill.read_content",
        "verify": "interpreter.data.verify._check",
    }
    monkeypatch.setattr(places[phase], read)
    command, arguments = commands[phase]
    started = time.monotonic()
    with pytest.raises(Interrupted):
        command(arguments)
    endless.set()
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("phase", ["score_dataset", "write_scores"])
@pytest.mark.usefixtures("interruptible")
def test_interrupted_evaluation_writes_everything_or_nothing(phase, tiny_run, scenes, tmp_path, monkeypatch):
    module = evaluate if phase == "score_dataset" else output
    function, out = getattr(module, phase), tmp_path / "out"

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)

    monkeypatch.setattr(module, phase, signalled)
    options = ["--root", str(scenes), "--split", "val", "--num-videos", "2", "--seeds", "0", "--baselines", "grid"]
    with pytest.raises(Interrupted):
        evaluate.main(["--run", str(tiny_run), *options, "--pictures", "0", "--out", str(out)])
    files = sorted(path.name for path in out.iterdir()) if out.exists() else []
    assert files == ([] if phase == "score_dataset" else ["report.html", "scores.json", "table.txt", "videos.csv"])


def test_two_that_segment_into_one_folder_end_right(tmp_path, tiny_run):
    videos = []
    for name, grey in (("a", 60), ("b", 120)):
        (tmp_path / name).mkdir()
        for t in range(4):
            Image.fromarray(np.full((48, 64, 3), grey + t, np.uint8)).save(tmp_path / name / f"{t}.png")
        videos.append(tmp_path / name)
    out = tmp_path / "out"
    dead = out / ".segment-dead"
    dead.mkdir(parents=True)
    (dead / ".lock").touch()
    alive = Lock(out / ".segment-alive" / ".lock")
    assert alive.take()
    with ThreadPoolExecutor(3) as pool:
        for job in [pool.submit(segment.segment_video, video, tiny_run, out) for video in (*videos, videos[0])]:
            job.result()
    assert not dead.exists()
    assert alive.path.exists()
    alive.release()
    alive.path.parent.rmdir()
    assert sorted(path.name for path in out.iterdir()) == sorted(("Annotations", *segment.FILES))
    assert sorted(path.name for path in (out / "Annotations").iterdir()) == ["a", "b"]
    assert open_video(out / "overlay.mp4").num_frames == 4


def test_signal_while_files_are_moved_lets_all_of_them_arrive(tmp_path, tiny_run, monkeypatch, interruptible):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((48, 64, 3), 60, np.uint8)).save(tmp_path / "a" / "0.png")
    rename = segment.Path.replace

    def replace(self, target):
        os.kill(os.getpid(), signal.SIGINT)
        return rename(self, target)

    monkeypatch.setattr(segment.Path, "replace", replace)
    with pytest.raises(Interrupted):
        segment.segment_video(tmp_path / "a", tiny_run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(("Annotations", *segment.FILES))


def test_lost_interruption_is_seen_by_the_next_request():
    with StopRequest(at_once=True):
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        with StopRequest() as stop:
            assert stop.number == signal.SIGTERM
