"""The memory of a step is predicted without allocating it, and equals what a step takes."""

import re

import pytest
import torch

from interpreter.engine import memory
from interpreter.engine.memory import memory_notice, predicted_peak
from interpreter.engine.step import TrainingStep
from interpreter.methods.interpreter.config import ImageModelConfig

from ..peak_memory import peak_bytes
from .small_tasks import CPU, batch_of, image_task, video_task, window_task


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("make", [image_task, video_task, window_task])
def test_prediction_is_what_a_step_takes(make, micro_batch, precision):
    task = make(precision=precision, micro_batch=micro_batch)
    batch = batch_of(task)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    predicted = predicted_peak(task)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())

    step = TrainingStep(task, task.optim, CPU)
    step.start(0, {})
    step.run(batch)
    state = [tensor for one in step.optimizer.state.values() for tensor in one.values()]

    def run():
        step.run(batch)
        step.optimizer.zero_grad(set_to_none=True)

    measured = peak_bytes(run) + nbytes([*task.model.parameters(), *batch, *state])
    assert predicted == pytest.approx(measured, rel=0.05)


def test_step_that_does_not_fit_names_the_remedy(monkeypatch):
    task = image_task(precision="fp32")
    notice = memory_notice(task)
    assert re.match(r"a step takes 0\.\d+ MB of memory at its peak$", notice)
    assert "--micro-batch" not in notice
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert "but 0.001 MB are free: use --micro-batch" in memory_notice(task)


@pytest.mark.gpu
def test_prediction_on_a_gpu():
    others, device = torch.cuda.memory_allocated(), torch.device("cuda")  # of tests before this one
    # The demo's sizes: 3 GB. Buffers of libraries are small compared with that.
    task = image_task(
        device=device,
        config=ImageModelConfig(),
        feature_shape=(96, 192),
        grid=(8, 12),
        batch_size=2048,
        precision="bf16",
    )
    batch = tuple(torch.randn(shape, device=device) for shape in task.shapes())
    predicted = predicted_peak(task)
    step = TrainingStep(task, task.optim, device)
    step.start(0, {})
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        step.run(batch)
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - others, rel=0.06)
