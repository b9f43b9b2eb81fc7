"""A training step: micro-batches, recomputation, compilation, CUDA graphs, and the ranges that a profiler shows."""

import copy
import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from interpreter.configs import OptimConfig
from interpreter.engine.cuda_graph import EAGER_STEPS, StepGraph, check_same_inputs
from interpreter.engine.schedule import learning_rate
from interpreter.engine.step import Prefetched, TrainingStep

from .small_tasks import CPU, Regression, gated_task, image_task, video_task, window_task

OPTIM = OptimConfig(steps=20, batch_size=4, warmup_steps=3, precision="fp32")


def train(task, steps=4, optim=OPTIM, device=CPU, **modes):
    """Losses, gradient norms and weights after some steps."""
    step = TrainingStep(task, replace(optim, batch_size=task.optim.batch_size), device, **modes)
    step.start(0, {})
    sums = []
    for batch in itertools.islice(task.batches(), steps):
        step.run(batch)
        sums.append(step.read_sums())
        step.clear_sums()
    assert step.failure() is None
    return sums, {name: p.detach().clone() for name, p in task.model.named_parameters()}


def assert_close(one, other, **tolerance):
    for first, second in zip(one[0], other[0], strict=True):
        assert first.keys() == second.keys()
        for name in ("loss", "grad_norm"):
            assert first[name] == pytest.approx(second[name], rel=tolerance["rtol"]), name
    for name, weight in one[1].items():
        torch.testing.assert_close(weight, other[1][name], msg=name, **tolerance)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(size):
    """Sums of parts differ in the last bits. AdamW's first steps are signs of gradients, which rounding may change."""
    whole = train(image_task(), optim=replace(OPTIM, start_lr=1e-4))
    parts = train(image_task(), optim=replace(OPTIM, start_lr=1e-4, micro_batch=size))
    assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [image_task, video_task])
def test_recomputed_blocks_keep_less_and_change_no_value(make):
    saved = []
    plain = train(make())
    task = make()
    for part in (getattr(task.model, name, None) for name in ("encoder", "decoder")):
        if part is not None:
            part.recompute = True
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        recomputed = train(task)
    assert_close(recomputed, plain, rtol=0, atol=0)
    few, saved[:] = sum(saved), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        train(make())
    assert few < 0.6 * sum(saved)


@pytest.mark.slow
@pytest.mark.parametrize("make", [image_task, video_task, window_task])
def test_compiled_steps_are_one_graph_and_equal_eager_steps(make):
    eager = train(make(iterations=1))
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = train(make(iterations=1), compiled=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert_close(compiled, eager, rtol=1e-3, atol=1e-5)  # fused kernels sum in another order


def averaged(task, share=0.25):
    """The task with an average of the weights, updated after each step; and groups with rates and decays of their own.

    Biases and other vectors learn at a tenth of the rate, without decay.
    """
    averages = {name: parameter.detach().clone() for name, parameter in task.model.named_parameters()}

    def groups(model):
        few = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        many = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        return [{"params": many}, {"params": few, "lr_scale": 0.1, "weight_decay": 0.0}]

    @torch.no_grad()
    def after_step(model):
        for name, parameter in model.named_parameters():
            averages[name].lerp_(parameter, share)

    return replace(task, parameter_groups=groups, after_step=after_step), averages


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_groups_have_their_rates_and_after_step_sees_new_weights(compiled):
    task, averages = averaged(image_task(iterations=1))
    expected, other = copy.deepcopy(task.model), image_task(iterations=1)
    mean = {name: parameter.detach().clone() for name, parameter in expected.named_parameters()}
    reference = replace(other, model=expected)
    groups = task.parameter_groups(expected)
    scales = [group.pop("lr_scale", 1.0) for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=OPTIM.weight_decay, fused=True)
    for number, batch in enumerate(itertools.islice(reference.batches(), 4)):
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = learning_rate(number, OPTIM) * scale
        optimizer.zero_grad()
        reference.forward(*batch)[0].backward()
        optimizer.step()
        for name, parameter in expected.named_parameters():
            mean[name].lerp_(parameter.detach(), 0.25)
    _, weights = train(task, 4, compiled=compiled)
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if compiled else {"rtol": 1e-6, "atol": 1e-8}
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), msg=name, **tolerance)
        torch.testing.assert_close(averages[name], mean[name], msg=name, **tolerance)
    plain = train(image_task(iterations=1))[1]
    assert any((plain[name] - weights[name]).abs().max() > 1e-4 for name in plain if plain[name].ndim == 1)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_group_rests_until_its_step(compiled):
    """Before that step even weight decay is off. The number of the step is read on the device only."""

    def groups(model):
        return [{"params": [model.weight], "starts_at": 3, "lr_scale": 0.5}, {"params": [model.bias]}]

    task = Regression()
    task.parameter_groups = groups
    optim = replace(OPTIM, weight_decay=0.5, start_lr=0.1, peak_lr=0.1)
    step = TrainingStep(task, optim, CPU, compiled)
    step.start(0, {})
    weights = [task.model.weight.detach().clone()]
    for number, batch in enumerate(itertools.islice(task.batches(), 5)):
        bias = task.model.bias.detach().clone()
        step.run(batch)
        weights.append(task.model.weight.detach().clone())
        assert torch.equal(weights[-1], weights[-2]) == (number < 3)
        assert not torch.equal(task.model.bias, bias)
    later = Regression()
    later.parameter_groups = groups
    resumed = TrainingStep(later, optim, CPU)
    resumed.start(3, {})
    before = later.model.weight.detach().clone()
    resumed.run(batch)
    assert not torch.equal(later.model.weight, before)


def test_weights_do_not_change_after_a_step_that_is_not_finite():
    def spoil(step, loss):
        return loss * float("nan") if step == 3 else loss

    task = Regression(spoil)
    step = TrainingStep(task, OPTIM, CPU)
    step.start(0, {})
    batches = task.batches()
    for batch in itertools.islice(batches, 3):
        step.run(batch)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    moments = [tensor.clone() for state in step.optimizer.state.values() for tensor in state.values()]
    for batch in itertools.islice(batches, 3):  # the host reads nothing in between, as on a GPU
        step.run(batch)
    assert step.failure() == "the loss of step 4 is not finite"
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    after = [tensor for state in step.optimizer.state.values() for tensor in state.values()]
    assert all(torch.equal(one, other) for one, other in zip(moments, after, strict=True))


def test_inputs_of_another_size_are_refused_by_name():
    old = (torch.zeros(4, 3), torch.zeros(4, dtype=torch.bfloat16))
    check_same_inputs(old, old)
    with pytest.raises(ValueError, match=r"input 0 of the step is \[2, 3\] torch.float32, but .* \[4, 3\].*cuda-graph"):
        check_same_inputs(old, (torch.zeros(2, 3), old[1]))
    with pytest.raises(ValueError, match=r"input 1 of the step is \[4\] torch.float32, but .* \[4\] torch.bfloat16"):
        check_same_inputs(old, (old[0], torch.zeros(4)))


@pytest.fixture
def streams(monkeypatch):
    """Replaces CUDA: records new streams. The last element of ``streams.current`` is the stream in use."""

    class Stream:
        def __init__(self):
            made.append(self)

        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            pass

    class Made(list):
        current: list

    @contextmanager
    def on(stream):
        made.current.append(stream)
        yield
        made.current.pop()

    def graph(cuda_graph, stream=None, capture_error_mode=None):
        return on(stream or Stream())  # without a stream, PyTorch captures on one of its own

    made = Made()
    made.current = [Stream()]
    made.clear()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made.current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return made


def test_warm_up_and_capture_share_one_side_stream(streams):
    """The allocator keeps free memory per stream: with a stream for each call, all memory would be allocated again."""
    used, main = [], streams.current[0]
    step = StepGraph(lambda x: used.append(streams.current[-1]))
    for _ in range(EAGER_STEPS + 3):
        step.run((torch.zeros(2),))
    assert len(streams) == 1
    assert streams[0] is not main
    assert used == (EAGER_STEPS + 1) * streams


def test_every_call_has_the_same_tensors_whatever_strides_the_batch_has(streams):
    """With new strides torch.compile would compile again, which fails during a capture."""
    pointers, values, strides = set(), [], set()

    def function(*tensors):
        pointers.add(tuple(t.data_ptr() for t in tensors))
        strides.add(tuple(t.stride() for t in tensors))
        values.append([t.tolist() for t in tensors])

    step, batches = StepGraph(function), []
    for number in range(EAGER_STEPS + 1):
        wide = torch.full((2, 3), float(number))
        batches.append((wide[:, 1], wide[:, :1].expand(2, 4)))
        step.run(batches[-1])
    assert len(pointers) == 1
    assert strides == {((1,), (4, 1))}
    assert values == [[t.tolist() for t in batch] for batch in batches]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("make", [image_task, video_task, gated_task, window_task])
def test_captured_steps_equal_eager_ones(make, compiled):
    device, steps = torch.device("cuda"), 16  # 11 before the capture
    eager = train(make(device=device), steps, device=device, compiled=compiled)
    captured = train(make(device=device), steps, device=device, compiled=compiled, captured=True)
    assert_close(captured, eager, rtol=0, atol=0)


@pytest.mark.gpu
def test_captured_function_sees_new_inputs_of_the_same_shapes():
    total = torch.zeros(3, device="cuda")
    graph = StepGraph(lambda x: total.add_(x))
    for number in range(20):
        graph.run((torch.full((3,), float(number), device="cuda"),))
    assert total.tolist() == 3 * [190.0]
    with pytest.raises(ValueError, match="--no-cuda-graph"):
        graph.run((torch.zeros(4, device="cuda"),))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (image_task, [*3 * ["slot attention iteration"], "decoder", "loss"]),
        (video_task, ["encoder", *3 * ["slot attention iteration"], "merging", "decoder", "loss"]),
    ],
)
def test_profiler_shows_the_parts_of_a_step(make, parts, recorded_ranges):
    task = make()
    step = TrainingStep(task, replace(OPTIM, batch_size=task.optim.batch_size), CPU)
    batch = Prefetched(task, CPU, 0).next()
    recorded_ranges[0].clear()  # of the loader and, before the video stage, of the image stage
    step.run(batch)
    whole = [(0, "step"), (1, "forward"), *[(2, part) for part in parts], (1, "backward"), (1, "optimizer")]
    assert recorded_ranges[0] == whole


def test_profiler_shows_the_loader(recorded_ranges):
    Prefetched(image_task(), CPU, 0).next()
    assert recorded_ranges[0][0] == (0, "loader")
