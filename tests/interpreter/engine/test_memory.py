import re
from dataclasses import replace

import pytest
import torch

from interpreter.configs import OptimConfig
from interpreter.engine import memory
from interpreter.engine.memory import memory_notice, predicted_peak
from interpreter.engine.step import TrainingStep
from interpreter.methods.interpreter.config import training_defaults
from profiling.timing import peak_bytes
from profiling.training import image_setup

from .test_trainer import CPU, image_task, video_task


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("make", [image_task, video_task])
def test_prediction_is_what_a_step_takes(make, micro_batch, precision):
    task = make()
    optim = replace(task.optim, precision=precision, micro_batch=micro_batch)
    batch = task.batch(0)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    predicted = predicted_peak(task, optim, [tuple(t.shape) for t in batch])
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())

    step = TrainingStep(task, optim, CPU)
    step.start(0, {})
    step.run(batch)
    state = [tensor for one in step.optimizer.state.values() for tensor in one.values()]

    def run():
        step.run(batch)
        step.optimizer.zero_grad(set_to_none=True)

    run()  # frees the gradients: the profiler counts what is allocated while it looks
    measured = peak_bytes(run, "cpu") + nbytes([*task.model.parameters(), *batch, *state])
    assert predicted == pytest.approx(measured, rel=0.05)


def test_a_step_that_does_not_fit_is_told_with_the_remedy(monkeypatch):
    task = image_task()
    shapes = [tuple(t.shape) for t in task.batch(0)]
    notice = memory_notice(task, replace(OptimConfig(), precision="fp32"), shapes)
    assert re.match(r"a step takes 0\.\d+ MB of memory at its peak$", notice)
    assert "--micro-batch" not in notice
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert "but 0.001 MB are free: use --micro-batch" in memory_notice(task, task.optim, shapes)


@pytest.mark.gpu
def test_prediction_on_a_gpu():
    image, device = training_defaults("image", "demo"), torch.device("cuda")
    optim = replace(image.optim, precision="bf16", batch_size=2048)  # 3 GB, beside which libraries' buffers are small
    others = torch.cuda.memory_allocated()  # of tests before this one
    setup, _ = image_setup(replace(image, optim=optim), 192, (8, 12), device)
    predicted = predicted_peak(setup.task, optim, [tuple(t.shape) for t in setup.inputs])
    step = TrainingStep(setup.task, optim, device)
    step.start(0, {})
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        step.run(setup.inputs)
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - others, rel=0.06)
