"""Several processes started by torchrun train as one."""

import shutil
import signal
import sys
import time

import psutil
import pytest

from interpreter.engine.checkpoint import load_checkpoint
from interpreter.train import main

from .runs import TWO_RANKS, curve, finish, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes needs Linux or macOS")


def losses(run, stage):
    return [record["loss"] for record in curve(run, stage)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["image", "video"])
def test_two_processes_train_as_one_and_one_goes_on_alone(stage, image_run, image_options, video_options):
    """The start of the annealing is fixed, because the two halves of a batch have different bounding boxes."""
    options = image_options if stage == "image" else [*video_options, "--diameter", "30"]
    runs = [image_run(name) for name in ("alone", "together")]
    for run in runs:
        shutil.rmtree(run / stage, ignore_errors=True)
    main(["--run", str(runs[0]), *options, "--steps", "8"])
    text = finish(start(["--run", str(runs[1]), *options, "--steps", "6"], TWO_RANKS))
    assert text.count(f"{stage} step 3 ") == 1  # only one of them prints
    assert load_checkpoint(runs[1] / stage).step == 6
    # The cosine ends at the last step, so only weights up to that step can agree.
    assert losses(runs[1], stage)[:3] == pytest.approx(losses(runs[0], stage)[:3], rel=1e-4)
    main(["--run", str(runs[1]), *options, "--steps", "8"])
    assert load_checkpoint(runs[1] / stage).step == 8
    assert len(losses(runs[1], stage)) == 8


def test_a_batch_that_cannot_be_shared_is_refused(image_run, image_options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--batch-size 4 cannot be shared by 3 processes; give a multiple of 3"):
        main(["--run", str(image_run()), *image_options])


@pytest.mark.slow
def test_a_dying_process_ends_the_job_and_leaves_a_checkpoint(image_run, image_options):
    run = image_run()
    shutil.rmtree(run / "image")
    arguments = ["--run", str(run), *image_options, "--steps", "100000", "--checkpoint-every", "5"]
    job = start(arguments, TWO_RANKS)
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
    assert "Rerun the same command to continue from it" in text
    state = load_checkpoint(run / "image")
    assert state.step >= 5
    assert all(tensor.isfinite().all() for tensor in state.weights.values())
