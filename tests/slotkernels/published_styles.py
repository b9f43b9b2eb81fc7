"""Published styles of slot attention: each in a few lines, and its state dict as names, shapes and a seed.

Names and shapes were read in the repositories (November 2026; those of Slot Contrast in a copy). ``prefix`` and
``around`` are the surroundings in a checkpoint of the repository's whole model, where slot attention is a part of one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from slotkernels import SlotAttention
from slotkernels.slot_attention import LOCATELLO, LUCIDRAINS, OCLF, SAVI, SLOTFORMER, STANDARD, VIDEOSAUR, Conventions

M, DIN, D, N, QKV, H = 7, 5, 6, 3, 4, 8


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
        s = torch_gru(p, weights @ (x @ p["to_v.weight"].T), s)  # its state is the normalised slots
        if "mlp.layers.0.weight" in p:
            s = s + torch_mlp(p, "mlp.layers.1", "mlp.layers.3", torch_norm(p, "mlp.layers.0", s))
    return s, attention.mT


def oclf(p, x, s, iterations=3, eps=1e-8):
    """Object-Centric Learning Framework (DINOSAUR), one head: norm, then attention, GRU, MLP within ``ff_mlp``."""

    def project(name, x):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    x = torch_norm(p, "norm_input", x)
    keys, values = project("to_k", x), project("to_v", x)
    for _ in range(iterations):
        queries = project("to_q", torch_norm(p, "norm_slots", s))
        attention = (torch.einsum("bnd,bmd->bnm", queries, keys) / keys.shape[-1] ** 0.5).softmax(1)
        weights = attention + eps
        s = torch_gru(p, torch.einsum("bnm,bmd->bnd", weights / weights.sum(2, keepdim=True), values), s)
        if "ff_mlp.module.0.weight" in p:
            s = s + torch_mlp(p, "ff_mlp.module.1", "ff_mlp.module.3", torch_norm(p, "ff_mlp.module.0", s))
    return s, attention.mT


def shapes_of(text):
    """Each line has one name, or several of the same shape, and that shape."""
    sizes = {"M": M, "N": N, "Din": DIN, "D": D, "3D": 3 * D, "QKV": QKV, "H": H}
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
VIDEOSAUR_NAMES = ("norm_features", "norm_slots", "mlp.layers.0", "to_q", "to_k", "to_v")
OCLF_NAMES = ("norm_input", "norm_slots", "ff_mlp.module.0", "to_q", "to_k", "to_v")
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


def draw(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes_of(shapes).items()
    }


@dataclass
class Variant:
    style: str
    run: Callable
    shapes: str
    conventions: Conventions = STANDARD
    own_prior: bool = True
    sigma: Callable = torch.exp  # deviation of the initial slots, of what is saved
    prefix: str = ""
    around: str = ""
    prior_around: tuple = ()  # names of mean and logarithm of the deviation in ``around``

    def parameters(self, seed=5):
        parameters = draw(self.shapes, seed)
        if self.sigma is torch.clone:  # the deviation itself
            parameters["slots_sigma"].abs_()
        return parameters

    def checkpoint(self, seed=5):
        """Slot attention in a checkpoint of the whole model."""
        return {self.prefix + name: p for name, p in self.parameters(seed).items()} | draw(self.around, seed + 1)

    def load(self, parameters, **options):
        if self.own_prior:
            return SlotAttention.load_published(parameters, style=self.style, **options)
        with pytest.warns(UserWarning, match="mu and log_sigma are not loaded: pass slots to each call"):
            return SlotAttention.load_published(parameters, style=self.style, **options)


OCLF_PRIOR = ("state_dict.models.conditioning.slots_mu", "state_dict.models.conditioning.slots_logsigma")
MU_LOG_SIGMA = "slots_mu slots_log_sigma: 1 1 D\n"
MU_LOGSIGMA = "slots_mu slots_logsigma: 1 1 D\n"
MU_SIGMA = "slots_mu slots_sigma: 1 1 D\n"
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
    "lucidrains-0.1": Variant(
        "lucidrains",
        first_lucidrains,
        torch_shapes(*LUCIDRAINS_NAMES, "mlp.0", "mlp.2") + TORCH_GRU + MU_SIGMA,
        sigma=torch.abs,
    ),
    "lucidrains-1.0": Variant(
        "lucidrains",
        lucidrains,
        torch_shapes(*LUCIDRAINS_NAMES, "mlp.0", "mlp.2", bias=True) + TORCH_GRU + MU_SIGMA,
        LUCIDRAINS,
        sigma=torch.abs,
    ),
    "lucidrains-evelinehong": Variant(
        "lucidrains",
        evelinehong,
        torch_shapes(*LUCIDRAINS_NAMES, "fc1", "fc2", bias=True) + TORCH_GRU + MU_SIGMA,
        LUCIDRAINS,
        sigma=torch.clone,
        prefix="model_state_dict.slot_attention.",
        around="model_state_dict.fc1.weight model_state_dict.fc2.weight: D D\n"
        "model_state_dict.fc1.bias model_state_dict.fc2.bias: D\n",
    ),
    "lucidrains-evelinehong-log": Variant(
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
        prefix="state_dict.slot_attention.",
        around="state_dict.init_latents: 1 N D\nstate_dict.encoder_out_layer.0.weight: D\n",
    ),
    "videosaur": Variant(
        "videosaur",
        videosaur,
        torch_shapes(*VIDEOSAUR_NAMES, "mlp.layers.1", "mlp.layers.3") + TORCH_GRU,
        VIDEOSAUR,
        False,
        prefix="state_dict.processor.module.corrector.",
        around="state_dict.initializer.mean state_dict.initializer.log_std: 1 1 D\n",
        prior_around=("state_dict.initializer.mean", "state_dict.initializer.log_std"),
    ),
    "slot-contrast": Variant(
        "videosaur",
        videosaur,
        torch_shapes(*VIDEOSAUR_NAMES, "mlp.layers.1", "mlp.layers.3") + TORCH_GRU,
        VIDEOSAUR,
        False,
        prefix="state_dict.processor.module.corrector.",
        around="state_dict.initializer.slots: 1 N D\n",
    ),
    "videosaur-without-mlp": Variant(
        "videosaur",
        videosaur,
        torch_shapes("norm_features", "norm_slots", "", "to_q", "to_k", "to_v", "", "", qkv="QKV")
        + TORCH_GRU.replace("weight_ih: 3D D", "weight_ih: 3D QKV"),
        VIDEOSAUR,
        False,
    ),
    "oclf": Variant(  # with the names of DINOSAUR, and widths as in its slot attention on images
        "oclf",
        oclf,
        torch_shapes(*OCLF_NAMES, "ff_mlp.module.1", "ff_mlp.module.3", qkv="QKV")
        + TORCH_GRU.replace("weight_ih: 3D D", "weight_ih: 3D QKV"),
        OCLF,
        False,
        prefix="state_dict.models.perceptual_grouping.slot_attention.",
        around=f"{OCLF_PRIOR[0]} {OCLF_PRIOR[1]}: 1 1 D\n"
        "state_dict.models.perceptual_grouping.positional_embedding.layers.1.0.weight: Din\n",
        prior_around=OCLF_PRIOR,
    ),
    "oclf-with-biases": Variant(
        "oclf",
        oclf,
        torch_shapes(*OCLF_NAMES, "ff_mlp.module.1", "ff_mlp.module.3", bias=True) + TORCH_GRU,
        OCLF,
        False,
        prefix="state_dict.models.perceptual_grouping.slot_attention.",
        around=f"{OCLF_PRIOR[0]} {OCLF_PRIOR[1]}: 1 N D\n",  # a Gaussian for each slot
    ),
    "oclf-without-mlp": Variant(
        "oclf",
        oclf,
        torch_shapes("norm_input", "norm_slots", "", "to_q", "to_k", "to_v", "", "") + TORCH_GRU,
        OCLF,
        False,
        prefix="state_dict.models.perceptual_grouping.slot_attention.",
        around="state_dict.models.conditioning.slots: 1 N D\n",  # learned slots
    ),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
