"""Loading published parameters of slot attention: values, gradients and errors, compared with short references."""

import logging
from collections.abc import Mapping

import pytest
import torch
from slotkernels import SlotAttention, slot_attention
from slotkernels.slot_attention import SAVI, STANDARD, VIDEOSAUR, Conventions

from .published_styles import DIN, QKV, VARIANTS, D, M, N, every_variant, flax, keras, lucidrains, oclf, videosaur

FORMS = ["absorbed", "projected"]


def force(monkeypatch, form):
    monkeypatch.setattr(slot_attention.module, "absorbs", lambda *sizes: form == "absorbed")


def check(module, expected, inputs, slots):
    """Compare slots, attention and the gradient of the tokens through all iterations, for random cotangents."""
    inputs = inputs.clone().requires_grad_()
    actual, expected = module(inputs, slots), expected(inputs, slots)
    cotangents = [torch.randn_like(x) for x in expected]
    for got, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-13)
    grads = [torch.autograd.grad(outputs, inputs, cotangents)[0] for outputs in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def tokens_and_slots():
    return torch.randn(2, M, DIN, dtype=torch.float64), torch.randn(2, N, D, dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@every_variant
def test_loaded_module_computes_what_its_style_computes(monkeypatch, variant, form):
    force(monkeypatch, form)
    parameters = variant.parameters()
    module = variant.load(parameters)
    assert module.to_q.weight.dtype == torch.float64
    read = {"use_mlp": hasattr(module, "mlp"), "qkv_bias": module.to_q.bias is not None}  # off the tensors
    assert module.conventions == variant.conventions._replace(**read)
    check(module, lambda *args: variant.run(parameters, *args), *tokens_and_slots())


@pytest.mark.parametrize("form", FORMS)
@every_variant
def test_eps_is_placed_as_in_the_style_for_any_iterations(monkeypatch, variant, form):
    force(monkeypatch, form)
    parameters, (inputs, slots) = variant.parameters(), tokens_and_slots()
    large = variant.conventions._replace(eps=0.1)
    module = variant.load(parameters, conventions=large, iterations=4)
    check(module, lambda *args: variant.run(parameters, *args, iterations=4, eps=0.1), inputs, slots)
    other = {"numerator": "denominator", "denominator": "numerator"}[large.eps_placement]
    elsewhere = variant.load(parameters, conventions=large._replace(eps_placement=other), iterations=4)
    assert (elsewhere(inputs, slots).slots - module(inputs, slots).slots).abs().max() > 1e-4


def test_scale_gru_state_and_norm_eps_can_be_overridden():
    variant, (inputs, slots) = VARIANTS["videosaur"], tokens_and_slots()
    parameters = variant.parameters()
    check(
        variant.load(parameters, conventions=VIDEOSAUR._replace(scale=D**0.5)),
        lambda *args: videosaur(parameters, *args, scale=D**0.5),
        inputs,
        slots,
    )
    renamed = {
        name.replace("norm_features", "norm_input").replace("layers.0", "norm"): p for name, p in parameters.items()
    }
    mlp = {"mlp.norm": "norm_pre_ff", "mlp.layers.1": "mlp.0", "mlp.layers.3": "mlp.2"}
    for theirs, ours in mlp.items():
        renamed = {name.replace(theirs, ours): p for name, p in renamed.items()}
    check(
        variant.load(parameters, conventions=STANDARD),
        lambda *args: lucidrains(renamed, *args, biases=False),
        inputs,
        slots,
    )
    assert variant.load(parameters, conventions=Conventions(norm_eps=0.5)).norm_slots.eps == 0.5


@pytest.mark.filterwarnings("ignore:load_published.*mu and log_sigma")
def test_former_keywords_change_one_convention_and_warn():
    parameters = VARIANTS["savi-flax"].parameters()
    with pytest.warns(DeprecationWarning, match=r"write conventions=SAVI._replace\(eps=0.1, scale=2.0\)"):
        module = SlotAttention.load_published(parameters, "savi", eps=0.1, scale=2.0)
    assert module.conventions == SAVI._replace(eps=0.1, scale=2.0, use_mlp=False)


@every_variant
def test_loaded_module_trains(variant):
    parameters = variant.parameters()
    module = variant.load(parameters, implicit="bilevel", num_slots=4)
    inputs, _ = tokens_and_slots()
    result = module(inputs)
    assert result.slots.shape == (2, 4, D)
    result.slots.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    before = parameters["gru.weight_ih"].clone() if "gru.weight_ih" in parameters else None
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert before is None or torch.equal(parameters["gru.weight_ih"], before)  # ours are copies


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.own_prior])
def test_a_prior_among_the_names_is_loaded(name):
    variant = VARIANTS[name]
    parameters = variant.parameters()
    module = variant.load(parameters)
    sigma = next(p for name, p in parameters.items() if "sigma" in name)
    assert torch.equal(module.mu, parameters["slots_mu"].flatten())
    torch.testing.assert_close(module.log_sigma.exp(), variant.sigma(sigma).flatten())


@pytest.mark.filterwarnings("ignore:load_published.*mu and log_sigma")
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.prefix])
def test_checkpoint_of_a_whole_model_gives_the_same_module(name):
    variant, (inputs, slots) = VARIANTS[name], tokens_and_slots()
    checkpoint, parameters = variant.checkpoint(), variant.parameters()
    module = SlotAttention.load_published(checkpoint, variant.style)
    check(module, lambda *args: variant.run(parameters, *args), inputs, slots)
    for ours, theirs in zip(("mu", "log_sigma"), variant.prior_around, strict=False):
        assert torch.equal(getattr(module, ours), checkpoint[theirs].flatten())


@pytest.mark.parametrize("name", ["slot-contrast", "oclf-with-biases", "oclf-without-mlp"])
def test_initial_slots_without_one_gaussian_are_announced(name):
    with pytest.warns(UserWarning, match="mu and log_sigma are not loaded: pass slots to each call"):
        SlotAttention.load_published(VARIANTS[name].checkpoint(), VARIANTS[name].style)


def test_a_deviation_of_zero_draws_the_mean_and_stays_finite():
    parameters = VARIANTS["lucidrains-evelinehong"].parameters()
    parameters["slots_sigma"][..., :2] = 0
    module = SlotAttention.load_published(parameters, "lucidrains")
    draws = module.sample_slots(5)
    assert torch.equal(draws[..., :2], module.mu[:2].expand(5, 7, 2))
    assert (draws[..., 2:] - module.mu[2:]).abs().min() > 0
    draws.sum().backward()
    assert module.log_sigma.isfinite().all()
    assert module.log_sigma.grad.isfinite().all()


def test_implicit_differentiation_of_oclf_is_one_more_iteration():
    variant, (inputs, slots) = VARIANTS["oclf"], tokens_and_slots()
    parameters = variant.parameters()

    def published(x, s):
        return oclf(parameters, x, oclf(parameters, x, s)[0].detach(), iterations=1)

    check(variant.load(parameters, implicit="detach", iterations=4), published, inputs, slots)


@pytest.mark.parametrize("processor", ["processor.module.corrector.", "model.processor.corrector."])
def test_videosaur_prior_is_found_beside_the_processor(processor):
    root = "model." if processor.startswith("model.") else ""
    parameters = {processor + name: p for name, p in VARIANTS["videosaur"].parameters().items()}
    parameters |= {f"{root}initializer.mean": torch.randn(1, 1, D), f"{root}initializer.log_std": torch.randn(1, 1, D)}
    parameters["encoder.output_transform.layers.0.weight"] = torch.ones(D)
    module = SlotAttention.load_published({"state_dict": parameters, "epoch": 3}, "videosaur")
    assert torch.equal(module.mu, parameters[f"{root}initializer.mean"].double().flatten())
    assert torch.equal(module.log_sigma, parameters[f"{root}initializer.log_std"].double().flatten())


def test_prefix_is_found_or_given_and_what_was_loaded_is_said(caplog):
    variant, (inputs, slots) = VARIANTS["lucidrains"], tokens_and_slots()
    first, second = variant.parameters(1), variant.parameters(2)
    larger = {"encoder.mlp.0.weight": torch.ones(3), "decoder.norm_slots.weight": torch.ones(2)}
    alone = {f"model.grouper.{name}": p for name, p in first.items()} | larger
    with caplog.at_level(logging.INFO, "slotkernels"):
        module = variant.load(alone)
    assert "to_q.weight" in caplog.text
    assert "lucidrains/slot-attention with prefix 'model.grouper.'" in caplog.text
    check(module, lambda *args: lucidrains(first, *args), inputs, slots)

    two = alone | {f"ema.grouper.{name}": p for name, p in second.items()}
    with pytest.raises(ValueError, match=r"more than once, choose prefix= among 'ema\.grouper\.', 'model\.grouper\.'"):
        variant.load(two)
    for prefix in ("ema.grouper.", "ema.grouper", "ema/grouper"):
        check(variant.load(two, prefix=prefix), lambda *args: lucidrains(second, *args), inputs, slots)


def test_tensorflow_checkpoint_names_and_arrays_are_read():
    parameters = VARIANTS["locatello-keras"].parameters()
    root, leaf = "network/layer_with_weights-0/slot_attention/", "/.ATTRIBUTES/VARIABLE_VALUE"
    checkpoint = {f"{root}{name}{leaf}": p.numpy() for name, p in parameters.items()}
    for array in checkpoint.values():
        array.flags.writeable = False
    checkpoint |= {f"{root}{n}/.OPTIMIZER_SLOT/optimizer/m{leaf}": p.numpy() for n, p in parameters.items()}
    checkpoint[f"network/layer_with_weights-0/mlp/layer_with_weights-0/kernel{leaf}"] = torch.ones(4, 4).numpy()
    checkpoint["_CHECKPOINTABLE_OBJECT_GRAPH"] = b"graph"
    module = SlotAttention.load_published(checkpoint, "locatello")
    check(module, lambda *args: keras(parameters, *args), *tokens_and_slots())


def test_nested_flax_parameters_are_read():
    variant = VARIANTS["savi-flax-with-mlp"]
    parameters, tree = variant.parameters(), {}
    for name, p in parameters.items():
        names = ["params", "Processor_0", "SlotAttention_0", *name.split(".")]
        path, leaf = names[:-1], names[-1]
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        node[leaf] = p.float().numpy()
    assert isinstance(tree, Mapping)
    module = variant.load(tree)
    assert module.to_q.weight.dtype == torch.float32
    check(module.double(), lambda *args: flax({n: p.float().double() for n, p in parameters.items()}, *args),
          *tokens_and_slots())  # fmt: skip


def without(name, key):
    parameters = VARIANTS[name].parameters()
    del parameters[key]
    return parameters


def with_integers(variant, name):
    parameters = VARIANTS[variant].parameters()
    return parameters | {name: torch.ones_like(parameters[name], dtype=torch.int64)}


def with_negative_deviation():
    parameters = VARIANTS["lucidrains-evelinehong"].parameters()
    parameters["slots_sigma"][0, 0, 1] = -0.5
    return parameters


def with_shape(name, key, *shape):
    return VARIANTS[name].parameters() | {key: torch.ones(shape, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("parameters", "style", "message"),
    [
        ({}, "dinosaur", "style='dinosaur', expected one of locatello, lucidrains, savi, videosaur, oclf"),
        ({}, "savi", "no name of this style; found nothing; expected the names of google-research/slot-attention-vid"),
        ({"a.b": torch.ones(1)}, "videosaur", "found a.b; expected the names of martius-lab/videosaur: norm_features"),
        (without("lucidrains", "to_k.weight"), "lucidrains", "slot-attention with prefix ''; missing to_k.weight;"),
        (without("lucidrains", "to_k.bias"), "lucidrains", "with prefix ''; missing to_k.bias;"),
        (without("videosaur", "mlp.layers.0.bias"), "videosaur", "missing mlp.layers.0.bias;"),
        (without("savi-flax", "GRU_0.GRUCell_0.hn.bias"), "savi", "missing GRU_0.GRUCell_0.hn.bias;"),
        (with_shape("videosaur", "gate_proj.weight", 2, 2), "videosaur", "prefix ''; unexpected gate_proj.weight"),
        (VARIANTS["savi-flax"].parameters(), "videosaur", "found LayerNorm_0.scale, LayerNorm_0.bias, LayerNorm_1"),
        (with_shape("locatello-port", "gru.bias_hh", 7), "locatello", r"gru.bias_hh is \[7\], expected \[18\]"),
        (without("oclf", "ff_mlp.module.3.bias"), "oclf", "missing ff_mlp.module.3.bias;"),
        (with_shape("oclf-without-mlp", "ff_mlp.0.weight", D), "oclf", "prefix ''; unexpected ff_mlp.0.weight"),
        (with_negative_deviation(), "lucidrains", "slots_sigma has a standard deviation of -0.5, expected at least 0"),
        (with_integers("lucidrains-evelinehong", "slots_sigma"), "lucidrains", "slots_sigma is int64 .*expected"),
        (with_integers("savi-flax", "GRU_0.GRUCell_0.hn.bias"), "savi", r"hn.bias is int64 .*, expected"),
        (with_shape("lucidrains", "slots_mu", 1, 4, D), "lucidrains", r"mu is \[4, 6\], expected \[6\]"),
        (with_shape("lucidrains", "to_q.weight", D), "lucidrains", r"float64 \[6\], expected a matrix"),
        (with_shape("locatello-keras", "gru/bias", 3 * D), "locatello", r"gru.bias is float64 \[18\]: not of the exp"),
        (with_shape("savi-flax", "GRU_0.GRUCell_0.hz.kernel", 9, 9), "savi", r"hz.kernel is .* \[9, 9\].* one width"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_does_not_fit_is_a_value_error_that_names_it(parameters, style, message):
    with pytest.raises(ValueError, match=message):
        SlotAttention.load_published(parameters, style=style, num_slots=3)


@pytest.mark.filterwarnings("ignore:load_published")
def test_a_prefix_that_selects_too_little_or_nothing_is_an_error():
    parameters = {f"a.{name}": p for name, p in VARIANTS["videosaur"].parameters().items()}
    with pytest.raises(ValueError, match=r"with prefix 'b\.'; missing .*to_q.weight"):
        SlotAttention.load_published(parameters, "videosaur", prefix="b")
    with pytest.raises(ValueError, match=r"with prefix ''; missing .*; unexpected a\.gru"):
        SlotAttention.load_published(parameters, "videosaur", prefix="")


def new_options(use_mlp):
    torch.manual_seed(2)
    conventions = VIDEOSAUR._replace(norm_eps=1e-3, use_mlp=use_mlp)
    return SlotAttention(N, D, DIN, qkv_dim=QKV, conventions=conventions)


@pytest.mark.parametrize("use_mlp", [True, False])
def test_compiles_fullgraph_with_the_options_of_published_code(use_mlp):
    module, (inputs, slots) = new_options(use_mlp).double(), tokens_and_slots()
    parameters = [p for n, p in module.named_parameters() if n not in ("mu", "log_sigma")]
    expected = torch.autograd.grad(module(inputs, slots).slots.square().sum(), parameters)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(inputs, slots).slots.square().sum(), parameters), expected)


@pytest.mark.parametrize("use_mlp", [True, False])
def test_normalised_state_stays_float32_under_autocast(use_mlp):
    module = new_options(use_mlp)
    inputs, slots = (x.float() for x in tokens_and_slots())
    expected = module(inputs, slots)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(inputs, slots)
    assert actual.slots.dtype == torch.float32
    # bf16 keeps 8 bits; about ten products in a row leave some 2^-5 of slots of size 1.
    assert (actual.slots - expected.slots).abs().max() < 0.06


def test_unknown_gru_state_is_an_error():
    with pytest.raises(ValueError, match="gru_state='both', expected one of slots, normalised"):
        SlotAttention(2, 4, conventions=Conventions(gru_state="both"))
    with pytest.raises(ValueError, match="qkv_dim=-1, expected at least 1"):
        SlotAttention(2, 4, qkv_dim=-1)
