"""The training loop: records, rates, stopping, resuming, divergence, and the batches of both stages."""

import itertools
import json
import math
import signal

import numpy as np
import pytest
import torch

from interpreter.configs import LoggingConfig, OptimConfig
from interpreter.engine.checkpoint import checkpoints, load_checkpoint
from interpreter.engine.records import RunLog
from interpreter.engine.schedule import learning_rate
from interpreter.engine.trainer import DivergedError, Trainer
from interpreter.interrupts import StopRequest

from .small_tasks import CPU, Regression, batch_of, image_task, video_task, window_task

OPTIM = OptimConfig(steps=10, batch_size=4, warmup_steps=3, precision="fp32")
LOGGING = LoggingConfig(log_every=2, sample_every=5, checkpoint_every=3)


def trainer(folder, task, optim=OPTIM, logging=LOGGING):
    return Trainer(task, optim, logging, folder / "image", CPU, False, lambda: np.zeros((4, 4, 3), np.uint8))


def records(folder):
    return [json.loads(line) for line in (folder / "image" / "metrics.jsonl").read_text().splitlines()]


def test_records_are_means_over_their_window(tmp_path):
    seen = []

    def note(step, loss):
        seen.append(loss.item())
        return loss

    assert trainer(tmp_path, Regression(note)).run(StopRequest())
    written = records(tmp_path)
    assert [record["step"] for record in written] == [2, 4, 6, 8, 10]
    for record, first, second in zip(written, seen[::2], seen[1::2], strict=True):
        assert record["loss"] == (first + second) / 2
        assert record["lr"] == learning_rate(record["step"] - 1, OPTIM)
        assert {"stage", "grad_norm", "mean_input", "seconds_per_step", "seconds_for_batch"} <= record.keys()
        assert "count" not in record
    pictures = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert pictures == ["image-000000.png", "image-000005.png", "image-000010.png"]
    assert list((tmp_path / "tensorboard" / "image").glob("events*"))


def test_each_step_runs_at_its_rate(tmp_path):
    """One step of AdamW on a known gradient moves a weight by the learning rate, and decays it by rate·decay."""
    task = Regression(lambda step, loss: task.model.weight.sum())
    before = task.model.weight.detach().clone()
    trainer(
        tmp_path, task, OptimConfig(steps=1, start_lr=1e-3, warmup_steps=5, weight_decay=0.1, precision="fp32")
    ).run(StopRequest())
    torch.testing.assert_close(task.model.weight.detach(), before * (1 - 1e-3 * 0.1) - 1e-3)


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_gradient_is_clipped_on_request_and_logged_unclipped(limit, tmp_path):
    task = Regression(lambda step, loss: 100 * task.model.weight.sum())
    optim = OptimConfig(steps=1, clip_norm=limit, precision="fp32")
    trainer(tmp_path, task, optim, LoggingConfig(log_every=1)).run(StopRequest())
    assert records(tmp_path)[0]["grad_norm"] == pytest.approx(100 * math.sqrt(6))
    norm = task.model.weight.grad.norm().item()
    assert norm == pytest.approx(limit or 100 * math.sqrt(6), rel=1e-4)


@pytest.mark.parametrize("stop_at", [0, 1, 4, 7])
def test_stopped_run_resumes_bit_for_bit(stop_at, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(whole, Regression()).run(StopRequest())

    stop = StopRequest()

    def ask(step):
        stop.number = signal.SIGTERM if step == stop_at else 0

    assert not trainer(parts, Regression(at_step=ask)).run(stop)
    assert load_checkpoint(parts / "image").step == stop_at + 1  # the current step is finished
    assert trainer(parts, Regression()).run(StopRequest())

    strip = [{k: v for k, v in r.items() if not k.startswith("seconds_")} for r in records(parts)]
    assert strip == [{k: v for k, v in r.items() if not k.startswith("seconds_")} for r in records(whole)]
    one, other = load_checkpoint(whole / "image"), load_checkpoint(parts / "image")
    assert one.step == other.step == 10
    for group in ("weights", "optimizer"):
        a, b = getattr(one, group), getattr(other, group)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_records_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path):
    trainer(tmp_path, Regression()).run(StopRequest())
    expected = records(tmp_path)
    (tmp_path / "image" / "checkpoint-00000010.safetensors").unlink()  # the newest is now of step 9
    with (tmp_path / "image" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "image", "step": 11, "lo')
    trainer(tmp_path, Regression()).run(StopRequest())
    assert [r["loss"] for r in records(tmp_path)] == [r["loss"] for r in expected]
    assert [r["step"] for r in records(tmp_path)] == [2, 4, 6, 8, 10]


def test_finished_run_does_nothing_and_may_be_extended(tmp_path):
    trainer(tmp_path, Regression()).run(StopRequest())
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "image").glob("*.safetensors")}
    assert trainer(tmp_path, Regression(at_step=lambda step: pytest.fail("a step ran"))).run(StopRequest())
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "image").glob("*.safetensors")}
    longer = OptimConfig(steps=14, batch_size=4, warmup_steps=3, precision="fp32")
    assert trainer(tmp_path, Regression(steps=14), longer).run(StopRequest())
    assert [record["step"] for record in records(tmp_path)] == [2, 4, 6, 8, 10, 12, 14]
    assert load_checkpoint(tmp_path / "image").step == 14


def overflow(step, loss):
    return loss if step < 7 else loss + 0 * (torch.tensor(float("inf")) - float("inf"))


def steep(step, loss):
    """A finite loss without a finite gradient: the square root at 0."""
    return loss if step < 7 else loss + (0 * loss).sqrt()


@pytest.mark.parametrize(("spoil", "what"), [(overflow, "loss of step 8 is not"), (steep, "gradient of step 8 is not")])
def test_divergence_is_named_and_leaves_checkpoints(spoil, what, tmp_path):
    task = Regression(spoil)
    with pytest.raises(DivergedError, match=what) as caught:
        trainer(tmp_path, task).run(StopRequest())
    assert "--peak-lr" in str(caught.value)
    folder = tmp_path / "image"
    assert "diverged-00000007.safetensors" in str(caught.value)
    assert (folder / "diverged-00000007.safetensors").exists()
    assert [path.name for path in checkpoints(folder)] == [
        "checkpoint-00000003.safetensors",
        "checkpoint-00000006.safetensors",
    ]
    state = load_checkpoint(folder)
    assert state.step == 6
    assert all(tensor.isfinite().all() for tensor in [*state.weights.values(), *state.optimizer.values()])
    assert all(parameter.isfinite().all() for parameter in task.model.parameters())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    def ruin(bias):
        bias.data.fill_(float("inf"))

    def arm(step):
        if step == 5:  # after the checkpoint of step 3, in the step before that of step 6
            task.model.bias.register_post_accumulate_grad_hook(ruin)

    task = Regression(at_step=arm)
    with pytest.raises(DivergedError, match="step 6 left weights that are not finite"):
        trainer(tmp_path, task).run(StopRequest())
    assert [path.name for path in checkpoints(tmp_path / "image")] == ["checkpoint-00000003.safetensors"]


@pytest.mark.parametrize("make", [image_task, video_task, window_task])
def test_batch_is_a_function_of_the_step_alone(make):
    batches = list(itertools.islice(make().batches(), 5))
    torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(batches[3], batch_of(make(), 3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(batches[3], batches[4], strict=True))
    assert not torch.equal(batches[3][1], batch_of(make(seed=1), 3)[1])


def test_batches_end_after_the_last_step():
    assert len(list(image_task(steps=5).batches(2))) == 3


def test_progress_bar_shows_the_share_of_waiting(tmp_path, monkeypatch):
    with RunLog(tmp_path / "image", 0, 10, 4) as log:
        monkeypatch.setattr(log, "started", log.started - 100)
        log.advance(1, waited=10.0)
        log.advance(2, waited=15.0)
        assert "  batch 25%  " in log.progress.tasks[0].fields["status"]


def test_time_for_a_batch_is_part_of_the_step(tmp_path):
    trainer(tmp_path, Regression()).run(StopRequest())
    for record in records(tmp_path):
        assert 0 < record["seconds_for_batch"] < record["seconds_per_step"]


def test_batches_have_their_shapes_and_count_their_frames():
    task = image_task()
    assert [tuple(t.shape) for t in batch_of(task)] == [(4, 6, 12), (4, 3, 16)]
    assert task.frames_per_step == 4
    task = video_task()
    assert [tuple(t.shape) for t in batch_of(task)] == [(2, 5, 3, 16), (2, 4, 16)]
    assert task.frames_per_step == 10
    assert not batch_of(task)[0].requires_grad


def test_image_slots_do_not_depend_on_the_chunk(monkeypatch):
    whole = batch_of(video_task(), 2)[0]
    monkeypatch.setattr("interpreter.methods.interpreter.image_slots.ROWS", 4)
    torch.testing.assert_close(batch_of(video_task(), 2)[0], whole, atol=1e-6, rtol=1e-5)


def test_video_stage_leaves_the_image_stage_alone():
    task = video_task()
    image_stage = task.inputs.slots.image_stage
    before = {name: tensor.clone() for name, tensor in image_stage.state_dict().items()}
    task.forward(*batch_of(task))[0].backward()
    assert all(parameter.grad is None for parameter in image_stage.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in image_stage.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("make", [image_task, video_task, window_task])
def test_compiled_step_equals_eager(make):
    task = make(iterations=1)  # each further layer adds seconds of compilation, but no new operation
    batch = batch_of(task)
    results = []
    for forward in (task.forward, torch.compile(task.forward, fullgraph=True)):
        task.model.zero_grad()
        loss, diagnostics = forward(*batch)
        loss.backward()
        grads = {name: parameter.grad.clone() for name, parameter in task.model.named_parameters()}
        results.append((loss.detach(), diagnostics, grads))
    (loss, diagnostics, grads), (compiled_loss, compiled_diagnostics, compiled_grads) = results
    torch.testing.assert_close(compiled_loss, loss, atol=1e-5, rtol=1e-5)
    assert diagnostics.keys() == compiled_diagnostics.keys()
    for name, value in diagnostics.items():
        torch.testing.assert_close(compiled_diagnostics[name], value, atol=1e-5, rtol=1e-4, check_dtype=False)
    for name, grad in grads.items():
        # Fused kernels sum in another order.
        torch.testing.assert_close(compiled_grads[name], grad, atol=1e-4, rtol=1e-3, msg=name)
