"""The module InvariantSlotAttention, compared with SOLV's equations for one sample and one slot at a time."""

import pytest
import torch
from slotkernels import InvariantSlotAttention, InvariantSlotAttentionOutput, use_backend
from slotkernels.invariant_slot_attention import bytes_moved, flops

from .label_cases import needs_cpp
from .oracles import assert_matches_oracle


def make(**options):
    torch.manual_seed(1)
    module = InvariantSlotAttention(3, 6, 5, iterations=2, **options).double()
    inputs = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    grid = torch.rand(7, 2, dtype=torch.float64) * 2 - 1
    return module, inputs, grid


def slot_by_slot(module, inputs, grid, mask, initial_positions=None, initial_scales=None, mlp_mask=None):
    """Oracle: SOLV eq. 13-17 for one sample and one slot at a time, autograd through everything."""
    f = module.f if module.norm_f is None else torch.nn.Sequential(module.norm_f, module.f)
    outputs = []
    for row in range(len(inputs)):
        x = module.norm_inputs(inputs[row])
        g, keep = grid if grid.dim() == 2 else grid[row], mask[row].double()
        slots = module.initial_slots
        positions = module.initial_positions if initial_positions is None else initial_positions[row]
        scales = module.initial_scales if initial_scales is None else initial_scales[row]
        for iteration in range(module.iterations + 1):
            logits, values = [], []
            for n in range(module.num_slots):
                frame = module.g((g - positions[n]) / (module.scale_factor * scales[n]))
                values.append(f(module.to_v(x) + frame))
                logits.append(f(module.to_k(x) + frame) @ module.to_q(module.norm_slots(slots[n])) / 6**0.5)
            attention = torch.stack(logits, 1).softmax(1)
            if module.eps_placement == "numerator":
                weights = (attention + module.eps) * keep.unsqueeze(1)
                weights = weights / weights.sum(0)
            else:
                weights = attention * keep.unsqueeze(1)
                weights = weights / (weights.sum(0) + module.eps)
            positions = weights.t() @ g
            deviations = [(weights[:, n] + module.scale_eps * keep) @ (g - positions[n]) ** 2 for n in range(3)]
            scales = torch.stack(deviations).sqrt()
            if module.scale_range is not None:
                scales = scales.clamp(*module.scale_range)
            if iteration < module.iterations:
                updates = torch.stack([weights[:, n] @ values[n] for n in range(3)])
                slots = module.gru(updates, slots)
                added = module.mlp(module.norm_mlp(slots))
                slots = slots + (added if mlp_mask is None else mlp_mask[row, iteration] * added)
        outputs.append((module.norm_slots(slots) if module.final_norm else slots, attention, positions, scales))
    return [torch.stack(parts) for parts in zip(*outputs, strict=True)]


VARIANTS = [
    {},
    {"scale_range": (0.3, 0.5), "eps": 0.01, "scale_eps": 0.1},
    {"eps_placement": "denominator", "eps": 0.01, "encoder_dim": 4},
    {"encoder_norm": True, "encoder_dim": 9, "scale_range": (0.3, 0.5), "final_norm": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("own_grid", [False, True])
def test_values_and_gradients_match_the_equations_slot_by_slot(options, own_grid):
    module, inputs, grid = make(**options)
    if own_grid:
        grid = torch.rand(2, 7, 2, dtype=torch.float64) * 2 - 1
    mask = torch.rand(2, 7) > 0.3
    compare(module, inputs, grid, mask)


def compare(module, inputs, grid, mask, **frames):
    """Values and gradients of module and oracle, including those of the grid and of all parameters."""
    if module.norm_f is not None:
        torch.nn.init.normal_(module.norm_f.weight)
        torch.nn.init.normal_(module.norm_f.bias)
    assert_matches_oracle(
        lambda inputs, grid, **_: module(inputs, grid, mask=mask, **frames),
        lambda inputs, grid, **_: slot_by_slot(module, inputs, grid, mask, *frames.values()),
        {"inputs": inputs, "grid": grid.requires_grad_(), **frames, **dict(module.named_parameters())},
        InvariantSlotAttentionOutput._fields,
        1e-9,
        float64=False,
    )


@pytest.mark.parametrize("options", [{}, {"encoder_norm": True, "eps_placement": "denominator"}], ids=str)
@pytest.mark.parametrize("shape", [(7, 2), (2, 7, 2)], ids=str)
def test_gradient_of_the_grid_equals_finite_differences(shape, options):
    module, inputs, _ = make(**options)
    grid = torch.rand(shape, dtype=torch.float64).mul(2).sub(1).requires_grad_()
    mask = torch.arange(7).expand(2, 7) != 3
    assert torch.autograd.gradcheck(lambda grid: module(inputs.detach(), grid, mask=mask), grid, atol=1e-5)
    hidden = torch.autograd.grad(module(inputs, grid, mask=mask).slots.sum(), grid)[0][..., 3, :]
    assert torch.equal(hidden, torch.zeros_like(hidden))


def test_final_norm_changes_the_returned_slots_alone():
    module, inputs, grid = make()
    torch.nn.init.normal_(module.norm_slots.weight)
    before = module(inputs, grid)
    module.final_norm = True
    after = module(inputs, grid)
    assert torch.equal(after.slots, module.norm_slots(before.slots))
    assert all(torch.equal(one, other) for one, other in zip(before[1:], after[1:], strict=True))


def test_the_published_code_of_biza_et_al():
    options = {"eps_placement": "denominator", "encoder_norm": True, "encoder_dim": 12, "scale_range": (0.001, 2.0)}
    module, inputs, grid = make(**options)
    module.norm_f.eps = 1e-6
    positions = torch.rand(2, 3, 2, dtype=torch.float64).mul(2).sub(1).requires_grad_()
    scales = (0.1 + 0.1 * torch.randn(2, 3, 2, dtype=torch.float64)).clamp(0.001, 2.0).requires_grad_()
    compare(module, inputs, grid, torch.ones(2, 7, dtype=torch.bool), positions=positions, scales=scales)


def test_a_mask_multiplies_what_the_mlp_adds():
    module, inputs, grid = make()
    mlp_mask = torch.rand(2, 2, 3, 6, dtype=torch.float64).mul(2).sub(0.5).relu().requires_grad_()
    assert_matches_oracle(
        lambda mlp_mask, **_: module(inputs, grid, mlp_mask=mlp_mask),
        lambda mlp_mask, **_: slot_by_slot(module, inputs, grid, torch.ones(2, 7), mlp_mask=mlp_mask),
        {"mlp_mask": mlp_mask, **dict(module.named_parameters())},
        InvariantSlotAttentionOutput._fields,
        1e-9,
        float64=False,
    )
    ones = module(inputs, grid, mlp_mask=torch.ones(2, 2, 3, 6))
    assert all(torch.equal(one, other) for one, other in zip(ones, module(inputs, grid), strict=True))


@pytest.mark.parametrize("backend", ["triton", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("options", [{}, {"encoder_norm": True, "eps_placement": "denominator"}], ids=str)
def test_kernels_equal_the_reference_in_float32(options, backend):
    module, inputs, grid = make(**options)
    module, inputs, grid = module.float(), inputs.detach().float(), grid.float()
    parameters, results = [grid.requires_grad_(), *module.parameters()], []
    cotangents = [torch.randn(2, 3, 6), torch.randn(2, 7, 3), torch.randn(2, 3, 2), torch.randn(2, 3, 2)]
    for name in ("reference", backend):
        with use_backend(name):
            output = module(inputs, grid)
        results.append([*output, *torch.autograd.grad(list(output), parameters, cotangents)])
    # Three rounds of attention, in which a slot's scale divides, turn the 1e-7 of float32 into 1e-5.
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_dropped_tokens_and_a_learned_grid(options):
    module, _, _ = make(**options)
    inputs, grid = torch.randn(2, 14, 5, dtype=torch.float64), torch.rand(14, 2, dtype=torch.float64).mul(2).sub(1)
    kept = torch.stack([torch.arange(1, 8), torch.arange(14)[1::2]])  # neither keeps 0, 8, 10, 12
    rows = torch.arange(2).unsqueeze(1)
    actual = assert_matches_oracle(
        lambda inputs, grid, **_: module(inputs[rows, kept], grid[kept]),
        lambda inputs, grid, **_: slot_by_slot(module, inputs[rows, kept], grid[kept], torch.ones(2, 7)),
        {"inputs": inputs.requires_grad_(), "grid": grid.requires_grad_(), **dict(module.named_parameters())},
        InvariantSlotAttentionOutput._fields,
        1e-9,
        float64=False,
    )
    assert torch.equal(actual["gradient of grid"].abs().sum(1) > 0, torch.isin(torch.arange(14), kept))


def test_slots_do_not_change_when_everything_is_moved_and_scaled():
    module, inputs, grid = make(scale_eps=0.0)
    shift, factor = (torch.tensor(t, dtype=torch.float64) for t in ([0.3, -0.2], [1.7, 0.6]))
    before = module(inputs, grid)
    with torch.no_grad():
        module.initial_positions.mul_(factor).add_(shift)
        module.initial_scales.mul_(factor)
    after = module(inputs, grid * factor + shift)
    torch.testing.assert_close(after.slots, before.slots)
    torch.testing.assert_close(after.attention, before.attention)
    torch.testing.assert_close(after.positions, before.positions * factor + shift)
    torch.testing.assert_close(after.scales, before.scales * factor)


def test_a_slot_that_attends_to_all_tokens_alike_spans_the_grid():
    module, _, _ = make()
    torch.nn.init.zeros_(module.to_q.weight)
    width, height = 6, 4
    axes = torch.meshgrid(torch.linspace(-1, 1, width), torch.linspace(-1, 1, height), indexing="xy")
    grid = torch.stack(axes, -1).flatten(0, 1).double()
    output = module(torch.randn(2, width * height, 5, dtype=torch.float64), grid)
    # The variance of n evenly spaced numbers from -1 to 1 is (n + 1) / (3 (n - 1)).
    scales = [((n + 1) / (3 * (n - 1))) ** 0.5 for n in (width, height)]
    torch.testing.assert_close(output.attention, torch.full_like(output.attention, 1 / 3))
    assert output.positions.abs().max() < 1e-7
    torch.testing.assert_close(output.scales, torch.tensor(scales).double().expand(2, 3, 2), rtol=1e-6, atol=0)


def test_a_single_token_has_finite_gradients():
    module, inputs, grid = make()
    output = module(inputs[:, :1], grid[:1])
    sum(part.sum() for part in output).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_given_slots_masks_and_empty_batches():
    module, inputs, grid = make()
    mask = torch.arange(7).expand(2, 7) < 4
    masked = module(inputs, grid, module.initial_slots.expand(2, 3, 6), mask)
    short = module(inputs[:, :4], grid[:4])
    torch.testing.assert_close(masked.slots, short.slots)
    torch.testing.assert_close(masked.scales, short.scales)
    assert module(inputs[:0], grid).slots.shape == (0, 3, 6)


@pytest.mark.parametrize("eps_placement", ["numerator", "denominator"])
def test_a_fully_masked_sample_updates_its_slots_with_zero(eps_placement):
    module, inputs, grid = make(eps_placement=eps_placement)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1] = False
    expected = module.initial_slots
    for _ in range(module.iterations):
        expected = module.gru(torch.zeros_like(expected), expected)
        expected = expected + module.mlp(module.norm_mlp(expected))
    torch.testing.assert_close(module(inputs, grid, mask=mask).slots[1], expected)


@pytest.mark.parametrize("options", [{}, {"encoder_norm": True}], ids=str)
def test_autocast_stays_near_float32(options):
    module, inputs, grid = make(**options)
    module, inputs, grid = module.float(), inputs.detach().float(), grid.float()
    expected = module(inputs, grid)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(inputs, grid)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < 0.1  # bf16 keeps 8 bits; relative positions reach 5, slots 2
    sum(part.sum() for part in actual).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("options", [{}, {"encoder_norm": True}], ids=str)
def test_products_of_weights_keep_their_precision_in_autocast(options):
    module, inputs, _ = make(**options)
    with torch.no_grad():
        exact = module._tokens(inputs.double(), torch.float64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tokens = module.float()._tokens(inputs.float(), torch.float32)
    pairs = [(tokens.frame, exact.frame)]
    if exact.spread is not None:
        pairs += [(tokens.spread.shift, exact.spread.shift), (tokens.spread.axes, exact.spread.axes)]
    for actual, expected in pairs:
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"encoder_norm": True, "eps_placement": "denominator"}], ids=str)
def test_compiles_fullgraph(options):
    module, inputs, grid = make(**options)
    parameters = list(module.parameters())
    expected = torch.autograd.grad(module(inputs, grid).slots.square().sum(), parameters)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(inputs, grid).slots.square().sum(), parameters), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, g: InvariantSlotAttention(0, 4), "num_slots=0"),
        (lambda m, x, g: InvariantSlotAttention(2, 4, scale_range=(2, 1)), r"scale_range=\(2, 1\)"),
        (lambda m, x, g: InvariantSlotAttention(2, 4, eps_placement="both"), "eps_placement='both', expected one of"),
        (lambda m, x, g: InvariantSlotAttention(2, 4, encoder_dim=-1), "encoder_dim=-1"),
        (lambda m, x, g: m(x, g, positions=torch.zeros(2, 3, 3)), r"positions is .*expected \[B, N, 2\]"),
        (lambda m, x, g: m(x, g, scales=torch.ones(1, 3, 2)), "scales is .* with B = 2"),
        (lambda m, x, g: m(x, g, mlp_mask=torch.ones(2, 3, 3, 6)), r"mlp_mask is .*\[B, iterations, N, D\] with itera"),
        (lambda m, x, g: m(x, g, mlp_mask=torch.ones(2, 2, 3, 6).bool()), "mlp_mask is bool"),
        (lambda m, x, g: m(x[0], g), r"inputs is float64 \[7, 5\], expected \[B, M, Din\]"),
        (lambda m, x, g: m(x, g[:5]), r"grid is float64 \[2, 5, 2\], expected \[B, M, 2\] with M = 7"),
        (lambda m, x, g: m(x, g, torch.zeros(2, 4, 6)), "slots is .* with N = 3"),
        (lambda m, x, g: m(x, g, None, torch.ones(2, 7)), "mask is .*expected dtype bool"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make())


def test_a_module_in_bfloat16_runs_and_learns():
    for options in ({}, {"encoder_norm": True}):
        module, inputs, grid = make(**options)
        expected = module(inputs, grid).slots
        module = module.bfloat16()
        slots = module(inputs.bfloat16(), grid.bfloat16(), mlp_mask=torch.ones(2, 2, 3, 6)).slots
        assert slots.dtype == torch.bfloat16
        assert (slots - expected).abs().max() < 0.2  # parameters and inputs keep 8 bits
        slots.sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())


def test_cost_formulas():
    batch, slots, tokens, dim = 2, 3, 5, 7
    vectors, rows, pairs = batch * slots * dim, batch * tokens * dim, batch * slots * tokens
    # forward: q, k, v and updates; attention and weights in float32
    assert bytes_moved(batch, slots, tokens, dim, itemsize=2) == 2 * (2 * vectors + 2 * rows) + 4 * 2 * pairs
    # backward: q, its gradient, the updates' gradient; k, v and theirs; attention, weights and the scores' gradient
    assert bytes_moved(batch, slots, tokens, dim, 2, backward=True) == 2 * (3 * vectors + 4 * rows) + 4 * 3 * pairs
    # keys and values: two multiply-adds for the frame, ReLU, multiply-add
    assert flops(batch, slots, tokens, dim) == 2 * (2 + 2 + 1 + 2) * pairs * dim
    # keys and values: pre-activation, choice, gradient of the token, three sums for frames; then the values' scores and
    # the queries' gradient
    each = (2 + 2) + 1 + 2 + (1 + 2 + 2)
    assert flops(batch, slots, tokens, dim, backward=True) == (2 * each + 2 + 2) * pairs * dim
    # and two sums of each for a learned grid
    assert flops(batch, slots, tokens, dim, True, learned_grid=True) == (2 * (each + 4) + 2 + 2) * pairs * dim


def test_implicit_gradients_are_those_of_the_last_iteration_from_where_the_others_end():
    """Bilevel and detached gradients against the last iteration by itself, started from the detached state."""
    torch.manual_seed(0)
    modules = {
        name: InvariantSlotAttention(3, 8, iterations=3, implicit=name).double()
        for name in ("none", "detach", "bilevel")
    }
    for module in modules.values():
        module.load_state_dict(modules["none"].state_dict())
    inputs, grid = torch.randn(2, 10, 8, dtype=torch.float64), torch.rand(10, 2, dtype=torch.float64)
    weights = [torch.randn(2, 3, size, dtype=torch.float64) for size in (8, 2, 2)]

    def run(module, *initial):
        output = module(inputs, grid, **dict(zip(("slots", "positions", "scales"), initial, strict=False)))
        loss = sum(((output.slots, output.positions, output.scales)[i] * w).sum() for i, w in enumerate(weights))
        return output, loss

    outputs, losses = zip(*(run(module) for module in modules.values()), strict=True)
    assert all(torch.equal(output.slots, outputs[0].slots) for output in outputs)

    before = InvariantSlotAttention(3, 8, iterations=2).double()
    before.load_state_dict(modules["none"].state_dict())
    with torch.no_grad():
        slots = before(inputs, grid).slots
        before.iterations = 1
        _, _, positions, scales = before(inputs, grid)  # of the second attention
    entering = [t.clone().requires_grad_() for t in (slots, positions, scales)]
    last = InvariantSlotAttention(3, 8, iterations=1).double()
    last.load_state_dict(modules["none"].state_dict())
    output, loss = run(last, *entering)
    torch.testing.assert_close(output.slots, outputs[0].slots)
    loss.backward()
    for name, part in (("detach", 1), ("bilevel", 2)):
        losses[part].backward()
        module = modules[name]
        torch.testing.assert_close(module.gru.weight_hh.grad, last.gru.weight_hh.grad)
        torch.testing.assert_close(module.to_k.weight.grad, last.to_k.weight.grad)
        for parameter, tensor in zip(
            (module.initial_slots, module.initial_positions, module.initial_scales), entering, strict=True
        ):
            if name == "detach":
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, tensor.grad.sum(0))
