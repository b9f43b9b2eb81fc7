"""Runs that were stopped, killed or damaged resume bit for bit, in every mode."""

import contextlib
import os
import random
import shutil
import signal

import psutil
import pytest
import torch
from safetensors.torch import load_file

from interpreter.engine.checkpoint import checkpoints, load_checkpoint
from interpreter.interrupts import Interrupted, StopRequest
from interpreter.store.features import FeatureMaker
from interpreter.train import main

from .runs import STREAMED, TWO_RANKS, curve, finish, start, wait_for_step

STEPS = 60
LONG = ["--steps", str(STEPS), "--checkpoint-every", "7", "--log-every", "1", "--warmup-steps", "10"]


def assert_same_run(one, other, stage):
    """The same curve and the same last checkpoint, bit for bit."""
    assert curve(one, stage) == curve(other, stage)
    assert [record["step"] for record in curve(one, stage)] == list(range(1, STEPS + 1))
    name = f"checkpoint-{STEPS:08d}.safetensors"
    first, second = load_file(one / stage / name), load_file(other / stage / name)
    assert first.keys() == second.keys()
    assert any(key.startswith("optimizer.") for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def command(image_run, image_options, video_options):
    """command(stage, run) -> a new run's folder and the command line of a stage that trains for many steps."""

    def make(stage, name):
        run = image_run(name)
        if stage == "image":  # the stored features stay: encoding is tested by itself
            shutil.rmtree(run / "image")
        return run, ["--run", str(run), *(image_options if stage == "image" else video_options), *LONG]

    return make


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_run, image_options, video_options):
    """straight(stage) -> a run whose stage was trained to the end without interruption."""
    done = {}

    def make(stage):
        if stage not in done:
            run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("straight") / "run")
            shutil.rmtree(run / stage)
            main(["--run", str(run), *(image_options if stage == "image" else video_options), *LONG])
            done[stage] = run
        return done[stage]

    return make


@pytest.mark.parametrize("stage", ["image", "video"])
def test_killed_run_resumes_bit_for_bit(stage, command, straight):
    run, arguments = command(stage, "killed")
    moments = sorted(random.sample(range(3, STEPS - 15), 2))  # other moments in each run
    print("killed after steps", moments)
    for moment in moments:
        process = start(arguments)
        wait_for_step(process, stage, moment)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        newest = load_checkpoint(run / stage)
        assert newest is None or newest.step < STEPS
    main(arguments)
    assert_same_run(run, straight(stage), stage)
    assert not list(run.glob("*/.*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options", "launcher"),
    [
        ("video", ["--compile"], ()),
        ("image", [], TWO_RANKS),
        pytest.param("image", ["--compile"], (), marks=pytest.mark.gpu, id="captured image stage"),
        pytest.param("video", ["--compile"], (), marks=pytest.mark.gpu, id="captured video stage"),
    ],
)
def test_killed_run_of_another_mode_resumes_bit_for_bit(stage, options, launcher, command):
    """Eager steps on stored features and slots are tested above, steps on streamed ones below."""
    whole, arguments = command(stage, "whole")
    finish(start([*arguments, *options], launcher))
    run, arguments = command(stage, "killed")
    process = start([*arguments, *options], launcher)
    wait_for_step(process, stage, random.randrange(8, STEPS - 20))
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        with contextlib.suppress(psutil.NoSuchProcess):  # torchrun's agent may have ended it already
            each.kill()
    process.communicate()
    assert 7 <= load_checkpoint(run / stage).step < STEPS
    finish(start([*arguments, *options], launcher))
    assert_same_run(run, whole, stage)


@pytest.mark.parametrize(("stage", "number"), [("image", signal.SIGTERM), ("video", signal.SIGINT)])
def test_signal_saves_that_step_and_the_status_names_it(stage, number, command, straight):
    run, arguments = command(stage, "stopped")
    process = start(arguments)
    wait_for_step(process, stage, random.randrange(2, STEPS // 2))
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait() == 128 + number
    process.stderr.close()
    last = max(record["step"] for record in curve(run, stage))
    assert load_checkpoint(run / stage).step == last < STEPS
    assert f"stopped by {number.name}. What is finished is saved. Rerun the same command to continue." in rest
    main(arguments)
    assert_same_run(run, straight(stage), stage)


def test_signal_while_encoding_keeps_the_finished_videos(tmp_path, image_options, monkeypatch):
    make, seen = FeatureMaker.make, []

    def interrupt(self, video, *rest):
        seen.append(video.name)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        make(self, video, *rest)

    monkeypatch.setattr(FeatureMaker, "make", interrupt)
    monkeypatch.setattr("interpreter.store.open.default_workers", lambda: 1)
    arguments = ["--run", str(tmp_path / "run"), *image_options]
    with StopRequest(at_once=True), pytest.raises(Interrupted):
        main(arguments)
    assert seen == ["train-00000", "train-00001"]
    assert checkpoints(tmp_path / "run" / "image") == []
    assert main(arguments) == 0
    assert seen == ["train-00000", "train-00001", "train-00001", "train-00002"]
    assert load_checkpoint(tmp_path / "run" / "image").step == 3


def test_ctrl_c_ends_the_loader_and_training_resumes_bit_for_bit(command):
    """Ctrl-C in a terminal reaches every process of the group, including the decoding processes."""
    whole, arguments = command("image", "whole")
    main([*arguments, "--features", "streamed", "--loader", "torch"])
    run, arguments = command("image", "stopped")
    process = start([*arguments, *STREAMED])
    wait_for_step(process, "image", 5)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    for each in (*workers, process):
        each.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    process.stderr.close()
    assert "Traceback" not in rest
    assert not any(worker.is_running() for worker in workers)
    assert 5 <= load_checkpoint(run / "image").step < STEPS
    main([*arguments, *STREAMED])
    assert_same_run(run, whole, "image")


def test_killed_decoding_process_is_one_line_and_run_resumes(command):
    run, arguments = command("image", "killed")
    process = start([*arguments, *STREAMED])
    wait_for_step(process, "image", 8)
    workers = psutil.Process(process.pid).children(recursive=True)
    workers[0].kill()
    rest = process.stderr.read()
    assert process.wait() == 1
    process.stderr.close()
    assert "Traceback" not in rest
    (message,) = [line for line in rest.splitlines() if line.startswith("error: ")]
    assert "was killed by signal 9 while it read" in message
    assert not any(worker.is_running() for worker in workers)
    assert load_checkpoint(run / "image").step >= 7
    main([*arguments, *STREAMED])
    assert load_checkpoint(run / "image").step == STEPS


@pytest.mark.parametrize("stage", ["image", "video"])
def test_steps_may_be_extended_and_logging_changed(stage, tiny_run, tmp_path, image_options, video_options):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    options = image_options if stage == "image" else video_options
    main(["--run", str(run), *options, "--steps", "5", "--checkpoint-every", "1"])
    assert [record["step"] for record in curve(run, stage)] == [1, 2, 3, 4, 5]
    assert curve(run, stage)[:3] == curve(tiny_run, stage)
    assert load_checkpoint(run / stage).step == 5


@pytest.mark.parametrize("stage", ["image", "video"])
def test_damaged_checkpoint_names_the_previous_one(stage, tiny_run, tmp_path, image_options, video_options):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    arguments = ["--run", str(run), *(image_options if stage == "image" else video_options), "--steps", "5"]
    main(arguments)
    expected, newest = curve(run, stage), run / stage / "checkpoint-00000005.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"checkpoint-00000005.* delete it to resume from checkpoint-00000003"):
        main(arguments)
    newest.unlink()
    main(arguments)
    assert curve(run, stage) == expected
