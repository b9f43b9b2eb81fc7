"""Points without weight, hidden tokens and dropped slots change nothing, whatever their values."""

import math
import os

import pytest
import torch
from slotkernels import (
    InvariantSlotAttention,
    SamplesLoss,
    SlotAttention,
    cluster_slots,
    inverted_attention,
    merge_slots,
    propagate_attention,
    propagate_labels,
    propagate_masks,
    sinkhorn_divergence,
    sinkhorn_plan,
    sinkhorn_potentials,
)
from slotkernels.sinkhorn import SINKHORN
from slotkernels.sinkhorn.op import make_problem
from slotkernels.sinkhorn.schedule import epsilon_schedule
from slotkernels.sinkhorn.streaming import STREAMING
from slotkernels.slot_attention import SAVI

from .weightless_cases import HIDDEN, padded

POINT = torch.zeros(1, 1, 1)
PROBLEM = make_problem("test", POINT, POINT, p=2, blur=1.0, scaling=0.5, diameter=1.0)
BACKENDS = [*SINKHORN.available(PROBLEM), *STREAMING.available(PROBLEM)]
FILLERS = [0.0, 30.0, 5e3, 1e4, 1e6, 1e30, math.inf, -math.inf, math.nan]
# Slow ones (Triton's interpreter, and KeOps, which compiles) take three of the fillers.
FILLED = [(b, f) for b in BACKENDS for f in ([5e3, 1e6, math.nan] if b in ("triton", "keops") else FILLERS)]


def without(x, y, a, b, k, diameter):
    """Value and gradients of problem k without its points of weight 0, in float64."""
    real = a[k] > 0
    x, y, a, b = (
        t.detach().double().requires_grad_()
        for t in (x[k : k + 1, real], y[k : k + 1], a[k : k + 1, real], b[k : k + 1])
    )
    loss = SamplesLoss(blur=0.2, diameter=diameter, backend="reference")
    return loss(a, x, b, y), (x, y, a, b)


def compare(loss, x, y, a, b, rtol, swap=False):
    """Value, gradients of the points and, where wanted, of the weights, with those without the points of weight 0."""
    value = loss(b, y, a, x) if swap else loss(a, x, b, y)
    inputs = [t for t in (x, y, a, b) if t.requires_grad]
    grads = torch.autograd.grad(value.sum(), inputs)
    diameter = loss.diameter
    if diameter is None:
        every = torch.cat((x[a > 0], y.flatten(0, 1))).double()
        diameter = (every.amax(0) - every.amin(0)).norm().item()
    for k in range(2):
        expected, leaves = without(x, y, a, b, k, diameter)
        torch.testing.assert_close(value[k].double(), expected[0], rtol=rtol, atol=rtol)
        exact_grads = torch.autograd.grad(expected, leaves[: len(inputs)])
        real = a[k] > 0
        for i, (grad, exact) in enumerate(zip(grads, exact_grads, strict=True)):
            mine = grad[k][real] if i in (0, 2) else grad[k]
            torch.testing.assert_close(mine.double(), exact[0], rtol=20 * rtol, atol=20 * rtol)
        assert not grads[0][k][~real].any()
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("backend", "filler"), FILLED)
def test_padding_changes_nothing(backend, filler):
    for diameter, p in ((None, 2), ("problem", 2), (None, 1)):
        loss = SamplesLoss(blur=0.2, p=p, diameter=diameter, backend=backend)
        if p == 2:
            compare(loss, *padded(filler), rtol=3e-5)
        x, y, a, b = padded(filler)
        for debias in (True, False):
            loss = SamplesLoss(blur=0.2, p=p, diameter=diameter, debias=debias, backend=backend)
            zeros = torch.where((a > 0).unsqueeze(2), x, x[:, 3:4]).detach().requires_grad_()  # a point with weight
            values = [loss(a, x, b, y), loss(a, zeros, b, y), loss(b, y, a, x)]
            torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values[0], values[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backend", "filler"), [(b, f) for b, f in FILLED if b != "triton"])
def test_padding_changes_nothing_where_weights_are_learned(backend, filler):
    x, y, a, b = padded(filler)
    compare(SamplesLoss(blur=0.2, backend=backend), x, y, a.requires_grad_(), b.requires_grad_(), rtol=3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_placeholders_in_half_precision(backend, dtype):
    compare(SamplesLoss(blur=0.2, backend=backend), *padded(3e4, dtype), rtol=1e-2)


def potentials_at(x, y, a, b, p, blur=0.3, diameter=8.0):
    """Potentials of the points with weight, extended to all points by the last update; in float64."""
    x, y, a, b = (t.double() for t in (x, y, a, b))

    def costs(one, other):
        distances = (one.unsqueeze(1) - other).norm(dim=2)
        return distances.clamp_min(1e-4) if p == 1 else distances.square() / 2

    def update(points, others, weights, potential, eps):
        weighted = weights > 0
        logs = weights[weighted].log() + potential[weighted] / eps
        return -eps * (logs - costs(points, others[weighted]) / eps).logsumexp(1)

    f, g, own_f, own_g = (torch.zeros_like(w) for w in (a, b, a, b))
    schedule = [eps for eps, _ in epsilon_schedule(diameter, p, blur, 0.5)]
    for step, eps in enumerate([schedule[0], *schedule, blur**p]):
        new = update(x, y, b, g, eps), update(y, x, a, f, eps), update(x, x, a, own_f, eps), update(y, y, b, own_g, eps)
        keep = 0.5 if 0 < step <= len(schedule) else 0.0
        f, g, own_f, own_g = (keep * t + (1 - keep) * n for t, n in zip((f, g, own_f, own_g), new, strict=True))
    return f - own_f, g - own_g


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_weightless_point_has_the_potential_of_its_place(backend, p):
    x, y, a, b = padded(0.0)
    a[0, 4:6], x = 0.0, torch.randn(2, 9, 3)
    x[0, 8] *= 20  # outside of the box
    options = {"p": p, "blur": 0.3, "diameter": 8.0}
    potentials = sinkhorn_potentials(x, y, a, b, **options, backend=backend)
    for k in range(2):
        expected = potentials_at(x[k], y[k], a[k], b[k], p)
        for one, other in zip(potentials, expected, strict=True):
            torch.testing.assert_close(one[k].double(), other, rtol=1e-4, atol=1e-4)
    weights = a.clone().requires_grad_()
    (grad,) = torch.autograd.grad(SamplesLoss(**options, backend=backend)(weights, x, b, y).sum(), weights)
    torch.testing.assert_close(grad, potentials[0])
    x[0, 8] = math.nan
    assert all(t.isfinite().all() for t in sinkhorn_potentials(x, y, a, b, **options, backend=backend))


def test_weightless_point_stays_out_of_reach_at_low_temperature():
    """Costs of 1e6 temperatures: the logarithm of its weight is below them all."""
    x, y = torch.randn(1, 3, 3), torch.randn(1, 3, 3) + 50
    near, a = torch.cat((x, y), 1), torch.tensor([[1 / 3] * 3 + [0.0] * 3])
    b = torch.full((1, 3), 1 / 3)
    for backend in BACKENDS:
        options = {"blur": 0.03, "backend": backend, "diameter": 0.03}
        torch.testing.assert_close(
            SamplesLoss(**options)(a, near, b, y), SamplesLoss(**options)(x, y), rtol=1e-5, atol=0
        )
        if backend != "triton":
            f, g = sinkhorn_potentials(near, y, a, b, **options)
            expected = sinkhorn_potentials(x, y, **options)
            torch.testing.assert_close((f[:, :3], g), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sets_without_any_weight(backend):
    x, y, a, b = padded(math.nan)
    x, y, a, b = (torch.cat((t.detach(), t.detach())) for t in (x, y, a, b))
    a[1], b[1] = 0, 0  # both
    a[2] = 0  # one
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = SamplesLoss(blur=0.2, diameter="problem", backend=backend)
    value = loss(a, x, b, y)
    assert value[1] == 0
    assert value[2].isnan()
    alone = loss(a[[0, 3]], x[[0, 3]], b[[0, 3]], y[[0, 3]])
    torch.testing.assert_close(value[[0, 3]], alone)
    grads = torch.autograd.grad(value[[0, 1, 3]].sum(), (x, y))
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[1:3].any() for g in grads)
    nothing = loss(torch.zeros(1, 9), x[:1] * math.nan, torch.zeros(1, 6), y[:1] * math.nan)
    assert nothing == 0


def test_triton_refuses_potentials_of_weighted_sets():
    pytest.importorskip("triton", reason="Triton is not installed")
    x, y, a, b = padded(0.0)
    with pytest.raises(RuntimeError, match="sinkhorn_potentials: backend 'triton' has no potentials of weighted sets"):
        sinkhorn_potentials(x, y, a, backend="triton")
    with pytest.raises(RuntimeError, match=r"SamplesLoss: backend 'triton' has no .* gradients of weights"):
        SamplesLoss(backend="triton")(a.requires_grad_(), x, b, y)


def test_finite_points_are_asked_of_points_with_weight_alone():
    x, y, a, b = padded(math.nan)
    sinkhorn_potentials(x, y, a, b, check_finite=True)
    with pytest.raises(ValueError, match="27 numbers of x are not finite"):
        sinkhorn_potentials(
            x * math.nan, y, torch.full((2, 9), 1 / 9) * (torch.arange(2).view(2, 1) == 0), b, check_finite=True
        )


def test_padding_in_compiled_and_differentiated_functions():
    x, y, a, b = padded(math.nan)
    loss = SamplesLoss(blur=0.2)
    expected = torch.autograd.grad(loss(a, x, b, y).sum(), (x, y))
    compiled = torch.compile(lambda x, y: loss(a, x, b, y).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y), (x, y)), expected)
    gradients = torch.func.grad(lambda x, y: loss(a, x, b, y).sum(), argnums=(0, 1))(x.detach(), y.detach())
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
    moved = torch.func.jvp(lambda y: loss(a, x.detach(), b, y).sum(), (y.detach(),), (torch.ones_like(y),))[1]
    torch.testing.assert_close(moved, expected[1].sum(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("filler", FILLERS)
def test_padding_of_a_transport_plan(filler, learned):
    x, y, a, b = padded(filler)
    a, b = a.requires_grad_(learned), b.requires_grad_(learned)
    cotangent = torch.randn(2, 9, 6)
    plan = sinkhorn_plan(x=x, y=y, a=a, b=b, eps=1.0, iterations=20)
    grads = torch.autograd.grad((plan * cotangent).sum(), [t for t in (x, y, a, b) if t.requires_grad])
    cost = (x.detach().unsqueeze(2) - y.detach().unsqueeze(1)).square().sum(3) / 2
    cost[(a == 0).unsqueeze(2).expand_as(cost)] = filler if filler != 0 else -math.inf
    cost.requires_grad_()
    again = sinkhorn_plan(cost, a, b, eps=1.0, iterations=20)
    (of_cost,) = torch.autograd.grad((again * cotangent).sum(), cost)
    torch.testing.assert_close(again, plan, rtol=1e-4, atol=1e-6)
    assert of_cost.isfinite().all()
    for k in range(2):
        real = a[k] > 0
        few = [t.detach().double().requires_grad_() for t in (x[k, real], y[k], a[k, real], b[k])]
        exact = sinkhorn_plan(x=few[0][None], y=few[1][None], a=few[2][None], b=few[3][None], eps=1.0, iterations=20)[0]
        torch.testing.assert_close(plan[k][real].double(), exact, rtol=1e-4, atol=1e-6)
        assert not plan[k][~real].any()
        expected = torch.autograd.grad((exact * cotangent[k][real]).sum(), few)
        for i, grad in enumerate(grads):
            torch.testing.assert_close(
                grad[k][real].double() if i in (0, 2) else grad[k].double(), expected[i], rtol=1e-3, atol=1e-4
            )
            assert grad.isfinite().all()
    assert not sinkhorn_plan(cost.detach(), torch.zeros(2, 9), b.detach(), eps=1.0).any()


MASK = torch.tensor([[True] * 4 + [False] * 3, [False] * 2 + [True] * 5])


def masked_cases(filler):
    """Functions of tokens [2, 7, 4]; the values of hidden tokens must not matter."""
    torch.manual_seed(3)
    slots, grid = torch.randn(2, 3, 4), torch.rand(2, 7, 2)
    grid = grid.masked_fill(~MASK.unsqueeze(2), filler)
    absorbed, projected = (
        SlotAttention(3, 4),
        SlotAttention(3, 4, implicit="none", iterations=5, conventions=SAVI),
    )
    invariant, normed = InvariantSlotAttention(3, 4), InvariantSlotAttention(3, 4, encoder_norm=True)
    groups = torch.stack((MASK, MASK & (torch.arange(7) != 3), MASK), 1)
    return {
        "op": (None, lambda t: inverted_attention(slots, t, mask=MASK, return_attention=True)),
        "op with values": (None, lambda t: inverted_attention(slots, t, 2 * t, mask=groups, groups=3)),
        "op in Triton": (None, lambda t: inverted_attention(slots, t, mask=MASK, backend="triton")),
        "absorbed": (absorbed, lambda t: absorbed(t, slots, MASK)),
        "projected": (projected, lambda t: projected(t, slots, groups[:, 0])),
        "invariant": (invariant, lambda t: invariant(t, grid, mask=MASK)),
        "invariant, normed": (normed, lambda t: normed(t, grid, mask=MASK)),
    }


@pytest.mark.parametrize("filler", HIDDEN)
@pytest.mark.parametrize("name", list(masked_cases(0.0)))
def test_hidden_tokens_change_nothing(name, filler):
    if "Triton" in name:
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("needs TRITON_INTERPRET=1")
        pytest.importorskip("triton", reason="Triton is not installed")
    tokens, results = torch.randn(2, 7, 4), []
    for hidden in (0.5, filler):
        module, function = masked_cases(hidden)[name]
        inputs = tokens.masked_fill(~MASK.unsqueeze(2), hidden).requires_grad_()
        outputs = [t for t in function(inputs) if t is not None]
        outputs = [t[MASK] if t.shape[1] == 7 else t for t in outputs]  # the attention of visible tokens
        leaves = [inputs, *(module.parameters() if module else ())]
        grads = torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves, allow_unused=True)
        results.append([*outputs, *(g for g in grads if g is not None)])
        assert not grads[0][~MASK].any()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("filler", [20.0, 250.0, 6e4])
def test_hidden_tokens_with_overflowing_logits_change_nothing(backend, filler):
    slots, tokens = torch.full((2, 3, 64), 7.0, dtype=torch.float16), torch.rand(2, 7, 64).half()
    results = [
        inverted_attention(slots, tokens.masked_fill(~MASK.unsqueeze(2), hidden), mask=MASK, backend=backend)[0]
        for hidden in (0.5, filler)
    ]
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@pytest.mark.parametrize("filler", HIDDEN)
def test_dropped_slots_change_nothing(filler):
    slots, attention = torch.randn(2, 5, 4), torch.rand(2, 6, 5)
    image, video = torch.rand(2, 3, 6, 4).softmax(3), torch.rand(2, 3, 4, 5).softmax(3)
    mask = torch.tensor([[True, True, False, True, True], [True, False, True, True, False]])
    results = []
    for hidden in (0.5, filler):
        s, a = slots.masked_fill(~mask.unsqueeze(2), hidden), attention.masked_fill(~mask.unsqueeze(1), hidden)
        v = video.masked_fill(~mask.view(2, 1, 1, 5), hidden)
        labels, counts = cluster_slots(s, 0.8, mask)
        assert torch.equal(labels == -1, ~mask)
        leaves = [t.requires_grad_() for t in (s, a, v, image.clone())]
        merged = merge_slots(*leaves[:2], labels)
        carried = propagate_attention(leaves[3], leaves[2], labels)
        loss = sum(t.square().sum() for t in (*merged[:2], carried))
        maps = [propagate_labels(image, v, (2, 3), (5, 7), clusters=labels, backend=b) for b in ("auto", "reference")]
        soft = propagate_masks(image, v, (2, 3), (4, 6), objects=[0, 1], clusters=labels)
        results.append([labels, counts, *merged, carried, *maps, soft, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "cpp", "blocks"])
def test_a_weight_that_is_nan_makes_its_problem_nan(backend):
    x, a = torch.rand(2, 4, 3), torch.full((2, 4), 0.25)
    a[0, 1] = torch.nan
    value = sinkhorn_divergence(x, torch.rand(2, 5, 3), a, diameter=2.0, backend=backend)
    assert value.isnan().tolist() == [True, False]
