"""Several processes started by torchrun train as one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from interpreter.engine.checkpoint import load_checkpoint
from interpreter.train import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes needs Linux or macOS")


def torchrun(arguments, processes=2):
    """A job of several processes; "--" keeps torchrun from reading --run as its own."""
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "--"]
    return subprocess.Popen(
        [sys.executable, "-m", *command, "interpreter.train", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"},
    )


def finish(process):
    out, text = process.communicate(timeout=300)
    assert process.returncode == 0, text + out
    return text


def losses(run, stage):
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["image", "video"])
def test_two_processes_train_as_one_and_one_goes_on_alone(stage, image_run, image_options, video_options):
    """The start of the annealing is fixed, as a batch shared by two has two bounding boxes."""
    options = image_options if stage == "image" else [*video_options, "--diameter", "30"]
    runs = [image_run(name) for name in ("alone", "together")]
    for run in runs:
        shutil.rmtree(run / stage, ignore_errors=True)
    main(["--run", str(runs[0]), *options, "--steps", "8"])
    text = finish(torchrun(["--run", str(runs[1]), *options, "--steps", "6"]))
    assert text.count(f"{stage} step 3 ") == 1  # one of them speaks
    assert load_checkpoint(runs[1] / stage).step == 6
    # The cosine ends at the last step: only what is learned up to there can agree.
    assert losses(runs[1], stage)[:3] == pytest.approx(losses(runs[0], stage)[:3], rel=1e-4)
    main(["--run", str(runs[1]), *options, "--steps", "8"])
    assert load_checkpoint(runs[1] / stage).step == 8
    assert len(losses(runs[1], stage)) == 8


def test_a_batch_that_cannot_be_shared_is_refused(image_run, image_options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--batch-size 4 cannot be shared by 3 processes; give a multiple of 3"):
        main(["--run", str(image_run()), *image_options])


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_and_leaves_a_checkpoint(image_run, image_options):
    run = image_run()
    shutil.rmtree(run / "image")
    arguments = ["--run", str(run), *image_options, "--steps", "100000", "--checkpoint-every", "5"]
    job = torchrun(arguments)
    try:
        deadline = time.monotonic() + 120
        while load_checkpoint(run / "image") is None:
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        workers = [p for p in psutil.Process(job.pid).children(recursive=True) if "interpreter.train" in p.cmdline()]
        second = next(p for p in workers if p.environ()["RANK"] == "1")
        second.send_signal(signal.SIGKILL)
        _, text = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode != 0
    assert "lost another one" in text
    assert "the same command goes on from it" in text
    state = load_checkpoint(run / "image")
    assert state.step >= 5
    assert all(tensor.isfinite().all() for tensor in state.weights.values())
