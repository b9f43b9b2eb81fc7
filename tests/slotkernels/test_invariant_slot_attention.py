import pytest
import torch
from slotkernels import InvariantSlotAttention
from slotkernels.invariant_slot_attention import bytes_moved, flops


def make(**options):
    torch.manual_seed(1)
    module = InvariantSlotAttention(3, 6, 5, iterations=2, **options).double()
    inputs = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    grid = torch.rand(7, 2, dtype=torch.float64) * 2 - 1
    return module, inputs, grid


def slot_by_slot(module, inputs, grid, mask):
    """Oracle: SOLV eq. 13-17 for one sample and one slot at a time, autograd through everything."""
    outputs = []
    for row in range(len(inputs)):
        x = module.norm_inputs(inputs[row])
        g, keep = grid if grid.dim() == 2 else grid[row], mask[row].double()
        slots, positions, scales = module.initial_slots, module.initial_positions, module.initial_scales
        for iteration in range(module.iterations + 1):
            logits, values = [], []
            for n in range(module.num_slots):
                frame = module.g((g - positions[n]) / (module.scale_factor * scales[n]))
                values.append(module.f(module.to_v(x) + frame))
                logits.append(module.f(module.to_k(x) + frame) @ module.to_q(module.norm_slots(slots[n])) / 6**0.5)
            attention = torch.stack(logits, 1).softmax(1)
            weights = (attention + module.eps) * keep.unsqueeze(1)
            weights = weights / weights.sum(0)
            positions = weights.t() @ g
            deviations = [(weights[:, n] + module.scale_eps * keep) @ (g - positions[n]) ** 2 for n in range(3)]
            scales = torch.stack(deviations).sqrt()
            if module.scale_range is not None:
                scales = scales.clamp(*module.scale_range)
            if iteration < module.iterations:
                updates = torch.stack([weights[:, n] @ values[n] for n in range(3)])
                slots = module.gru(updates, slots)
                slots = slots + module.mlp(module.norm_mlp(slots))
        outputs.append((slots, attention, positions, scales))
    return [torch.stack(parts) for parts in zip(*outputs, strict=True)]


@pytest.mark.parametrize("options", [{}, {"scale_range": (0.3, 0.5), "eps": 0.01, "scale_eps": 0.1}], ids=str)
@pytest.mark.parametrize("own_grid", [False, True])
def test_equals_the_equations_slot_by_slot_in_value_and_every_gradient(options, own_grid):
    module, inputs, grid = make(**options)
    if own_grid:
        grid = torch.rand(2, 7, 2, dtype=torch.float64) * 2 - 1
    grid.requires_grad_()
    mask = torch.rand(2, 7) > 0.3
    parameters = dict(module.named_parameters())
    actual = module(inputs, grid, mask=mask)
    expected = slot_by_slot(module, inputs, grid, mask)
    torch.testing.assert_close(list(actual), expected, rtol=1e-9, atol=1e-11)
    cotangents = [torch.randn(t.shape, dtype=torch.float64) for t in actual]
    leaves = [inputs, grid, *parameters.values()]
    grads = torch.autograd.grad(list(actual), leaves, cotangents)
    expected_grads = torch.autograd.grad(expected, leaves, cotangents)
    for name, grad, reference in zip(["inputs", "grid", *parameters], grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-8, atol=1e-10, msg=name)


def test_slots_do_not_change_when_everything_is_moved_and_scaled():
    module, inputs, grid = make(scale_eps=0.0)
    shift, factor = torch.tensor([0.3, -0.2], dtype=torch.float64), 1.7
    before = module(inputs, grid)
    with torch.no_grad():
        module.initial_positions.mul_(factor).add_(shift)
        module.initial_scales.mul_(factor)
    after = module(inputs, grid * factor + shift)
    torch.testing.assert_close(after.slots, before.slots)
    torch.testing.assert_close(after.attention, before.attention)
    torch.testing.assert_close(after.positions, before.positions * factor + shift)
    torch.testing.assert_close(after.scales, before.scales * factor)


def test_a_single_token_has_finite_gradients():
    module, inputs, grid = make()
    output = module(inputs[:, :1], grid[:1])
    sum(part.sum() for part in output).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_given_slots_masks_and_empty_batches():
    module, inputs, grid = make()
    mask = torch.arange(7).expand(2, 7) < 4
    given = module.initial_slots.expand(2, 3, 6)
    masked = module(inputs, grid, given, mask)
    short = module(inputs[:, :4], grid[:4])
    torch.testing.assert_close(masked.slots, short.slots)
    torch.testing.assert_close(masked.scales, short.scales)
    assert module(inputs[:0], grid).slots.shape == (0, 3, 6)


def test_autocast_stays_near_float32():
    module, inputs, grid = make()
    module, inputs, grid = module.float(), inputs.detach().float(), grid.float()
    expected = module(inputs, grid)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(inputs, grid)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < 0.1  # bf16 keeps 8 bits; relative positions reach 5, slots 2
    sum(part.sum() for part in actual).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in module.parameters())


def test_compiles_fullgraph_and_passes_opcheck():
    module, inputs, grid = make()
    parameters = list(module.parameters())
    expected = torch.autograd.grad(module(inputs, grid).slots.square().sum(), parameters)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(inputs, grid).slots.square().sum(), parameters), expected)

    q = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    layers = (module.g, module.f[0], module.f[2])
    weights = [t.detach() for layer in layers for t in (layer.weight, layer.bias)]
    k, v, frame = (
        torch.randn_like(q[:, :1]).expand(2, 7, 6),
        torch.randn(2, 7, 6).double(),
        torch.rand(2, 3, 2).double(),
    )
    tensors = [q, k.contiguous(), v, grid.expand(2, 7, 2).contiguous(), frame, frame + 0.1, *weights]
    torch.library.opcheck(torch.ops.slotkernels.invariant_attention, (*tensors, None, 5.0, 1e-8, 1e-8, "auto"))
    tensors = [t.detach() for t in tensors]
    grads = [torch.randn(2, 3, 6).double(), None, torch.randn(2, 3, 2).double(), None]
    needs = [True] * 3 + [False] * 3 + [True] * 6
    options = (None, 5.0, 1e-8, 1e-8, needs, "auto")
    torch.library.opcheck(torch.ops.slotkernels.invariant_attention_backward, (grads, tensors, *options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, g: InvariantSlotAttention(0, 4), "num_slots=0"),
        (lambda m, x, g: InvariantSlotAttention(2, 4, scale_range=(2, 1)), r"scale_range=\(2, 1\)"),
        (lambda m, x, g: m(x[0], g), r"inputs is float64 \[7, 5\], expected \[B, M, Din\]"),
        (lambda m, x, g: m(x, g[:5]), r"grid is float64 \[2, 5, 2\], expected \[B, M, 2\] with M = 7"),
        (lambda m, x, g: m(x, g, torch.zeros(2, 4, 6)), "slots is .* with N = 3"),
        (lambda m, x, g: m(x, g, None, torch.ones(2, 7)), "mask is .*expected dtype bool"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call(*make())


def test_cost_formulas():
    assert bytes_moved(1, 2, 3, 4) == 4 * (4 * 10 + 32) + 24
    assert flops(1, 2, 3, 4) == 8 * 2 * 3 * 4 * 2 + 4 * 3 * 16 + 4 * 2 * 16
