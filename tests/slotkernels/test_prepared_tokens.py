"""Calls with prepared tokens return the same as calls with the tokens, in one or several calls, frame by frame too."""

import pytest
import torch
from slotkernels import SlotAttention, slot_attention
from slotkernels.slot_attention import STANDARD, VIDEOSAUR, PreparedTokens

BATCH, TOKENS, SLOTS, DIM, WIDTH, FRAMES = 2, 7, 3, 6, 5, 4
FORMS = ["absorbed", "projected"]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Keys and values are absorbed, or projected."""
    monkeypatch.setattr(slot_attention.module, "absorbs", lambda *sizes: request.param == "absorbed")
    return request.param


def make(implicit="none", conventions=VIDEOSAUR, dtype=torch.float64, **options):
    module = SlotAttention(SLOTS, DIM, WIDTH, implicit=implicit, conventions=conventions, prior=False, **options)
    module.to(dtype)
    for parameter in module.parameters():  # biases and norms away from their special initial values
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def tokens_and_slots(rows=BATCH, dtype=torch.float64):
    return (torch.randn(rows, n, d, dtype=dtype, requires_grad=True) for n, d in ((TOKENS, WIDTH), (SLOTS, DIM)))


def gradients(outputs, leaves, seed=5):
    """Gradients of all ``leaves`` for random cotangents, the same in each call."""
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents)


def assert_equal(actual, expected):
    for name, one, other in zip(range(len(expected)), actual, expected, strict=True):
        assert torch.equal(one, other), f"tensor {name} differs by up to {(one - other).abs().max():.2g}"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mask", ["none", "of tokens", "of groups"])
@pytest.mark.parametrize("implicit", ["none", "bilevel"])
def test_prepared_tokens_give_the_same_bits(form, implicit, mask, autocast):
    groups = 3 if mask == "of groups" else 1
    dtype = torch.float32
    module, (inputs, slots) = make(implicit, dtype=dtype, groups=groups), tokens_and_slots(dtype=dtype)
    shape = {"none": None, "of tokens": (BATCH, TOKENS), "of groups": (BATCH, groups, TOKENS)}[mask]
    seen = None if shape is None else torch.rand(shape) > 0.3
    leaves = [inputs, slots, *module.parameters()]

    def run(prepares):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = module(module.prepare(inputs, seen), slots) if prepares else module(inputs, slots, seen)
        return [*output, *gradients(output, leaves)]

    assert_equal(run(True), run(False))


def test_calls_on_the_same_tokens_differ_in_iterations_and_slots(form):
    module, (inputs, _) = make(), tokens_and_slots()
    prepared = module.prepare(inputs, num_slots=SLOTS, iterations=6)
    for iterations, count in ((1, 3), (3, 3), (2, 5)):
        slots = torch.randn(BATCH, count, DIM, dtype=torch.float64)
        assert_equal(module(prepared, slots, iterations=iterations), module(inputs, slots, iterations=iterations))
        sharp = {"iterations": iterations, "sharpness": 2.0}
        assert_equal(module(prepared, slots, **sharp), module(inputs, slots, **sharp))


def test_gradients_of_several_calls_add_up(form):
    module, (inputs, slots) = make(), tokens_and_slots()
    leaves = [inputs, slots, *module.parameters()]
    prepared = module.prepare(inputs)
    outputs = [module(prepared, slots, iterations=n).slots for n in (1, 3)]
    expected = [module(inputs, slots, iterations=n).slots for n in (1, 3)]
    # Rounding differs: gradients of the calls are added before or after the norm of the tokens is differentiated.
    torch.testing.assert_close(gradients(outputs, leaves), gradients(expected, leaves))


def chain(of_frame, slots):
    """Slots of all frames, each frame starting from the slots of the one before; 3 iterations, then 2."""
    outputs = []
    for t in range(FRAMES):
        slots, attention = of_frame(t, slots, 2 if t else 3)
        outputs += [slots, attention]
    return outputs


@pytest.mark.parametrize("masked", [False, True])
def test_frames_of_clips_equal_calls_frame_by_frame(form, masked):
    module, (clips, _), (_, slots) = make(), tokens_and_slots(FRAMES * BATCH), tokens_and_slots()
    mask = torch.rand(FRAMES * BATCH, TOKENS) > 0.3 if masked else None
    leaves = [clips, slots, *module.parameters()]
    frames = module.prepare(clips, mask).split(FRAMES)
    outputs = chain(lambda t, slots, iterations: module(frames[t], slots, iterations=iterations), slots)
    rows = [slice(t, None, FRAMES) for t in range(FRAMES)]

    def direct(t, slots, iterations):
        return module(clips[rows[t]], slots, None if mask is None else mask[rows[t]], iterations=iterations)

    expected = chain(direct, slots)
    torch.testing.assert_close(outputs, expected)  # a product of more rows may round differently
    torch.testing.assert_close(gradients(outputs, leaves), gradients(expected, leaves))


def test_gradient_of_frames_is_joined_without_zeros(form):
    module, (clips, _), (_, slots) = make(), tokens_and_slots(FRAMES * BATCH), tokens_and_slots()
    frames = module.prepare(clips).split(FRAMES)
    assert all(frame.weights is frames[0].weights for frame in frames)
    assert frames[1].k._base is frames[0].k._base  # views
    outputs = chain(lambda t, slots, iterations: module(frames[t], slots, iterations=iterations), slots)
    with torch.profiler.profile(record_shapes=True) as profile:
        outputs[-2].sum().backward()
    width = list(frames[0].k.shape)[2]
    sizes = [e.input_shapes for e in profile.events() if e.name in ("aten::zeros", "aten::zero_", "aten::fill_")]
    assert [BATCH, FRAMES, TOKENS, width] not in [shapes[0] for shapes in sizes if shapes]
    assert (clips.grad.abs().sum((1, 2)) > 0).all()


def test_recurrence_compiles_fullgraph(form):
    module, (clips, _), (_, slots) = make(), tokens_and_slots(FRAMES * BATCH), tokens_and_slots()
    leaves = [clips, slots, *module.parameters()]

    def recurrence(clips, slots):
        frames = module.prepare(clips).split(FRAMES)
        return chain(lambda t, slots, iterations: module(frames[t], slots, iterations=iterations), slots)

    expected, outputs = (
        recurrence(clips, slots),
        torch.compile(recurrence, fullgraph=True, backend="aot_eager")(clips, slots),
    )
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(outputs, leaves), gradients(expected, leaves))


def test_module_compiles_with_prepared_tokens_as_input(form):
    module, (inputs, slots) = make(), tokens_and_slots()
    prepared = module.prepare(inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for iterations in (3, 2):
        torch.testing.assert_close(
            compiled(prepared, slots, iterations=iterations), module(prepared, slots, iterations=iterations)
        )


def test_form_is_chosen_for_the_calls_to_come():
    module = SlotAttention(8, 64, 768, implicit="none")
    inputs = torch.randn(1, 300, 768)
    assert module.prepare(inputs, num_slots=32).v is not None
    assert module.prepare(inputs, num_slots=1, iterations=1).v is None
    with torch.no_grad():
        assert module.prepare(inputs, num_slots=8, iterations=3).v is None


def test_module_without_a_prior_needs_slots():
    module, (inputs, slots) = make(), tokens_and_slots()
    assert not {"mu", "log_sigma"} & set(module.state_dict())
    module(inputs, slots).slots.square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    for call in (lambda: module(inputs), lambda: module.sample_slots(2), lambda: module(module.prepare(inputs))):
        with pytest.raises(ValueError, match=r"no prior \(prior=False\): pass initial slots"):
            call()


def test_prior_is_drawn_for_prepared_tokens():
    module, inputs = SlotAttention(SLOTS, DIM), torch.randn(BATCH, TOKENS, DIM)
    torch.manual_seed(2)
    expected = module(inputs)
    torch.manual_seed(2)
    assert_equal(module(module.prepare(inputs)), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, s: m.prepare(x[0]), r"inputs is float64 \[7, 5\], expected \[B, M, Din\]"),
        (lambda m, x, s: m.prepare(x, num_slots=0), "num_slots=0, expected at least 1"),
        (lambda m, x, s: m.prepare(x, iterations=0), "iterations=0, expected at least 1"),
        (lambda m, x, s: m.prepare(x).split(3), "frames=3, expected a divisor of the 2 rows"),
        (lambda m, x, s: m.prepare(x).split(0), "frames=0, expected a divisor of the 2 rows"),
        (lambda m, x, s: m(m.prepare(x), s[:1]), "slots is .* with B = 2"),
        (lambda m, x, s: m(m.prepare(x), s, torch.ones(2, 7).bool()), r"expected it in prepare\(inputs, mask\)"),
    ],
)
def test_bad_calls_are_value_errors_that_name_it(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(conventions=STANDARD), *tokens_and_slots())


def test_tokens_of_another_precision_are_refused():
    module, (inputs, slots) = make(dtype=torch.float32), tokens_and_slots(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        prepared = module.prepare(inputs)
    assert isinstance(prepared, PreparedTokens)
    with pytest.raises(ValueError, match=r"prepared.k is bfloat16 .*, expected float32: .* same torch.autocast"):
        module(prepared, slots)
