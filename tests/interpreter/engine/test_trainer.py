import json
import math
import signal

import numpy as np
import pytest
import torch
from interpreter.methods.interpreter.tasks import ImageTask, VideoTask
from torch import nn

from interpreter.configs import LoggingConfig, OptimConfig
from interpreter.engine.checkpoint import checkpoints, load_checkpoint
from interpreter.engine.records import RunLog
from interpreter.engine.schedule import learning_rate
from interpreter.engine.trainer import DivergedError, Trainer
from interpreter.interrupts import StopRequest
from interpreter.methods.interpreter import image_slots as slots
from interpreter.methods.interpreter.config import ImageModelConfig, VideoModelConfig
from interpreter.methods.interpreter.image_slots import StreamedSlots
from interpreter.methods.interpreter.image_stage import ImageStage
from interpreter.methods.interpreter.video_stage import VideoStage

CPU = torch.device("cpu")
OPTIM = OptimConfig(steps=10, batch_size=4, warmup_steps=3, precision="fp32")
LOGGING = LoggingConfig(log_every=2, sample_every=5, checkpoint_every=3)


class Regression:
    """A task of one linear layer; `spoil` may break the loss of a step."""

    frames_per_step = 4

    def __init__(self, spoil=None, at_step=None):
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.spoil = spoil or (lambda step, loss: loss)
        self.at_step = at_step or (lambda step: None)

    def batch(self, step):
        self.at_step(step)
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(step)), torch.full((4,), step)

    def forward(self, x, step):
        loss = (self.model(x) - x[:, :2]).pow(2).mean()
        return self.spoil(step[0].item(), loss), {"mean_input": x.mean()}


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
    found = records(tmp_path)
    assert [record["step"] for record in found] == [2, 4, 6, 8, 10]
    for record, first, second in zip(found, seen[::2], seen[1::2], strict=True):
        assert record["loss"] == (first + second) / 2
        assert record["lr"] == learning_rate(record["step"] - 1, OPTIM)
        assert {"stage", "grad_norm", "mean_input", "seconds_per_step", "seconds_for_batch"} <= record.keys()
        assert "count" not in record
    pictures = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert pictures == ["image-000000.png", "image-000005.png", "image-000010.png"]
    assert list((tmp_path / "tensorboard" / "image").glob("events*"))


def test_each_step_runs_at_its_rate(tmp_path):
    """One step of AdamW on a known gradient moves a weight by the rate of that step, and decays it by rate·decay."""
    task = Regression(lambda step, loss: task.model.weight.sum())
    before = task.model.weight.detach().clone()
    trainer(
        tmp_path, task, OptimConfig(steps=1, start_lr=1e-3, warmup_steps=5, weight_decay=0.1, precision="fp32")
    ).run(StopRequest())
    torch.testing.assert_close(task.model.weight.detach(), before * (1 - 1e-3 * 0.1) - 1e-3)


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_gradient_is_clipped_only_when_asked_for_and_logged_unclipped(limit, tmp_path):
    task = Regression(lambda step, loss: 100 * task.model.weight.sum())
    optim = OptimConfig(steps=1, clip_norm=limit, precision="fp32")
    trainer(tmp_path, task, optim, LoggingConfig(log_every=1)).run(StopRequest())
    assert records(tmp_path)[0]["grad_norm"] == pytest.approx(100 * math.sqrt(6))
    norm = task.model.weight.grad.norm().item()
    assert norm == pytest.approx(limit or 100 * math.sqrt(6), rel=1e-4)


@pytest.mark.parametrize("stop_at", [0, 1, 4, 7])
def test_stopped_run_goes_on_bit_for_bit(stop_at, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(whole, Regression()).run(StopRequest())

    stop = StopRequest()

    def ask(step):
        stop.number = signal.SIGTERM if step == stop_at else 0

    assert not trainer(parts, Regression(at_step=ask)).run(stop)
    assert load_checkpoint(parts / "image").step == stop_at + 1  # the step under way is finished
    assert trainer(parts, Regression()).run(StopRequest())

    strip = [{k: v for k, v in r.items() if not k.startswith("seconds_")} for r in records(parts)]
    assert strip == [{k: v for k, v in r.items() if not k.startswith("seconds_")} for r in records(whole)]
    one, other = load_checkpoint(whole / "image"), load_checkpoint(parts / "image")
    assert one.step == other.step == 10
    for group in ("weights", "optimizer"):
        a, b = getattr(one, group), getattr(other, group)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_records_after_the_checkpoint_are_dropped_and_a_torn_line_too(tmp_path):
    trainer(tmp_path, Regression()).run(StopRequest())
    expected = records(tmp_path)
    (tmp_path / "image" / "checkpoint-00000010.safetensors").unlink()  # newest is now of step 9
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
    assert trainer(tmp_path, Regression(), longer).run(StopRequest())
    assert [record["step"] for record in records(tmp_path)] == [2, 4, 6, 8, 10, 12, 14]
    assert load_checkpoint(tmp_path / "image").step == 14


def overflow(step, loss):
    return loss if step < 7 else loss + 0 * (torch.tensor(float("inf")) - float("inf"))


def steep(step, loss):
    """A finite loss without a finite gradient: the square root at 0."""
    return loss if step < 7 else loss + (0 * loss).sqrt()


@pytest.mark.parametrize(("spoil", "what"), [(overflow, "loss of step 8 is not"), (steep, "gradient of step 8 is not")])
def test_divergence_says_so_and_leaves_checkpoints_alone(spoil, what, tmp_path):
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


class RandomFeatures:
    """Features that depend on the frame and its flip alone."""

    def __init__(self, tokens, dim):
        self.tokens, self.dim, self.asked, self.expected = tokens, dim, [], []

    def expect(self, requests):
        self.expected.append(list(requests))

    def batch(self, frames, flips):
        self.asked.append((frames, flips))
        out = []
        for frame, flip in zip(frames.tolist(), flips.tolist(), strict=True):
            generator = torch.Generator().manual_seed(2 * frame + flip)
            out.append(torch.randn(self.tokens, self.dim, generator=generator))
        return torch.stack(out)


def image_task(iterations=3, **changes):
    torch.manual_seed(0)
    config = ImageModelConfig(num_slots=3, dim=16, iterations=iterations, decoder_layers=1, heads=2)
    stage = ImageStage(config, 12, (2, 3))
    return ImageTask(stage, RandomFeatures(6, 12), [4, 9], OptimConfig(batch_size=4, **changes), CPU)


def video_task(iterations=3, **changes):
    frozen = image_task().model.requires_grad_(False)
    torch.manual_seed(1)
    config = VideoModelConfig(num_slots=4, dim=16, iterations=iterations, encoder_layers=1, decoder_layers=1, heads=2)
    stage = VideoStage(config, 16, 5)
    source = StreamedSlots(frozen, RandomFeatures(6, 12), ["0a", "0b"], [4, 9], "fp32")
    return VideoTask(stage, source, 3, [4, 9], OptimConfig(batch_size=2, **changes), CPU)


@pytest.mark.parametrize("make", [image_task, video_task])
def test_batch_is_a_function_of_the_step_alone(make):
    task = make()
    first = task.batch(3)
    task.batch(4)
    torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(first, task.batch(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, task.batch(4), strict=True))
    assert not torch.equal(first[1], make(seed=1).batch(3)[1])


@pytest.mark.parametrize("make", [image_task, video_task])
def test_what_is_announced_is_what_is_asked_for_to_the_last_step(make, monkeypatch):
    monkeypatch.setattr(slots, "ROWS", 3)
    task = make(steps=5)
    features = task.features if make is image_task else task.slots.features
    for step in range(2, 5):  # as after resuming
        task.batch(step)
    for step, announced in enumerate(features.expected):
        parts = len(features.asked) // 3
        asked = features.asked[step * parts :]
        assert len(announced) == len(asked)
        for one, other in zip(announced, asked, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_progress_bar_tells_how_long_steps_wait_for_their_batch(tmp_path, monkeypatch):
    with RunLog(tmp_path / "image", 0, 10, 4) as log:
        monkeypatch.setattr(log, "started", log.started - 100)
        log.advance(1, waited=10.0)
        log.advance(2, waited=15.0)
        assert "  batch 25%  " in log.progress.tasks[0].fields["status"]


def test_the_time_for_a_batch_is_a_part_of_the_step(tmp_path):
    trainer(tmp_path, Regression()).run(StopRequest())
    for record in records(tmp_path):
        assert 0 < record["seconds_for_batch"] < record["seconds_per_step"]


def test_batches_have_their_shapes_and_count_their_frames():
    task = image_task()
    assert [tuple(t.shape) for t in task.batch(0)] == [(4, 6, 12), (4, 3, 16)]
    assert task.frames_per_step == 4
    task = video_task()
    assert [tuple(t.shape) for t in task.batch(0)] == [(2, 5, 3, 16), (2, 4, 16)]
    assert task.frames_per_step == 10
    assert not task.batch(0)[0].requires_grad


def test_image_slots_do_not_depend_on_how_many_are_computed_at_once(monkeypatch):
    whole = video_task().batch(2)[0]
    monkeypatch.setattr("interpreter.methods.interpreter.image_slots.ROWS", 4)
    torch.testing.assert_close(video_task().batch(2)[0], whole, atol=1e-6, rtol=1e-5)


def test_video_stage_leaves_the_image_stage_alone():
    task = video_task()
    image_stage = task.slots.image_stage
    before = {name: tensor.clone() for name, tensor in image_stage.state_dict().items()}
    task.forward(*task.batch(0))[0].backward()
    assert all(parameter.grad is None for parameter in image_stage.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in image_stage.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("make", [image_task, video_task])
def test_compiled_step_equals_eager(make):
    task = make(iterations=1)  # each more adds seconds of compilation and no other operation
    batch = task.batch(0)
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
