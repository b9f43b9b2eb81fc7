"""Derivatives that kernels do not have: right in every mode, or one clear error."""

import os
from functools import cache

import geomloss
import pytest
import torch
from slotkernels import (
    InvariantSlotAttention,
    SamplesLoss,
    SlotAttention,
    cluster_slots,
    guided_labels,
    inverted_attention,
    match_slots,
    merge_slots,
    mix_slots,
    propagate_attention,
    propagate_labels,
    propagate_masks,
    sinkhorn_divergence,
    sinkhorn_plan,
    sinkhorn_potentials,
    use_backend,
)
from slotkernels.slot_attention import LUCIDRAINS
from slotkernels.slot_attention.reference import textbook_slot_attention
from slotkernels.slot_update import add_norm, gru_norm
from torch.autograd import forward_ad

MASK = torch.tensor([[True, True, False, True, True], [True, False, True, True, True]])
VALID = torch.tensor([[True, False, True], [True, True, True]])
LABELS = torch.tensor([[0, 1, 0, -1], [0, 0, 1, 2]])
FRAME_GRID = torch.rand(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def simplex(*shape):
    return rand(*shape).softmax(-1)


@cache  # drawn before the transform, which does not allow random numbers
def slot_attention(implicit, **options):
    torch.manual_seed(5)
    return SlotAttention(3, 4, iterations=2, hidden_dim=6, implicit=implicit, **options).double()


@cache
def invariant(**options):
    torch.manual_seed(5)
    return InvariantSlotAttention(3, 4, iterations=1, hidden_dim=6, **options).double()


def joined(*results):
    """One vector of everything that a function returns."""
    return torch.cat([t.flatten() for t in results if t is not None and t.is_floating_point()])


# Functions and their arguments. The second derivatives of the first group are those of the function.
EXACT = {
    "plan": (
        lambda c, a, b: sinkhorn_plan(c, a, b, eps=0.5, iterations=4),
        lambda: (rand(2, 3, 4), simplex(2, 3), simplex(2, 4)),
    ),
    "plan of points": (
        lambda x, y: sinkhorn_plan(x=x, y=y, eps=1.0, iterations=3, p=1),
        lambda: (rand(1, 3, 2), rand(1, 4, 2)),
    ),
    "plan with tolerance": (
        lambda c: sinkhorn_plan(c, eps=0.5, iterations=50, tolerance=1e-3),
        lambda: (rand(2, 3, 3),),
    ),
    "attention": (
        lambda q, k, v, b: inverted_attention(q, k, v, bias=b, mask=MASK, groups=2, return_attention=True),
        lambda: (rand(2, 4, 3), rand(2, 5, 3), rand(2, 5, 2), rand(2, 4)),
    ),
    "attention of keys": (
        lambda q, k: inverted_attention(q, k, eps=0.1, eps_placement="denominator"),
        lambda: (rand(2, 3, 4), rand(2, 5, 4)),
    ),
    "gru_norm": (gru_norm, lambda: (rand(2, 3, 12), rand(2, 3, 12), rand(2, 3, 4), rand(4), rand(4))),
    "add_norm": (add_norm, lambda: (rand(2, 3, 4), rand(2, 3, 4), rand(4), rand(4))),
    "slot attention": (lambda x, s: slot_attention("none")(x, s, MASK), lambda: (rand(2, 5, 4), rand(2, 3, 4))),
    "slot attention, projected": (
        lambda x, s: slot_attention("none", input_dim=40, conventions=LUCIDRAINS)(x, s),
        lambda: (rand(1, 2, 40), rand(1, 3, 4)),
    ),
    "invariant": (
        lambda x, g, s: invariant()(x, g, s, MASK),
        lambda: (rand(2, 5, 4), FRAME_GRID, rand(2, 3, 4)),
    ),
    "invariant, normed": (
        lambda x, g, s: invariant(encoder_norm=True, eps_placement="denominator")(x, g, s),
        lambda: (rand(1, 5, 4), FRAME_GRID, rand(1, 3, 4)),
    ),
    "mix": (mix_slots, lambda: (rand(2, 3, 2, 4), rand(4), rand(1))),
    "mix, some slots": (lambda h, w, b: mix_slots(h, w, b, VALID), lambda: (rand(2, 3, 2, 4), rand(4), rand(1))),
    "merge": (lambda s, a: merge_slots(s, a, LABELS), lambda: (rand(2, 4, 3), rand(2, 2, 4))),
    "propagate": (lambda i, v: propagate_attention(i, v, LABELS), lambda: (rand(2, 2, 3, 2), rand(2, 2, 2, 4))),
}
# The second group detaches parts of its graph, as GeomLoss and implicit differentiation do.
CUT = {
    "divergence": (sinkhorn_divergence, lambda: (rand(2, 4, 3), rand(2, 5, 3))),
    "divergence p 1": (
        lambda x, y: sinkhorn_divergence(x, y, p=1, diameter="problem"),
        lambda: (rand(2, 5, 3), rand(2, 4, 3)),
    ),
    "loss": (
        lambda a, x, b, y: SamplesLoss(debias=False)(a, x, b, y),
        lambda: (simplex(2, 4), rand(2, 4, 3), simplex(2, 5), rand(2, 5, 3)),
    ),
    "potentials": (lambda x, y: sinkhorn_potentials(x, y, diameter=4.0), lambda: (rand(2, 4, 3), rand(2, 5, 3))),
    "bilevel": (lambda x, s: slot_attention("bilevel")(x, s), lambda: (rand(2, 5, 4), rand(2, 3, 4))),
    "detach": (lambda x, s: slot_attention("detach", groups=3)(x, s), lambda: (rand(2, 5, 4), rand(2, 3, 4))),
}
ALL = EXACT | CUT


def case(name):
    """A function of tensors that returns a number, its arguments, and a direction of change."""
    function, make = ALL[name]
    inputs = make()

    def number(*tensors):
        results = function(*tensors)
        vector = joined(*(results if isinstance(results, tuple) else (results,)))
        return vector @ torch.linspace(-1, 2, len(vector), dtype=vector.dtype).cos()

    number(*inputs)  # creates the module
    return number, inputs, tuple(torch.randn_like(t) for t in inputs)


def gradient(number, inputs, create_graph=False):
    leaves = [t if t.requires_grad else t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(number(*leaves), leaves, create_graph=create_graph, materialize_grads=True)


def second(slope, leaves):
    if not slope.requires_grad:  # of a linear function
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad(slope, leaves, materialize_grads=True)


def dot(one, other):
    return sum((a * b).sum() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_forward_mode_is_the_dot_product_with_the_gradient(name):
    number, inputs, direction = case(name)
    expected = dot(gradient(number, inputs), direction)
    value, moved = torch.func.jvp(number, inputs, direction)
    torch.testing.assert_close(value, number(*inputs))
    torch.testing.assert_close(moved, expected)
    with forward_ad.dual_level():
        dual = number(*(forward_ad.make_dual(t, d) for t, d in zip(inputs, direction, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    forward = torch.func.jacfwd(number, argnums=tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(forward, gradient(number, inputs))


@pytest.mark.parametrize("name", ALL)
def test_function_transforms_give_the_gradient(name):
    number, inputs, _ = case(name)
    everything = tuple(range(len(inputs)))
    expected = gradient(number, inputs)
    torch.testing.assert_close(torch.func.grad(number, argnums=everything)(*inputs), expected)
    torch.testing.assert_close(torch.func.jacrev(number, argnums=everything)(*inputs), expected)
    several = tuple(torch.stack((t, 0.7 * t)) for t in inputs)
    if "tolerance" in name:
        with pytest.raises(ValueError, match=r"tolerance=0\.001 cannot be checked inside torch\.vmap"):
            torch.vmap(number)(*several)
        return
    values, grads = torch.vmap(number)(*several), torch.vmap(torch.func.grad(number, argnums=everything))(*several)
    for k in range(2):
        one = tuple(t[k] for t in several)
        torch.testing.assert_close(values[k], number(*one))
        torch.testing.assert_close(tuple(g[k] for g in grads), gradient(number, one))
    partly = torch.vmap(number, in_dims=(0, *[None] * (len(inputs) - 1)))(several[0], *inputs[1:])
    torch.testing.assert_close(partly[1], number(several[0][1], *inputs[1:]))


@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives_equal_finite_differences(name):
    number, inputs, direction = case(name)
    step = 1e-6
    ahead, behind = (
        gradient(number, [t + sign * step * d for t, d in zip(inputs, direction, strict=True)]) for sign in (1, -1)
    )
    expected = [(one - other) / (2 * step) for one, other in zip(ahead, behind, strict=True)]
    leaves = [t.clone().requires_grad_() for t in inputs]
    slope = dot(gradient(number, leaves, create_graph=True), direction)
    torch.testing.assert_close(list(second(slope, leaves)), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_all_ways_to_a_second_derivative_agree(name):
    number, inputs, direction = case(name)
    everything = tuple(range(len(inputs)))
    leaves = [t.clone().requires_grad_() for t in inputs]
    slope = dot(gradient(number, leaves, create_graph=True), direction)
    expected = second(slope, leaves)
    reverse = torch.func.grad(
        lambda *t: dot(torch.func.grad(number, argnums=everything)(*t), direction), argnums=everything
    )(*inputs)
    torch.testing.assert_close(reverse, expected)
    if name in EXACT:  # else not symmetric
        forward = torch.func.jvp(torch.func.grad(number, argnums=everything), inputs, direction)[1]
        torch.testing.assert_close(forward, expected)
        hessian = torch.func.hessian(number)(*inputs)
        assert hessian.shape == inputs[0].shape * 2
        turned = hessian.flatten(0, inputs[0].dim() - 1).flatten(1)
        torch.testing.assert_close(turned, turned.t())


@pytest.mark.parametrize("name", ALL)
def test_vectorised_backward_passes(name):
    number, inputs, _ = case(name)
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = number(*leaves)
    expected = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
    scales = torch.tensor([1.0, -2.0], dtype=torch.float64)
    vectorised = torch.autograd.grad(value, leaves, scales, is_grads_batched=True, allow_unused=True)
    for one, many in zip(expected, vectorised, strict=True):
        if many is not None:
            torch.testing.assert_close(many, torch.stack((one, -2 * one)))


@pytest.mark.parametrize("options", [{"p": 2}, {"p": 1}, {"debias": False}, {"p": 1, "debias": False}], ids=str)
def test_second_derivatives_of_divergence_equal_geomloss(options):
    x, y, a, b = rand(2, 4, 3), rand(2, 5, 3), simplex(2, 4), simplex(2, 5)
    options = {"p": 2, "blur": 0.3, **options}

    def twice(loss):
        leaves = [t.clone().requires_grad_() for t in (a, x, b, y)]
        first = torch.autograd.grad(loss(*leaves).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in first), leaves)

    expected = twice(geomloss.SamplesLoss("sinkhorn", backend="tensorized", **options))
    torch.testing.assert_close(twice(SamplesLoss(**options)), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(twice(SamplesLoss(**options, backend="reference")), expected, rtol=1e-7, atol=1e-9)


def test_second_derivatives_of_bilevel_slots_equal_the_textbook():
    module, (inputs, slots) = slot_attention("bilevel"), (rand(2, 5, 4), rand(2, 3, 4))

    def twice(function):
        leaves = [inputs.clone().requires_grad_(), slots.clone().requires_grad_(), *module.parameters()]
        first = torch.autograd.grad(function(*leaves[:2])[0].pow(2).sum(), leaves, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first if g is not None), leaves, allow_unused=True)
        return [g for g in second if g is not None]

    torch.testing.assert_close(twice(module), twice(lambda x, s: textbook_slot_attention(module, x, s)))


def test_gradients_of_each_sample_alone():
    module, inputs, slots = slot_attention("bilevel"), rand(3, 5, 4), rand(3, 3, 4)
    parameters = dict(module.named_parameters())

    def loss(parameters, x, s):
        return torch.func.functional_call(module, parameters, (x.unsqueeze(0), s.unsqueeze(0)))[0].pow(2).sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, inputs, slots)
    for k in range(3):
        alone = torch.autograd.grad(
            loss(parameters, inputs[k], slots[k]), list(parameters.values()), materialize_grads=True
        )
        torch.testing.assert_close([per_sample[name][k] for name in parameters], list(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["attention", "gru_norm", "divergence", "merge", "propagate"])
def test_composite_forms_round_as_the_ops_do(name, dtype):
    function, make = ALL[name]
    inputs = [t.to(torch.float32 if name == "attention" and t.dim() == 2 else dtype) for t in make()]
    results = function(*inputs)
    with forward_ad.dual_level():
        again = function(*inputs)
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (results, again)), strict=True):
        if one is not None:
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2 if dtype != torch.float32 else 1e-4)


INVARIANT = InvariantSlotAttention(3, 4, iterations=1)
NAMED = [
    ("cpp", lambda x, y: sinkhorn_divergence(x, y, backend="cpp"), "sinkhorn_divergence"),
    ("cpp", lambda x, y: SamplesLoss(backend="cpp")(x, y), "SamplesLoss"),
    ("triton", lambda x, y: sinkhorn_divergence(x, y, backend="triton"), "sinkhorn_divergence"),
    ("blocks", lambda x, y: sinkhorn_divergence(x, y, backend="blocks"), "sinkhorn_divergence"),
    ("triton", lambda x, y: inverted_attention(x, y, backend="triton")[0], "inverted_attention"),
    ("triton", lambda x, y: mix_slots(x[:, None], y[0, 0], y[0, 1, 0], backend="triton")[0], "mix_slots"),
    ("triton", lambda x, y: add_norm(x, x, y[0, 0], y[0, 1], backend="triton")[1], "add_norm"),
    ("triton", lambda x, y: INVARIANT(y, FRAME_GRID.float(), x).slots, "InvariantSlotAttention"),
]


@pytest.mark.parametrize(("backend", "function", "op"), NAMED, ids=[f"{op} {b}" for b, _, op in NAMED])
def test_a_backend_by_name_says_that_it_has_one_derivative(backend, function, op):
    if backend == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("needs TRITON_INTERPRET=1")
        pytest.importorskip("triton", reason="Triton is not installed")
    x, y = torch.randn(2, 3, 4), torch.randn(2, 5, 4)

    def call(x, y=y):
        with use_backend(backend):
            return function(x, y)

    message = rf"{op}: backend '{backend}' cannot be differentiated inside torch.func.*backend='reference' can"
    for transform in (
        lambda: torch.func.jvp(call, (x,), (x,)),
        lambda: torch.func.grad(lambda x: call(x).sum())(x),
        lambda: torch.vmap(call, randomness="different")(torch.stack((x, x))),
    ):
        with pytest.raises(RuntimeError, match=message):
            transform()
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(leaf).pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot be differentiated a second time"):
        first.sum().backward()


def test_results_without_derivatives():
    slots, image, video = rand(2, 4, 3), simplex(2, 2, 6, 3), simplex(2, 2, 3, 4)
    labels = torch.func.jvp(lambda s: cluster_slots(s, 0.5)[0].double(), (slots,), (slots,))
    assert torch.equal(labels[0], cluster_slots(slots, 0.5)[0].double())
    assert not labels[1].any()
    similarity = rand(3, 2, 4, 4)
    partners, tangent = torch.func.jvp(lambda s: match_slots(s).double(), (similarity,), (similarity,))
    assert torch.equal(partners, match_slots(similarity).double())
    assert not tangent.any()
    assert torch.equal(torch.vmap(match_slots)(similarity), match_slots(similarity))
    maps = torch.vmap(lambda i, v: propagate_labels(i[None], v[None], (2, 3))[0])(image, video)
    assert torch.equal(maps, propagate_labels(image, video, (2, 3)))
    guide = torch.randint(0, 256, (*image.shape[:2], 4, 6, 3), dtype=torch.uint8)
    maps = torch.vmap(lambda i, v, g: guided_labels(i[None], v[None], (2, 3), g[None])[0])(image, video, guide)
    assert torch.equal(maps, guided_labels(image, video, (2, 3), guide))
    with pytest.raises(RuntimeError, match=r"propagate_masks: .*propagate_attention"):
        torch.func.grad(lambda v: propagate_masks(image, v, (2, 3), objects=[1]).sum())(video)
    with pytest.raises(RuntimeError, match=r"propagate_masks: .*propagate_attention"):
        torch.func.jvp(lambda v: propagate_masks(image, v, (2, 3), objects=[1]), (video,), (video,))


def test_compiled_functions():
    x, y = torch.randn(2, 4, 3), torch.randn(2, 5, 3)

    def loss(x):
        return sinkhorn_divergence(x, y).sum() + inverted_attention(x, y)[0].pow(2).sum()

    expected = torch.func.grad(loss)(x)
    torch.testing.assert_close(torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(x), expected)
    moved = torch.compile(lambda x, d: torch.func.jvp(loss, (x,), (d,))[1], fullgraph=True, backend="aot_eager")(x, x)
    torch.testing.assert_close(moved, (expected * x).sum())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives; do not compile"):
        compiled(forward_ad.make_dual(x, x))


def test_an_empty_batch_of_streamed_sets_has_empty_derivatives():
    x = torch.zeros(0, 2000, 3, requires_grad=True)
    value = sinkhorn_divergence(x, torch.zeros(0, 3000, 3))
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(gradient.sum(), x, allow_unused=True)
    assert gradient.shape == x.shape
    assert again is None or again.shape == x.shape
