"""The slot attention module, compared with its textbook form: values, gradients, options, casts, compilation."""

import copy

import pytest
import torch
from slotkernels import SlotAttention, slot_attention, use_backend
from slotkernels.slot_attention import SAVI, STANDARD, Conventions, reference
from slotkernels.slot_attention.prepared import absorbs, weights_of
from slotkernels.slot_attention.reference import textbook_slot_attention

from .label_cases import needs_cpp
from .oracles import assert_matches_oracle

IMPLICIT = ["bilevel", "detach", "none"]
FORMS = ["absorbed", "projected"]
PRIOR = ("mu", "log_sigma")


def make(implicit="bilevel", batch=2, tokens=7, dim=6, input_dim=5, num_slots=3, **options):
    torch.manual_seed(1)
    module = SlotAttention(num_slots, dim, input_dim, implicit=implicit, **options).double()
    for parameter in module.parameters():  # biases and norms away from their special initial values
        parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = torch.randn(batch, tokens, input_dim, dtype=torch.float64, requires_grad=True)
    return module, inputs


def force(monkeypatch, form):
    monkeypatch.setattr(slot_attention.module, "absorbs", lambda *sizes: form == "absorbed")


def check_against_textbook(module, inputs, mask=None):
    """Slots, attention and the gradient of inputs and of every parameter, for random cotangents."""
    noise = torch.randn(inputs.shape[0], module.num_slots, module.dim, dtype=torch.float64)

    def of(function):
        return lambda inputs, **parameters: function(inputs, module.mu + module.log_sigma.exp() * noise, mask)

    assert_matches_oracle(
        of(module),
        of(lambda *arguments: textbook_slot_attention(module, *arguments)),
        {"inputs": inputs, **dict(module.named_parameters())},
        ("slots", "attention"),
        1e-9,
        float64=False,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("implicit", IMPLICIT)
def test_equals_the_textbook_in_value_and_every_gradient(monkeypatch, implicit, with_mask, iterations, form):
    force(monkeypatch, form)
    module, inputs = make(implicit, iterations=iterations)
    check_against_textbook(module, inputs, torch.rand(2, 7) > 0.3 if with_mask else None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "conventions",
    [
        Conventions(qkv_bias=True),
        Conventions(scale=2.0),
        Conventions(eps=0.1),
        Conventions(eps=0.1, eps_placement="denominator", qkv_bias=True),
        Conventions(gru_state="normalised", norm_eps=1e-3),
        Conventions(use_mlp=False),
        Conventions(use_mlp=False, gru_state="normalised"),
    ],
    ids=str,
)
def test_conventions_equal_the_textbook(monkeypatch, conventions, form):
    force(monkeypatch, form)
    check_against_textbook(*make(conventions=conventions, qkv_dim=4), torch.rand(2, 7) > 0.3)


def test_former_keywords_warn_and_do_the_same():
    former = {"eps": 0.1, "eps_placement": "denominator", "norm_eps": 1e-6, "use_mlp": False}
    expected = r"write conventions=Conventions\(eps=0.1, eps_placement='denominator', norm_eps=1e-06, use_mlp=False\)"
    with pytest.warns(DeprecationWarning, match=expected):
        module = SlotAttention(3, 4, **former)
    assert module.conventions == SAVI._replace(eps=0.1, use_mlp=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        SlotAttention(3, 4, epsilon=0.1)


def test_slots_are_sampled_from_given_noise():
    module, noise = SlotAttention(3, 4), torch.randn(2, 5, 4)
    assert torch.equal(module.sample_slots(2, noise=noise), module.mu + module.log_sigma.exp() * noise)
    with pytest.raises(ValueError, match=r"noise is float32 \[2, 5, 4\].* with B = 3"):
        module.sample_slots(3, noise=noise)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [2, 3])
def test_groups_compete_within_themselves_on_their_own_tokens(monkeypatch, groups, form):
    force(monkeypatch, form)
    mask = torch.rand(2, groups, 7) > 0.3
    mask[:, :, 0] = True
    check_against_textbook(*make(num_slots=6, groups=groups), mask)


@pytest.mark.parametrize("form", FORMS)
def test_slots_that_see_no_token_are_updated_with_zero(monkeypatch, form):
    force(monkeypatch, form)
    module, inputs = make(iterations=1, conventions=STANDARD._replace(qkv_bias=True))
    initial = torch.randn(2, 3, 6).double()
    slots = module(inputs, initial, torch.zeros(2, 7, dtype=torch.bool)).slots
    state = initial.flatten(0, 1)
    expected = module.gru(torch.zeros_like(state), state)
    torch.testing.assert_close(slots.flatten(0, 1), expected + module.mlp(module.norm_mlp(expected)))


def test_frozen_tokens_get_no_gradient_of_their_size(monkeypatch):
    needs = []
    original = reference.inverted_attention_backward
    monkeypatch.setattr(
        reference, "inverted_attention_backward", lambda call: needs.append(call.needs) or original(call)
    )
    force(monkeypatch, "absorbed")
    module, inputs = make()
    module(inputs.detach()).slots.sum().backward()
    assert needs == [[True, False, False, True, False]]  # queries and biases, though the input norm's parameters learn
    assert module.norm_inputs.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("implicit", "kept"), [("bilevel", 1), ("detach", 1), ("none", 3)])
def test_one_attention_is_kept_for_each_iteration_that_is_differentiated(implicit, kept):
    module, inputs = make(implicit, iterations=3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        module(inputs)
    assert saved.count((2, module.num_slots, 7)) == kept


def test_the_cheaper_form_is_chosen():
    # Two matrix products for each line of the docstring: [rows, inner, columns], tripled where differentiated.
    def cost(products):
        return sum(rows * inner * columns for rows, inner, columns in products)

    for m, n, d, din, iterations, backward in [
        (864, 32, 768, 768, 3, 1), (96, 11, 128, 192, 3, 1), (16, 64, 256, 256, 3, 1), (300, 8, 64, 768, 3, 3),
        (4096, 7, 64, 64, 3, 0), (49, 49, 64, 64, 3, 0), (8, 4, 768, 64, 1, 1),
    ]:  # fmt: skip
        loop = [(m, din, n)] * 2 + [(n, d, din)] * 2
        absorbed = cost(loop) * (iterations + 2 * backward)
        once = cost([(m, din, d)] * 2) * (3 if backward else 1)
        projected = cost([(m, d, n)] * 2) * (iterations + 2 * backward) + once
        assert absorbs(m, n, d, din, iterations, backward) == (absorbed <= projected)
    assert absorbs(864, 32, 768, 768, 3, 1)  # the image stage
    assert not absorbs(16, 64, 256, 256, 3, 1)  # more slots than tokens
    assert not absorbs(300, 32, 64, 768, 3, 3)  # wide tokens, narrow slots, gradients through all iterations


@pytest.mark.parametrize(("implicit", "learns"), [("bilevel", True), ("detach", False), ("none", True)])
def test_prior_learns_under_bilevel_and_not_under_detach(implicit, learns):
    module, inputs = make(implicit)
    module(inputs).slots.square().sum().backward()
    for parameter in (module.mu, module.log_sigma):
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == learns


def test_bilevel_prior_gets_gradient_of_last_iterations_input():
    module, inputs = make()
    initial = module.sample_slots(2).detach().requires_grad_()
    (grad,) = torch.autograd.grad(module(inputs, initial).slots.square().sum(), initial)
    module.iterations, module.implicit = 2, "none"
    with torch.no_grad():
        entering = module(inputs, initial).slots
    module.iterations = 1
    entering.requires_grad_()
    (expected,) = torch.autograd.grad(module(inputs, entering).slots.square().sum(), entering)
    torch.testing.assert_close(grad, expected)


def test_modes_differ_only_in_gradient():
    outputs = []
    for implicit in IMPLICIT:
        module, inputs = make(implicit)
        outputs.append(module(inputs, torch.ones(2, 3, 6).double() * torch.arange(3).view(1, 3, 1)).slots)
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-12, atol=1e-12)  # weights are merged in the first two


def test_samples_follow_the_prior_and_the_generator():
    module = SlotAttention(50, 4)
    with torch.no_grad():
        module.mu.copy_(torch.tensor([-3.0, 0.0, 1.0, 5.0]))
        module.log_sigma.copy_(torch.tensor([0.0, -2.0, 1.0, 0.5]))
    slots = module.sample_slots(400, generator=torch.Generator().manual_seed(3))
    again = module.sample_slots(400, generator=torch.Generator().manual_seed(3))
    assert torch.equal(slots, again)
    flat = slots.detach().flatten(0, 1)
    # 20,000 draws: the mean is known to sigma / 141, the deviation to 0.5 %; five of those are allowed.
    assert ((flat.mean(0) - module.mu).abs() < 5 * module.log_sigma.exp() / 141).all()
    torch.testing.assert_close(flat.std(0), module.log_sigma.exp(), rtol=0.025, atol=0)


def test_any_number_of_slots_may_be_given():
    module, inputs = make()
    initial = torch.randn(2, 11, 6, dtype=torch.float64)
    slots, attention = module(inputs, initial)
    expected, expected_attention = textbook_slot_attention(module, inputs, initial)
    torch.testing.assert_close(slots, expected)
    torch.testing.assert_close(attention, expected_attention)


def test_attention_rows_sum_to_one_and_empty_batches_pass():
    module, inputs = make()
    attention = module(inputs).attention
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 7).double())
    empty = module(inputs[:0])
    empty.slots.sum().backward()
    assert empty.slots.shape == (0, 3, 6)
    assert (module.to_q.weight.grad == 0).all()


def test_autocast_keeps_slots_float32_and_stays_near_float32():
    torch.manual_seed(0)
    module = SlotAttention(4, 32, 24)
    inputs, initial = torch.randn(2, 50, 24), module.sample_slots(2).detach()
    expected = module(inputs, initial)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(inputs, initial)
    assert actual.slots.dtype == actual.attention.dtype == torch.float32
    # bf16 keeps 8 bits; three iterations of about ten products in a row leave some 2^-5 of slots of size 1.
    assert (actual.slots - expected.slots).abs().max() < 0.06
    assert (actual.attention - expected.attention).abs().max() < 0.03
    actual.slots.sum().backward()
    assert all(
        p.grad is None or (p.grad.isfinite().all() and p.grad.dtype == torch.float32) for p in module.parameters()
    )


def test_folded_biases_keep_their_precision_under_autocast():
    module, _ = make(dim=32, input_dim=24, conventions=STANDARD._replace(qkv_bias=True))
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        weights = weights_of(module, torch.bfloat16)
    for linear, folded in ((module.to_k, weights.k), (module.to_v, weights.v)):
        exact = linear.weight.double() @ module.norm_inputs.bias.double() + linear.bias.double()
        assert folded.weight.dtype == torch.bfloat16
        assert folded.bias.dtype == torch.float32
        torch.testing.assert_close(folded.bias.double(), exact, rtol=1e-6, atol=1e-6)


def relative_errors(module, inputs, initial, form_dtype, cotangent):
    """Differences of slots, attention and each gradient from the textbook in float64, relative to its size, in norm."""
    exact = copy.deepcopy(module).double()
    names = [n for n, _ in module.named_parameters() if n not in PRIOR]
    results = []
    for function, leaves in (
        (module, (inputs, initial)),
        (lambda *args: textbook_slot_attention(exact, *args), (inputs.double(), initial.double())),
    ):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        parameters = [(module if function is module else exact).get_parameter(name) for name in names]
        with torch.autocast(inputs.device.type, form_dtype, enabled=function is module and form_dtype != torch.float32):
            slots, attention = function(*leaves)
        grads = torch.autograd.grad((slots * cotangent.to(slots.dtype)).sum(), [*leaves, *parameters])
        named = zip(["slots", "attention", "inputs", "initial", *names], (slots, attention, *grads), strict=True)
        results.append({name: t.double() for name, t in named})
    actual, expected = results
    sizes = {name: t.norm() for name, t in expected.items()}
    # A shift of all queries changes no softmax over slots: this gradient is a sum of terms that cancel. Those of its
    # weight are of the same size.
    sizes["norm_slots.bias"] = sizes["norm_slots.weight"]
    return {name: ((actual[name] - t).norm() / sizes[name]).item() for name, t in expected.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("device", "shape"),
    [
        ("cpu", (2, 20, 3, 12)),
        pytest.param("cuda", (4, 864, 32, 768), marks=pytest.mark.gpu),
        pytest.param("cuda", (3, 863, 11, 127), marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_kernels_together_equal_the_textbook(monkeypatch, device, shape, dtype, form):
    force(monkeypatch, form)
    batch, tokens, slots, dim = shape
    module = SlotAttention(slots, dim, dim).to(device)
    inputs, initial = (torch.randn(batch, n, dim, device=device) for n in (tokens, slots))
    with use_backend("triton"):
        errors = relative_errors(module, inputs, initial, dtype, torch.randn_like(initial))
    # float32 in sums of up to 864 and 768 terms; bf16 as in the test of autocast above, in the mean over all elements.
    assert max(errors.values()) < (2e-3 if dtype == torch.float32 else 0.1), errors


@pytest.mark.gpu
def test_a_captured_step_replays_on_new_tokens():
    module = SlotAttention(8, 64).cuda()
    inputs, initial = torch.randn(2, 863, 64, device="cuda"), torch.randn(2, 8, 64, device="cuda")
    parameters = [p for n, p in module.named_parameters() if n not in PRIOR]

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            slots, attention = module(inputs, initial)
        return [slots, attention, *torch.autograd.grad(slots.square().sum(), parameters)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs.copy_(torch.randn_like(inputs))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))


@needs_cpp  # the layer norm writes the inputs of the products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tokens_are_never_copied_from_one_dtype_to_another(dtype):
    module = SlotAttention(4, 32, 24)
    inputs, initial = torch.randn(2, 50, 24).to(dtype), module.sample_slots(2).detach()
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile(record_shapes=True) as profile:
        module(inputs, initial)
    assert not [e for e in profile.events() if e.name == "aten::copy_" and e.input_shapes[0] == [2, 50, 24]]


@pytest.mark.parametrize("implicit", IMPLICIT)
def test_compiles_fullgraph(implicit):
    module, inputs = make(implicit)
    initial = torch.randn(2, 3, 6, dtype=torch.float64)
    parameters = [p for n, p in module.named_parameters() if n not in ("mu", "log_sigma")]
    expected = torch.autograd.grad(module(inputs, initial).slots.square().sum(), parameters)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(inputs, initial).slots.square().sum(), parameters), expected
    )


def test_prior_is_sampled_inside_a_compiled_graph():
    module, inputs = make()
    torch.compile(module, fullgraph=True, backend="aot_eager")(inputs).slots.sum().backward()
    assert module.log_sigma.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SlotAttention(0, 4), "num_slots=0, expected at least 1"),
        (lambda: SlotAttention(2, 4, iterations=0), "iterations=0"),
        (lambda: SlotAttention(6, 4, groups=4), "groups=4, expected a divisor of num_slots=6"),
        (
            lambda: SlotAttention(2, 4, conventions=Conventions(eps_placement="both")),
            "eps_placement='both', expected one of numerator",
        ),
        (lambda: SlotAttention(2, 4, implicit="deq"), "implicit='deq', expected one of bilevel, detach, none"),
        (lambda: SlotAttention(2, 4)(torch.zeros(1, 3, 5)), r"inputs is float32 \[1, 3, 5\].* with Din = 4"),
        (lambda: SlotAttention(2, 4)(torch.zeros(3, 4)), r"inputs is float32 \[3, 4\], expected \[B, M, Din\]"),
        (lambda: SlotAttention(2, 4)(torch.zeros(1, 3, 4), torch.zeros(2, 2, 4)), "slots is .* with B = 1"),
        (lambda: SlotAttention(2, 4)(torch.zeros(1, 3, 4), mask=torch.ones(1, 3)), "mask is .*expected dtype bool"),
    ],
)
def test_bad_input_is_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_sharpness_is_a_factor_of_the_logits(monkeypatch, form, bias):
    force(monkeypatch, form)
    module, inputs = make(conventions=STANDARD._replace(qkv_bias=bias))
    slots = module.sample_slots(len(inputs), torch.Generator().manual_seed(0))
    sharp = module(inputs, slots, sharpness=3.0)
    module.scale *= 3
    for actual, expected in zip(sharp, module(inputs, slots), strict=True):
        torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match=r"sharpness=0\.0, expected a number > 0"):
        module(inputs, slots, sharpness=0.0)


def test_prior_draws_any_number_of_slots():
    module = SlotAttention(num_slots=4, dim=8, groups=2)
    assert module.sample_slots(3, num_slots=6).shape == (3, 6, 8)
    drawn = module.sample_slots(3, torch.Generator().manual_seed(1), num_slots=4)
    assert torch.equal(drawn, module.sample_slots(3, torch.Generator().manual_seed(1)))
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"num_slots={count}, expected a positive multiple of groups=2"):
            module.sample_slots(3, num_slots=count)
