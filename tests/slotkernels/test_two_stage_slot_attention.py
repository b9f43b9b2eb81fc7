"""Residual slot attention and groups of a call, as in SMTC's two stages: tokens are prepared once; the first slots are
semantics; then each group of slots gets only the tokens of its semantic.
"""

import math

import pytest
import torch
from slotkernels import SlotAttention, inverted_attention, slot_attention, use_backend
from slotkernels.slot_attention import SAVI, STANDARD, VIDEOSAUR
from slotkernels.slot_attention.reference import textbook_slot_attention

from .oracles import assert_matches_oracle

BATCH, TOKENS, SEMANTICS, INSTANCES, DIM, WIDTH = 2, 9, 3, 2, 6, 5
WITH_BIAS = STANDARD._replace(qkv_bias=True)


@pytest.fixture(params=["absorbed", "projected"])
def form(request, monkeypatch):
    """Keys and values are absorbed, or projected."""
    monkeypatch.setattr(slot_attention.module, "absorbs", lambda *sizes: request.param == "absorbed")
    return request.param


def make(implicit="bilevel", conventions=WITH_BIAS, update="residual", dtype=torch.float64):
    module = SlotAttention(
        SEMANTICS, DIM, WIDTH, hidden_dim=DIM, implicit=implicit, update=update, conventions=conventions, prior=False
    ).to(dtype)
    for parameter in module.parameters():  # biases and norms away from their special initial values
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def arguments(dtype=torch.float64):
    """Tokens, a slot for each semantic, instance slots, and the tokens of each semantic; the last semantic has none."""
    shapes = (TOKENS, WIDTH), (SEMANTICS, DIM), (SEMANTICS * INSTANCES, DIM)
    inputs, slots, instances = (torch.randn(BATCH, *shape, dtype=dtype, requires_grad=True) for shape in shapes)
    mask = torch.rand(BATCH, SEMANTICS, TOKENS) > 0.4
    mask[:, -1] = False
    return inputs, slots, instances, mask


def two_stages(module, mask):
    """Both stages as SMTC calls them, a function of tokens and initial slots."""

    def function(inputs, slots, instances, **parameters):
        prepared = module.prepare(inputs)
        stage = module(prepared, slots)
        return *stage, *module(prepared.masked(mask), instances, groups=SEMANTICS)

    return function


def check(function, oracle, module, inputs, slots, instances):
    """Results of both stages and the gradients of tokens, slots and every parameter, for random cotangents."""
    leaves = {"inputs": inputs, "slots": slots, "instances": instances, **dict(module.named_parameters())}
    names = ("slots", "attention", "instance slots", "instance attention")
    assert_matches_oracle(function, oracle, leaves, names, 1e-9, float64=False)


@pytest.mark.parametrize("update", ["residual", "gru"])
@pytest.mark.parametrize(
    "conventions", [WITH_BIAS, SAVI, STANDARD._replace(use_mlp=False)], ids=["biases", "eps below", "no MLP"]
)
@pytest.mark.parametrize("implicit", ["bilevel", "detach", "none"])
def test_two_stages_equal_the_textbook(form, implicit, conventions, update):
    module, (*leaves, mask) = make(implicit, conventions, update), arguments()

    def oracle(inputs, slots, instances, **parameters):
        stage = textbook_slot_attention(module, inputs, slots)
        return *stage, *textbook_slot_attention(module, inputs, instances, mask, groups=SEMANTICS)

    check(two_stages(module, mask), oracle, module, *leaves)


def naive(module, inputs, slots, groups, mask):
    """SMTC's iteration in loops over samples, groups and slots; all iterations or only the last have gradients."""
    x = module.norm_inputs(inputs)
    k, v = module.to_k(x), module.to_v(x)
    size, tokens = slots.shape[1] // groups, range(inputs.shape[1])
    new_slots, attentions = [], []
    for b in range(inputs.shape[0]):
        state, initial = slots[b], slots[b]
        for iteration in range(module.iterations):
            if module.implicit == "bilevel" and iteration == module.iterations - 1:
                state = state.detach() + initial - initial.detach()
            q = module.to_q(module.norm_slots(state))
            rows, columns = [], []
            for g in range(groups):
                members = range(g * size, (g + 1) * size)
                seen = [m for m in tokens if mask is None or mask[b, g, m]]
                odds = {n: [torch.exp(k[b, m] @ q[n] / math.sqrt(DIM)) for m in tokens] for n in members}
                for n in members:
                    column = [odds[n][m] / sum(odds[p][m] for p in members) for m in tokens]
                    total = sum(column[m] + 1e-8 for m in seen)
                    update = sum(((column[m] + 1e-8) / total * v[b, m] for m in seen), torch.zeros(DIM).double())
                    moved = state[n] + update
                    rows.append(moved + module.mlp(module.norm_mlp(moved)))
                    columns.append(torch.stack(column))
            state = torch.stack(rows)
        new_slots.append(state)
        attentions.append(torch.stack(columns, 1))
    return torch.stack(new_slots), torch.stack(attentions)


@pytest.mark.parametrize("implicit", ["bilevel", "none"])
def test_two_stages_equal_loops_over_every_token(form, implicit):
    module, (*leaves, mask) = make(implicit), arguments()

    def oracle(inputs, slots, instances, **parameters):
        stage = naive(module, inputs, slots, 1, None)
        return *stage, *naive(module, inputs, instances, SEMANTICS, mask)

    check(two_stages(module, mask), oracle, module, *leaves)


def test_group_without_tokens_is_moved_by_the_mlp_alone(form):
    module, (inputs, _, instances, mask) = make(), arguments()
    result = module(module.prepare(inputs).masked(mask), instances, iterations=1, groups=SEMANTICS).slots
    left = instances[:, -INSTANCES:]
    torch.testing.assert_close(result[:, -INSTANCES:], left + module.mlp(module.norm_mlp(left)))
    assert not torch.allclose(result, instances + module.mlp(module.norm_mlp(instances)))


def test_group_does_not_see_what_changes_in_others(form):
    module, (inputs, _, instances, mask) = make(), arguments()
    before = module(module.prepare(inputs).masked(mask), instances, groups=SEMANTICS)
    others = torch.arange(SEMANTICS * INSTANCES) >= INSTANCES  # slots of all groups but the first
    changed = torch.where(others.view(1, -1, 1), torch.randn_like(instances), instances)
    other_mask = mask.clone()
    other_mask[:, 1:] = ~mask[:, 1:]
    after = module(module.prepare(inputs).masked(other_mask), changed, groups=SEMANTICS)
    for name, one, other in zip(("slots", "attention"), before, after, strict=True):
        dim = 1 if name == "slots" else 2
        torch.testing.assert_close(other.narrow(dim, 0, INSTANCES), one.narrow(dim, 0, INSTANCES))
        rest = INSTANCES * (SEMANTICS - 1)
        assert not torch.allclose(other.narrow(dim, INSTANCES, rest), one.narrow(dim, INSTANCES, rest))


def test_one_instance_that_sees_all_tokens_takes_their_mean(form):
    module, (inputs, slots, _, _) = make(), arguments()
    everything = torch.ones(BATCH, SEMANTICS, TOKENS, dtype=torch.bool)
    result, attention = module(module.prepare(inputs).masked(everything), slots, groups=SEMANTICS)
    mean = module.to_v(module.norm_inputs(inputs)).mean(1, keepdim=True)
    expected = slots
    for _ in range(module.iterations):
        expected = expected + mean
        expected = expected + module.mlp(module.norm_mlp(expected))
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(attention, torch.ones_like(attention))


@pytest.mark.parametrize("implicit", ["bilevel", "none"])
def test_initial_slots_get_the_gradient_of_a_residual_path(implicit):
    """Unlike a GRU, the residual update keeps the slots: with zero weights the gradient is the identity."""
    module, (inputs, slots, _, _) = make(implicit), arguments()
    for parameter in module.parameters():
        parameter.data.zero_()
    cotangent = torch.randn_like(slots)
    (grad,) = torch.autograd.grad(module(inputs, slots).slots, slots, cotangent)
    torch.testing.assert_close(grad, cotangent)


def test_masks_narrow_each_other_down(form):
    module, (inputs, slots, instances, mask) = make(), arguments()
    seen = torch.rand(BATCH, TOKENS) > 0.2
    hidden = inputs.detach().masked_fill(~seen.unsqueeze(2), torch.nan)
    expected = module(inputs, instances, mask & seen.unsqueeze(1), groups=SEMANTICS).slots
    for prepared in (module.prepare(hidden, seen).masked(mask), module.prepare(inputs).masked(mask).masked(seen)):
        torch.testing.assert_close(module(prepared, instances, groups=SEMANTICS).slots, expected)
    torch.testing.assert_close(module(module.prepare(inputs).masked(seen), slots), module(inputs, slots, seen))


def test_groups_of_a_call_take_the_place_of_the_modules(form):
    module, (inputs, _, instances, mask) = make(), arguments()
    expected = module(inputs, instances, mask, groups=SEMANTICS)
    module.groups = SEMANTICS
    torch.testing.assert_close(module(inputs, instances, mask), expected)
    torch.testing.assert_close(
        module(inputs, instances, groups=1), textbook_slot_attention(module, inputs, instances, groups=1)
    )


def test_a_residual_module_has_no_gru():
    module = make()
    assert not [name for name in module.state_dict() if name.startswith("gru")]
    module.load_state_dict(make().state_dict())


def test_autocast_keeps_the_residual_state_float32():
    module, (inputs, slots, instances, mask) = make(dtype=torch.float32), arguments(torch.float32)
    expected = two_stages(module, mask)(inputs, slots, instances)
    with torch.autocast("cpu", torch.bfloat16):
        actual = two_stages(module, mask)(inputs, slots, instances)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        # bf16 keeps 8 bits; three iterations of some ten products leave some 2^-5 of slots whose size is about 3.
        assert (one - other).abs().max() < 0.15
    # The state itself is not rounded: slots that see nothing and have no MLP stay what they are.
    module.mlp[2].weight.data.zero_()
    module.mlp[2].bias.data.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        stays = module(module.prepare(inputs).masked(mask), instances, groups=SEMANTICS).slots
    assert torch.equal(stays[:, -INSTANCES:], instances[:, -INSTANCES:])


def test_both_stages_compile_fullgraph(form):
    module, (*leaves, mask) = make(), arguments()
    stages = two_stages(module, mask)

    def loss(*leaves):
        slots, attention, instances, owned = stages(*leaves)
        return slots.square().sum() + attention.square().sum() + instances.sin().sum() + owned.square().sum()

    expected, actual = (f(*leaves) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")))
    torch.testing.assert_close(actual, expected)
    inputs = [*leaves, *module.parameters()]
    torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize("conventions", [WITH_BIAS, STANDARD._replace(use_mlp=False)], ids=["biases", "no MLP"])
def test_triton_kernels_together_equal_the_textbook(form, conventions):
    module, (*leaves, mask) = make(conventions=conventions, dtype=torch.float32), arguments(torch.float32)
    exact = make(conventions=conventions)
    exact.load_state_dict(module.state_dict())

    def oracle(inputs, slots, instances):
        stage = textbook_slot_attention(exact, inputs, slots)
        return *stage, *textbook_slot_attention(exact, inputs, instances, mask, groups=SEMANTICS)

    names = ("slots", "attention", "instance slots", "instance attention")
    inputs = dict(zip(("inputs", "slots", "instances"), leaves, strict=True))
    with use_backend("triton"):
        # float32: ten products of ten terms in a row, three times.
        assert_matches_oracle(two_stages(module, mask), oracle, inputs, names, 1e-4)


GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("groups", [1, 16], ids=["semantics", "instances"])
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "tokens"),
    [
        ("cpp", "cpu", torch.float32, 256),
        ("cpp", "cpu", torch.float32, 864),
        ("triton", "cpu", torch.float32, 40),  # in the interpreter, which is slow
        *(
            pytest.param("triton", "cuda", dtype, tokens, marks=GPU)
            for dtype in (torch.float32, torch.bfloat16)
            for tokens in (256, 864)
        ),
    ],
    ids=str,
)
def test_kernels_serve_the_sizes_of_smtc(backend, device, dtype, tokens, groups):
    """16 semantics, and 4 instances of each; width 384, biases, and gradients of the tokens."""
    slots = 16 if groups == 1 else 64
    shapes = {"q": (2, slots, 384), "k": (2, tokens, 384), "bias": (2, slots)}
    tensors = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    tensors |= {name: tensors[name].to(dtype) for name in ("q", "k")}
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    mask = torch.rand(2, groups, tokens, device=device) > 0.7 if groups > 1 else None
    if mask is not None:
        mask[0, 3] = False

    def attend(backend):
        options = {"mask": mask, "groups": groups, "return_attention": True, "backend": backend}
        return lambda **tensors: inverted_attention(**tensors, **options)

    # float32: sums of 864 products; bf16: rounded weights and results, in sums of numbers of both signs.
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert_matches_oracle(attend(backend), attend("reference"), tensors, ("updates", "attention"), tolerance)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SlotAttention(2, 4, update="add"), "update='add', expected one of gru, residual"),
        (lambda: SlotAttention(2, 4, update="residual", qkv_dim=3), "qkv_dim=3, expected dim=4 for update='residual'"),
        (
            lambda: SlotAttention(2, 4, update="residual", conventions=VIDEOSAUR),
            "gru_state='normalised', expected 'slots' for update='residual'",
        ),
        (lambda: make()(arguments()[0], arguments()[2], groups=4), "groups=4, expected a divisor of num_slots=6"),
        (lambda: make()(arguments()[0], arguments()[2], groups=0), "groups=0, expected a divisor of num_slots=6"),
        (lambda: prepared().masked(torch.ones(2, 9)), r"mask is float32 \[2, 9\], expected dtype bool"),
        (lambda: prepared().masked(torch.ones(2, 3, 8).bool()), r"mask is bool \[2, 3, 8\], .* with M = 9"),
        (lambda: prepared().masked(torch.ones(9).bool()), r"mask is bool \[9\], expected \[B, groups, M\]"),
        (
            lambda: prepared().masked(torch.ones(2, 3, 9).bool()).masked(torch.ones(2, 2, 9).bool()),
            "expected .* with groups = 3",
        ),
        (
            lambda: make()(prepared().masked(torch.ones(2, 2, 9).bool()), arguments()[2], groups=3),
            r"mask is bool \[2, 2, 9\], expected .* with G = 3",
        ),
    ],
)
def test_bad_calls_are_value_errors_that_name_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def prepared():
    return make().prepare(arguments()[0])
