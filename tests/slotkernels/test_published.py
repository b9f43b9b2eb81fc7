"""Each published style against a few lines written from its facts, on random parameters under the published names."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from slotkernels import SlotAttention, slot_attention
from slotkernels.slot_attention import LOCATELLO, LUCIDRAINS, SAVI, SLOTFORMER, STANDARD, VIDEOSAUR, Conventions

M, DIN, D, N, QKV, H = 7, 5, 6, 3, 4, 8
FORMS = ["absorbed", "projected"]


def norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def gate(reset, update, candidate, hidden, state):
    update = update.sigmoid()
    return update * state + (1 - update) * (candidate + reset.sigmoid() * hidden).tanh()


def torch_gru(p, u, s):
    ir, iz, i_n = (u @ p["gru.weight_ih"].T + p["gru.bias_ih"]).chunk(3, -1)
    hr, hz, hn = (s @ p["gru.weight_hh"].T + p["gru.bias_hh"]).chunk(3, -1)
    return gate(ir + hr, iz + hz, i_n, hn, s)


def torch_norm(p, name, x, eps=1e-5):
    return norm(x, p[f"{name}.weight"], p[f"{name}.bias"], eps)


def torch_mlp(p, first, second, x):
    hidden = (x @ p[f"{first}.weight"].T + p[f"{first}.bias"]).relu()
    return hidden @ p[f"{second}.weight"].T + p[f"{second}.bias"]


def keras(p, x, s, iterations=3, eps=1e-8):
    def layer_norm(name, x):
        return norm(x, p[f"{name}/gamma"], p[f"{name}/beta"], 1e-3)

    x = layer_norm("norm_inputs", x)
    for _ in range(iterations):
        q = layer_norm("norm_slots", s) @ p["project_q/kernel"] * D**-0.5
        attention = (x @ p["project_k/kernel"] @ q.mT).softmax(-1)
        weights = (attention + eps) / (attention + eps).sum(1, keepdim=True)
        u = weights.mT @ (x @ p["project_v/kernel"])
        iz, ir, i_n = (u @ p["gru/kernel"] + p["gru/bias"][0]).chunk(3, -1)
        hz, hr, hn = (s @ p["gru/recurrent_kernel"] + p["gru/bias"][1]).chunk(3, -1)
        s = gate(ir + hr, iz + hz, i_n, hn, s)
        first, second = "mlp/layer_with_weights-0", "mlp/layer_with_weights-1"
        hidden = (layer_norm("norm_mlp", s) @ p[f"{first}/kernel"] + p[f"{first}/bias"]).relu()
        s = s + hidden @ p[f"{second}/kernel"] + p[f"{second}/bias"]
    return s, attention


def port(p, x, s, iterations=3, eps=1e-8):
    x = torch_norm(p, "norm_inputs", x)
    for _ in range(iterations):
        q = torch_norm(p, "norm_slots", s) @ p["project_q.weight"].T
        attention = (D**-0.5 * x @ p["project_k.weight"].T @ q.mT).softmax(-1)
        weights = (attention + eps) / (attention + eps).sum(1, keepdim=True)
        s = torch_gru(p, weights.mT @ (x @ p["project_v.weight"].T), s)
        s = s + torch_mlp(p, "mlp.0", "mlp.2", torch_norm(p, "norm_mlp", s))
    return s, attention


def lucidrains(p, x, s, iterations=3, eps=1e-8, first="mlp.0", second="mlp.2", biases=True):
    def project(name, x):
        return x @ p[f"{name}.weight"].T + (p[f"{name}.bias"] if biases else 0)

    x = torch_norm(p, "norm_input", x)
    for _ in range(iterations):
        dots = project("to_q", torch_norm(p, "norm_slots", s)) @ project("to_k", x).mT * D**-0.5
        attention = dots.softmax(1)
        weights = (attention + eps) / (attention + eps).sum(-1, keepdim=True)
        s = torch_gru(p, weights @ project("to_v", x), s)
        s = s + torch_mlp(p, first, second, torch_norm(p, "norm_pre_ff", s))
    return s, attention.mT


def evelinehong(p, x, s, iterations=3, eps=1e-8):
    return lucidrains(p, x, s, iterations, eps, "fc1", "fc2")


def first_lucidrains(p, x, s, iterations=3, eps=1e-8):
    return lucidrains(p, x, s, iterations, eps, biases=False)


def flax(p, x, s, iterations=1, eps=1e-8):
    def dense(name, x):
        kernel = p[f"{name}.kernel"]
        return x @ (kernel[:, 0] if kernel.dim() == 3 else kernel) + p.get(f"{name}.bias", 0)

    x = norm(x, p["LayerNorm_1.scale"], p["LayerNorm_1.bias"], 1e-6)
    k, v, cell = dense("general_dense_k_0", x), dense("general_dense_v_0", x), "GRU_0.GRUCell_0."
    for _ in range(iterations):
        q = dense("general_dense_q_0", norm(s, p["LayerNorm_0.scale"], p["LayerNorm_0.bias"], 1e-6)) / QKV**0.5
        attention = (q @ k.mT).softmax(-2)
        u = attention / (attention.sum(-1, keepdim=True) + eps) @ v
        reset = dense(f"{cell}ir", u) + dense(f"{cell}hr", s)
        update = dense(f"{cell}iz", u) + dense(f"{cell}hz", s)
        s = gate(reset, update, dense(f"{cell}in", u), dense(f"{cell}hn", s), s)
        if "MLP_0.LayerNorm_0.scale" in p:
            hidden = norm(s, p["MLP_0.LayerNorm_0.scale"], p["MLP_0.LayerNorm_0.bias"], 1e-6)
            s = s + dense("MLP_0.dense_mlp_1", dense("MLP_0.dense_mlp_0", hidden).relu())
    return s, attention.mT


def savi_pytorch(p, x, s, iterations=1, eps=1e-8):
    def dense(name, x):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    x = torch_norm(p, "layernorm_input", x, 1e-6)
    for _ in range(iterations):
        q = dense("dense_q", torch_norm(p, "layernorm_q", s, 1e-6)) / D**0.5
        attention = (q @ dense("dense_k", x).mT).softmax(-2)
        u = attention / (attention.sum(-1, keepdim=True) + eps) @ dense("dense_v", x)
        reset = dense("gru.dense_ir", u) + dense("gru.dense_hr", s)
        update = dense("gru.dense_iz", u) + dense("gru.dense_hz", s)
        s = gate(reset, update, dense("gru.dense_in", u), dense("gru.dense_hn", s), s)
        if "mlp.layernorm_module.weight" in p:
            hidden = torch_norm(p, "mlp.layernorm_module", s, 1e-6)
            s = s + torch_mlp(p, "mlp.model.dense_mlp_0", "mlp.model.dense_mlp_1", hidden)
    return s, attention.mT


def slotformer(p, x, s, iterations=2, eps=1e-6):
    x = torch_norm(p, "norm_inputs", x)
    for _ in range(iterations):
        q = torch_norm(p, "project_q.0", s) @ p["project_q.1.weight"].T
        attention = (D**-0.5 * x @ p["project_k.weight"].T @ q.mT).softmax(-1)
        weights = (attention + eps) / (attention + eps).sum(1, keepdim=True)
        s = torch_gru(p, weights.mT @ (x @ p["project_v.weight"].T), s)
        s = s + torch_mlp(p, "mlp.1", "mlp.3", torch_norm(p, "mlp.0", s))
    return s, attention


def videosaur(p, x, s, iterations=3, eps=1e-8, scale=None):
    x = torch_norm(p, "norm_features", x)
    width = len(p["to_k.weight"])
    for _ in range(iterations):
        s = torch_norm(p, "norm_slots", s)
        dots = s @ p["to_q.weight"].T @ (x @ p["to_k.weight"].T).mT * (scale or width**-0.5)
        attention = dots.softmax(1)
        weights = (attention + eps) / (attention + eps).sum(-1, keepdim=True)
        s = torch_gru(p, weights @ (x @ p["to_v.weight"].T), s)  # carries on the normalised slots
        if "mlp.layers.0.weight" in p:
            s = s + torch_mlp(p, "mlp.layers.1", "mlp.layers.3", torch_norm(p, "mlp.layers.0", s))
    return s, attention.mT


def shapes_of(text):
    """Lines of a name, or of several that share a shape, and that shape."""
    sizes = {"M": M, "Din": DIN, "D": D, "3D": 3 * D, "QKV": QKV, "H": H}
    rows = (line.split(":") for line in text.strip().splitlines())
    return {
        name: tuple(sizes.get(s) or int(s) for s in shape.split()) for names, shape in rows for name in names.split()
    }


def torch_linear(name, rows, columns, bias=True):
    return f"{name}.weight: {rows} {columns}\n" + (f"{name}.bias: {rows}\n" if bias else "")


def torch_shapes(inputs, slots, mlp_norm, q, k, v, first, second, qkv="D", bias=False):
    text = torch_linear(q, qkv, "D", bias) + torch_linear(k, qkv, "Din", bias) + torch_linear(v, qkv, "Din", bias)
    text += f"{inputs}.weight {inputs}.bias: Din\n{slots}.weight {slots}.bias: D\n"
    if mlp_norm:
        text += (
            f"{mlp_norm}.weight {mlp_norm}.bias: D\n" + torch_linear(first, "H", "D") + torch_linear(second, "D", "H")
        )
    return text


TORCH_GRU = "gru.weight_ih: 3D D\ngru.weight_hh: 3D D\ngru.bias_ih gru.bias_hh: 3D\n"
SAVI_PYTORCH_GRU = """gru.dense_ir.weight gru.dense_iz.weight gru.dense_in.weight: D D
gru.dense_hr.weight gru.dense_hz.weight gru.dense_hn.weight: D D
gru.dense_ir.bias gru.dense_iz.bias gru.dense_in.bias gru.dense_hn.bias: D
"""
PORT = ("norm_inputs", "norm_slots", "norm_mlp", "project_q", "project_k", "project_v")
LUCIDRAINS_NAMES = ("norm_input", "norm_slots", "norm_pre_ff", "to_q", "to_k", "to_v")
VIDEOSAUR_NAMES = (
    "norm_features",
    "norm_slots",
    "mlp.layers.0",
    "to_q",
    "to_k",
    "to_v",
    "mlp.layers.1",
    "mlp.layers.3",
)
SAVI_PYTORCH = ("layernorm_input", "layernorm_q", "mlp.layernorm_module", "dense_q", "dense_k", "dense_v")
FLAX = """LayerNorm_0.scale LayerNorm_0.bias: D
LayerNorm_1.scale LayerNorm_1.bias: Din
general_dense_q_0.kernel: D 1 QKV
general_dense_k_0.kernel general_dense_v_0.kernel: Din 1 QKV
GRU_0.GRUCell_0.ir.kernel GRU_0.GRUCell_0.iz.kernel GRU_0.GRUCell_0.in.kernel: QKV D
GRU_0.GRUCell_0.hr.kernel GRU_0.GRUCell_0.hz.kernel GRU_0.GRUCell_0.hn.kernel: D D
GRU_0.GRUCell_0.ir.bias GRU_0.GRUCell_0.iz.bias GRU_0.GRUCell_0.in.bias GRU_0.GRUCell_0.hn.bias: D
"""
FLAX_MLP = """MLP_0.LayerNorm_0.scale MLP_0.LayerNorm_0.bias MLP_0.dense_mlp_1.bias: D
MLP_0.dense_mlp_0.kernel: D H
MLP_0.dense_mlp_0.bias: H
MLP_0.dense_mlp_1.kernel: H D
"""
KERAS = """slots_mu slots_log_sigma: 1 1 D
norm_inputs/gamma norm_inputs/beta: Din
norm_slots/gamma norm_slots/beta norm_mlp/gamma norm_mlp/beta mlp/layer_with_weights-1/bias: D
project_q/kernel: D D
project_k/kernel project_v/kernel: Din D
gru/kernel gru/recurrent_kernel: D 3D
gru/bias: 2 3D
mlp/layer_with_weights-0/kernel: D H
mlp/layer_with_weights-0/bias: H
mlp/layer_with_weights-1/kernel: H D
"""


@dataclass
class Variant:
    style: str
    run: Callable
    shapes: str
    conventions: Conventions = STANDARD
    own_prior: bool = True

    def parameters(self, seed=5):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes_of(self.shapes).items()
        }

    def load(self, parameters, **options):
        if self.own_prior:
            return SlotAttention.load_published(parameters, style=self.style, **options)
        with pytest.warns(UserWarning, match="mu and log_sigma are not loaded, give slots to forward"):
            return SlotAttention.load_published(parameters, style=self.style, **options)


MU_LOG_SIGMA = "slots_mu slots_log_sigma: 1 1 D\n"
MU_LOGSIGMA = "slots_mu slots_logsigma: 1 1 D\n"
VARIANTS = {
    "locatello-keras": Variant("locatello", keras, KERAS, LOCATELLO),
    "locatello-port": Variant("locatello", port, torch_shapes(*PORT, "mlp.0", "mlp.2") + TORCH_GRU + MU_LOG_SIGMA),
    "lucidrains": Variant(
        "lucidrains",
        lucidrains,
        torch_shapes(*LUCIDRAINS_NAMES, "mlp.0", "mlp.2", bias=True) + TORCH_GRU + MU_LOGSIGMA,
        LUCIDRAINS,
    ),
    "lucidrains-without-biases": Variant(
        "lucidrains", first_lucidrains, torch_shapes(*LUCIDRAINS_NAMES, "mlp.0", "mlp.2") + TORCH_GRU + MU_LOGSIGMA
    ),
    "lucidrains-evelinehong": Variant(
        "lucidrains",
        evelinehong,
        torch_shapes(*LUCIDRAINS_NAMES, "fc1", "fc2", bias=True) + TORCH_GRU + MU_LOG_SIGMA,
        LUCIDRAINS,
    ),
    "savi-flax": Variant("savi", flax, FLAX, SAVI, False),
    "savi-flax-with-mlp": Variant("savi", flax, FLAX + FLAX_MLP, SAVI, False),
    "savi-pytorch": Variant(
        "savi",
        savi_pytorch,
        torch_shapes(*SAVI_PYTORCH, "mlp.model.dense_mlp_0", "mlp.model.dense_mlp_1") + SAVI_PYTORCH_GRU,
        SAVI,
        False,
    ),
    "savi-slotformer": Variant(
        "savi",
        slotformer,
        torch_shapes("norm_inputs", "project_q.0", "mlp.0", "project_q.1", "project_k", "project_v", "mlp.1", "mlp.3")
        + TORCH_GRU,
        SLOTFORMER,
        False,
    ),
    "videosaur": Variant("videosaur", videosaur, torch_shapes(*VIDEOSAUR_NAMES) + TORCH_GRU, VIDEOSAUR, False),
    "videosaur-without-mlp": Variant(
        "videosaur",
        videosaur,
        torch_shapes("norm_features", "norm_slots", "", "to_q", "to_k", "to_v", "", "", qkv="QKV")
        + TORCH_GRU.replace("weight_ih: 3D D", "weight_ih: 3D QKV"),
        VIDEOSAUR,
        False,
    ),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def force(monkeypatch, form):
    monkeypatch.setattr(slot_attention.module, "absorbs", lambda *sizes: form == "absorbed")


def check(module, expected, inputs, slots):
    """Slots, attention, and what reaches the tokens through all iterations, for random cotangents."""
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
    log_sigma = next(name for name in parameters if "sigma" in name)
    assert torch.equal(module.mu, parameters["slots_mu"].flatten())
    assert torch.equal(module.log_sigma, parameters[log_sigma].flatten())


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


def with_shape(name, key, *shape):
    return VARIANTS[name].parameters() | {key: torch.ones(shape, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("parameters", "style", "message"),
    [
        ({}, "dinosaur", "style='dinosaur', expected one of locatello, lucidrains, savi, videosaur"),
        ({}, "savi", "no name of this style; found nothing; expected the names of google-research/slot-attention-vid"),
        ({"a.b": torch.ones(1)}, "videosaur", "found a.b; expected the names of martius-lab/videosaur: norm_features"),
        (without("lucidrains", "to_k.weight"), "lucidrains", "slot-attention with prefix ''; missing to_k.weight;"),
        (without("lucidrains", "to_k.bias"), "lucidrains", "with prefix ''; missing to_k.bias;"),
        (without("videosaur", "mlp.layers.0.bias"), "videosaur", "missing mlp.layers.0.bias;"),
        (without("savi-flax", "GRU_0.GRUCell_0.hn.bias"), "savi", "missing GRU_0.GRUCell_0.hn.bias;"),
        (with_shape("videosaur", "gate_proj.weight", 2, 2), "videosaur", "prefix ''; unexpected gate_proj.weight"),
        (VARIANTS["savi-flax"].parameters(), "videosaur", "found LayerNorm_0.scale, LayerNorm_0.bias, LayerNorm_1"),
        (with_shape("locatello-port", "gru.bias_hh", 7), "locatello", r"gru.bias_hh is \[7\], expected \[18\]"),
        (with_shape("lucidrains", "slots_mu", 1, 4, D), "lucidrains", r"mu is \[4, 6\], expected \[6\]"),
        (with_shape("lucidrains", "to_q.weight", D), "lucidrains", r"float64 \[6\] where a matrix was expected"),
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
