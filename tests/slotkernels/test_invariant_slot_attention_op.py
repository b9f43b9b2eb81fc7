"""The op of invariant slot attention: reference and Triton backends against the equations in float64."""

import pytest
import torch
from slotkernels.invariant_slot_attention.op import (
    INVARIANT_ATTENTION,
    INVARIANT_ATTENTION_BACKWARD,
    Arguments,
    BackwardArguments,
    Cotangents,
    Gradients,
    Results,
)

NAMES, OUTPUTS = Gradients._fields, Results._fields  # the tensors of the arguments but the mask, and of the results
INPUTS_IN_ANY_TYPE = ("q", "k", "v")  # the others stay in float32

BACKENDS = ["reference", "triton"]  # on a CPU the second is Triton's interpreter
GRID = NAMES.index("grid")
OPTIONS = (0.3, 5.0, 1e-8, False, 1e-8)  # scale, scale_factor, eps, whether it is in the denominator, scale_eps


def run(tensors, mask, options, backend):
    return INVARIANT_ATTENTION(Arguments(*tensors, mask, *options), backend)


def equations(tensors, mask, scale, scale_factor, eps, denominator, scale_eps):
    """Oracle: the formulas of the module's docstring for every pair of slot and token, with gradients of autograd."""
    q, bias, k, v, frame, grid, positions, scales, shift, key_deviation, value_deviation = tensors
    keep = torch.ones_like(grid[..., 0]) if mask is None else mask.to(grid.dtype)
    relative = (grid[:, None] - positions[:, :, None]) / (scale_factor * scales[:, :, None])

    def hidden(tokens, deviation):
        pre = tokens[:, None] + torch.einsum("bnmc,cd->bnmd", relative, frame)
        return torch.relu(pre if deviation is None else pre / deviation[..., None] + shift)

    logits = scale * torch.einsum("bnd,bnmd->bnm", q, hidden(k, key_deviation)) + bias[..., None]
    attention = logits.exp() / logits.exp().sum(1, keepdim=True)
    if denominator:
        weights = attention * keep[:, None] / ((attention * keep[:, None]).sum(2, keepdim=True) + eps)
    else:
        weights = (attention + eps) * keep[:, None]
        weights = weights / weights.sum(2, keepdim=True)
    updates = torch.einsum("bnm,bnmd->bnd", weights, hidden(v, value_deviation))
    centre = torch.einsum("bnm,bmc->bnc", weights, grid)
    spread = (weights + scale_eps) * keep[:, None]
    variance = (spread[..., None] * (grid[:, None] - centre[:, :, None]) ** 2).sum(2)
    return updates, attention, weights, centre, variance.clamp_min(1e-12).sqrt()


def problem(batch, slots, tokens, dim, dtype=torch.float32, normed=False, masked=False, device="cpu"):
    """Random inputs of every tensor, and a mask that keeps at least one token of each sample."""
    generator = torch.Generator().manual_seed(batch + 10 * slots + 100 * tokens + dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    k, v = normal(batch, tokens, dim), normal(batch, tokens, dim)
    tensors = [normal(batch, slots, dim), normal(batch, slots), k, v, normal(2, dim), normal(batch, tokens, 2).tanh()]
    tensors += [normal(batch, slots, 2).tanh(), 0.2 + normal(batch, slots, 2).abs()]
    tensors += [normal(dim), *(0.5 + normal(2, batch, slots, tokens).abs())] if normed else [None] * 3
    mask = None
    if masked:
        mask = torch.rand(batch, tokens, generator=generator) > 0.4
        mask[:, tokens // 2] = True
        mask = mask.to(device)
    types = [dtype if name in INPUTS_IN_ANY_TYPE else torch.float32 for name in NAMES]
    tensors = [t if t is None else t.to(device, kind) for t, kind in zip(tensors, types, strict=True)]
    return tensors, mask


def check(tensors, mask, backend, eps=1e-8, denominator=False, scale_eps=1e-8, tolerance=2e-5, outputs=OUTPUTS):
    """Values and the gradients of every tensor, for random cotangents of some outputs, in relative Frobenius norm.

    float32 keeps 7 digits of sums of up to a few thousand terms: 2e-5. One ReLU whose argument is within rounding of 0
    may open in one precision and not in the other; a norm is hardly moved by that, a largest difference would be.
    """
    options = (tensors[0].shape[-1] ** -0.5, 5.0, eps, denominator, scale_eps)
    learned = [i for i, t in enumerate(tensors) if t is not None]
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    exact = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    actual, expected = run(leaves, mask, options, backend), equations(exact, mask, *options)
    used = [OUTPUTS.index(name) for name in outputs]
    cotangents = [torch.randn(expected[i].shape).to(actual[i]) for i in used]
    sources = [leaves[i] for i in learned], [exact[i] for i in learned]
    grads = torch.autograd.grad([actual[i] for i in used], sources[0], cotangents)
    cotangents = [cotangent.double() for cotangent in cotangents]
    expected_grads = torch.autograd.grad(
        [expected[i] for i in used], sources[1], cotangents, allow_unused=True, materialize_grads=True
    )
    names = [*OUTPUTS, *(f"grad of {NAMES[i]}" for i in learned)]
    for name, one, other in zip(names, [*actual, *grads], [*expected, *expected_grads], strict=True):
        assert one.shape == other.shape, name
        rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(one.dtype, 0.0)
        error = (one.double() - other).norm() / other.norm().clamp_min(1e-3)
        assert error <= tolerance + rounding, f"{name}: {error:.2e}"
    assert [g.dtype for g in grads] == [tensors[i].dtype for i in learned]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (2, 3, 7, 33), (2, 4, 37, 16), (1, 5, 20, 300)], ids=str)
def test_equals_the_equations_in_value_and_every_gradient(shape, masked, backend):
    check(*problem(*shape, masked=masked), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_layer_norm_before_the_relu(masked, backend):
    check(*problem(2, 3, 11, 20, normed=True, masked=masked), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("denominator", [False, True], ids=["numerator", "denominator"])
@pytest.mark.parametrize("normed", [False, True])
def test_both_conventions_of_eps(normed, denominator, backend):
    check(*problem(2, 3, 11, 20, normed=normed, masked=True), backend, 0.05, denominator, scale_eps=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_inputs_and_results_only(dtype, backend):
    check(*problem(2, 3, 11, 40, dtype, normed=dtype is torch.float16), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_gradient_of_each_output_alone(output, backend):
    check(*problem(1, 3, 9, 12), backend, outputs=(output,))


def test_tokens_split_among_programs_are_added_up(monkeypatch):
    from slotkernels.invariant_slot_attention import triton

    monkeypatch.setattr(triton, "SMALLEST_SPLIT", 2)
    launch = triton.tokens_launch(256, 3, gradient=True)
    sizes = triton._Sizes(1, 21, 3, 5.0)
    assert triton._tokens_programs(launch, 256, sizes)[0][2] == 2
    check(*problem(1, 3, 21, 256, torch.bfloat16), "triton")
    check(*problem(1, 3, 21, 256), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("denominator", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_a_fully_masked_sample_has_zero_update_finite_gradients(eps, denominator, backend):
    tensors, mask = problem(2, 3, 7, 8, masked=True)
    mask[0] = False
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    outputs = run(leaves, mask, (0.3, 5.0, eps, denominator, 1e-8), backend)
    assert torch.equal(outputs[0][0], torch.zeros(3, 8))
    assert outputs[0][1].abs().sum() > 0
    sum((t * torch.randn_like(t)).sum() for t in outputs).backward()
    assert all(t.grad.isfinite().all() for t in leaves if t is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend):
    tensors, mask = problem(2, 3, 7, 8, normed=True, masked=True)

    def spread(t):
        return None if t is None else torch.stack([t, t + 1], -1)[..., 0]

    outputs = run(tensors, mask, OPTIONS, backend)
    strided = run(map(spread, tensors), torch.stack([mask, ~mask], -1)[..., 0], OPTIONS, backend)
    for one, other in zip(outputs, strided, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_has_empty_results_and_zero_gradients(backend):
    tensors, _ = problem(0, 3, 7, 8)
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    outputs = run(leaves, None, OPTIONS, backend)
    assert [tuple(t.shape) for t in outputs] == [(0, 3, 8), (0, 3, 7), (0, 3, 7), (0, 3, 2), (0, 3, 2)]
    outputs[0].sum().backward()
    assert torch.equal(leaves[NAMES.index("frame")].grad, torch.zeros(2, 8))
    assert leaves[GRID].grad.shape == (0, 7, 2)


def test_triton_gives_the_same_bits_twice():
    tensors, mask = problem(2, 3, 40, 64, normed=True, masked=True)
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    learned = [t for t in leaves if t is not None]

    def step():
        outputs = run(leaves, mask, OPTIONS, "triton")
        return [*outputs, *torch.autograd.grad(outputs, learned, [t.detach() for t in outputs])]

    assert all(torch.equal(one, other) for one, other in zip(step(), step(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_grid_has_no_gradient_unless_it_is_learned(backend):
    tensors, mask = problem(2, 3, 40, 64, normed=True, masked=True)
    cotangents = [torch.randn_like(t) for t in run(tensors, mask, OPTIONS, backend)]
    gradients = []
    for learns in (False, True):
        leaves = [t if t is None else t.clone().requires_grad_(learns or i != GRID) for i, t in enumerate(tensors)]
        learned = [t for t in leaves if t is not None and t.requires_grad]
        gradients.append(list(torch.autograd.grad(run(leaves, mask, OPTIONS, backend), learned, cotangents)))
    constant, learned = gradients
    assert learned.pop(GRID).abs().min() > 0
    assert all(torch.equal(one, other) for one, other in zip(constant, learned, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normed", [False, True])
def test_passes_opcheck(normed, backend):
    tensors, mask = problem(2, 3, 7, 8, normed=normed, masked=True)
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    ops = torch.ops.slotkernels
    torch.library.opcheck(ops.invariant_attention, (*leaves, mask, *OPTIONS, backend))
    tensors = [t if t is None else t.detach() for t in tensors]
    outputs = run(tensors, mask, OPTIONS, backend)
    grads = (torch.randn_like(outputs.updates), None, None, torch.randn_like(outputs.positions), None)
    for constants in ((1, 7), (1, GRID, 7)):
        needs = [t is not None and i not in constants for i, t in enumerate([*tensors, None])]
        arguments = (*grads, *tensors, mask, *OPTIONS, *outputs[1:], needs)
        torch.library.opcheck(ops.invariant_attention_backward, (*arguments, backend))
        forward = Arguments(*tensors, mask, *OPTIONS)
        gradients = INVARIANT_ATTENTION_BACKWARD.apply(
            BackwardArguments(Cotangents(*grads), forward, *outputs[1:], needs), backend
        )
        assert [t.numel() > 0 for t in gradients] == needs[:-1]


@pytest.mark.parametrize(
    ("backend", "slots", "dtype", "message"),
    [
        ("triton", 3, torch.float64, "float64"),
        ("triton", 129, torch.float32, "129 slots, more than 128"),
        ("cuda", 3, torch.float32, "not implemented for invariant_attention"),
    ],
)
def test_a_backend_that_cannot_serve_says_why(backend, slots, dtype, message):
    tensors, mask = problem(1, slots, 7, 8)
    tensors = [t if t is None else t.to(dtype) for t in tensors]
    with pytest.raises(RuntimeError, match=rf"{message}.*Available: .*reference"):
        run(tensors, mask, OPTIONS, backend)


def test_without_the_interpreter_triton_refuses_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="tensors on cpu"):
        run(problem(1, 3, 7, 8)[0], None, OPTIONS, "triton")


FULL_SIZE = [
    (2, 8, 863, 768),
    (2, 11, 1152, 64),
    (1, 32, 864, 768),
    (1, 33, 577, 1024),
    (3, 20, 864, 127),
    (4, 1, 7, 5),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", FULL_SIZE, ids=str)
def test_full_size_equals_the_equations(shape, normed, dtype):
    check(*problem(*shape, dtype, normed=normed, masked=shape[0] == 2, device="cuda"), "triton", tolerance=2e-4)


@pytest.mark.gpu
def test_no_tensor_of_slots_times_tokens_times_width_is_stored():
    tensors, _ = problem(4, 32, 864, 768, torch.bfloat16, device="cuda")
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = run(leaves, None, OPTIONS, "triton")
    sum(t.float().sum() for t in outputs).backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 4 * 32 * 864 * 768 / 4


@pytest.mark.gpu
def test_can_be_captured_in_a_cuda_graph():
    tensors, _ = problem(2, 8, 100, 64, device="cuda")
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    learned = [t for t in leaves if t is not None]

    def step():
        outputs = run(leaves, None, OPTIONS, "triton")
        return [*outputs, *torch.autograd.grad(outputs, learned, [torch.ones_like(t) for t in outputs])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))
