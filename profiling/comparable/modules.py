"""Modules of slot attention: ours with a peer's parameters, and the peer's own."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from slotkernels import SlotAttention
from torch import Tensor, nn

from profiling.comparable.peers import Numbers, Peers

BATCH, M, N, DIN, D, H, ITERATIONS = 2, 23, 5, 7, 12, 20, 3
VIDEOSAUR, SLOT_CONTRAST = "martius-lab/videosaur", "LiZhYun/exp_slotcontrast"
SAVI, KERAS = "google-research/slot-attention-video", "google-research/google-research"
SLOTFORMER, SAVI_PYTORCH = "pairlab/SlotFormer", "junkeun-yi/SAVi-pytorch"
OCLF, EVELINEHONG = "amazon-science/object-centric-learning-framework", "evelinehong/slot-attention-pytorch"
GRU = {"gru.weight_ih": (3 * D, D), "gru.weight_hh": (3 * D, D), "gru.bias_ih": (3 * D,), "gru.bias_hh": (3 * D,)}


def _linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, width: int, kinds: tuple[str, str] = ("weight", "bias")) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{kind}": (width,) for kind in kinds}


LUCIDRAINS_SHAPES = {
    "slots_mu": (1, 1, D),
    "slots_logsigma": (1, 1, D),
    **_linear("to_q", D, D),
    **_linear("to_k", D, D),
    **_linear("to_v", D, D),
    **GRU,
    **_linear("mlp.0", H, D),
    **_linear("mlp.2", D, H),
    **_norm("norm_input", D),
    **_norm("norm_slots", D),
    **_norm("norm_pre_ff", D),
}
EVELINEHONG_SHAPES = {
    {"slots_logsigma": "slots_sigma"}.get(name, name.replace("mlp.0", "fc1").replace("mlp.2", "fc2")): shape
    for name, shape in LUCIDRAINS_SHAPES.items()
}
SLOTFORMER_SHAPES = {
    **_linear("project_k", D, DIN, bias=False),
    **_linear("project_v", D, DIN, bias=False),
    **_norm("project_q.0", D),
    **_linear("project_q.1", D, D, bias=False),
    **GRU,
    **_norm("mlp.0", D),
    **_linear("mlp.1", H, D),
    **_linear("mlp.3", D, H),
    **_norm("norm_inputs", DIN),
}
SAVI_PYTORCH_SHAPES = {
    **_linear("dense_q", D, D, bias=False),
    **_linear("dense_k", D, DIN, bias=False),
    **_linear("dense_v", D, DIN, bias=False),
    **{f"gru.dense_{source}{gate}.weight": (D, D) for source in "ih" for gate in "rzn"},
    **{f"gru.dense_{gate}.bias": (D,) for gate in ("ir", "iz", "in", "hn")},
    **_norm("mlp.layernorm_module", D),
    **_linear("mlp.model.dense_mlp_0", H, D),
    **_linear("mlp.model.dense_mlp_1", D, H),
    **_norm("layernorm_input", DIN),
    **_norm("layernorm_q", D),
}
OCLF_SHAPES = {
    **_linear("to_k", D, DIN, bias=False),
    **_linear("to_v", D, DIN, bias=False),
    **_linear("to_q", D, D, bias=False),
    **GRU,
    **_norm("ff_mlp.module.0", D),
    **_linear("ff_mlp.module.1", H, D),
    **_linear("ff_mlp.module.3", D, H),
    **_norm("norm_input", DIN),
    **_norm("norm_slots", D),
}
VIDEOSAUR_SHAPES = {
    **_linear("to_k", D, DIN, bias=False),
    **_linear("to_v", D, DIN, bias=False),
    **_linear("to_q", D, D, bias=False),
    **GRU,
    **_norm("mlp.layers.0", D),
    **_linear("mlp.layers.1", H, D),
    **_linear("mlp.layers.3", D, H),
    **_norm("norm_features", DIN),
    **_norm("norm_slots", D),
}
FLAX = ("scale", "bias")
GATES = {f"GRU_0.GRUCell_0.{source}{gate}.kernel": (D, D) for source in "ih" for gate in "rzn"}
SAVI_SHAPES = {
    **_norm("LayerNorm_0", D, FLAX),
    **_norm("LayerNorm_1", DIN, FLAX),
    "general_dense_q_0.kernel": (D, 1, D),
    "general_dense_k_0.kernel": (DIN, 1, D),
    "general_dense_v_0.kernel": (DIN, 1, D),
    **GATES,
    **{f"GRU_0.GRUCell_0.{gate}.bias": (D,) for gate in ("ir", "iz", "in", "hn")},
    **_norm("MLP_0.LayerNorm_0", D, FLAX),
    "MLP_0.dense_mlp_0.kernel": (D, H),
    "MLP_0.dense_mlp_0.bias": (H,),
    "MLP_0.dense_mlp_1.kernel": (H, D),
    "MLP_0.dense_mlp_1.bias": (D,),
}
KERAS_SHAPES = {
    "slots_mu": (1, 1, D),
    "slots_log_sigma": (1, 1, D),
    **{f"{name}/{kind}": (D,) for name in ("norm_slots", "norm_mlp") for kind in ("gamma", "beta")},
    **{f"norm_inputs/{kind}": (DIN,) for kind in ("gamma", "beta")},
    "project_q/kernel": (D, D),
    "project_k/kernel": (DIN, D),
    "project_v/kernel": (DIN, D),
    "gru/kernel": (D, 3 * D),
    "gru/recurrent_kernel": (D, 3 * D),
    "gru/bias": (2, 3 * D),
    "mlp/layer_with_weights-0/kernel": (D, H),
    "mlp/layer_with_weights-0/bias": (H,),
    "mlp/layer_with_weights-1/kernel": (H, D),
    "mlp/layer_with_weights-1/bias": (D,),
}


def parameters(shapes: dict[str, tuple[int, ...]], case: int) -> dict[str, np.ndarray]:
    """Random parameters under the published names; a deviation is positive."""
    rng = np.random.default_rng(case)
    values = {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}
    return {name: np.abs(value) if name == "slots_sigma" else value for name, value in values.items()}


def inputs(case: int, width: int = DIN) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, M, width] and initial slots [B, N, D]; lucidrains' slots are its noise."""
    rng = np.random.default_rng(1000 + case)
    return rng.standard_normal((BATCH, M, width)), rng.standard_normal((BATCH, N, D))


def _state(shapes: dict[str, tuple[int, ...]], case: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value).to(dtype) for name, value in parameters(shapes, case).items()}


def _outputs(slots: Tensor, tokens: Tensor, case: int) -> np.ndarray:
    """Slots, and the gradient of the tokens for a random cotangent."""
    cotangent = torch.from_numpy(np.random.default_rng(2000 + case).standard_normal(slots.shape)).to(slots.dtype)
    (gradient,) = torch.autograd.grad(slots, tokens, cotangent)
    return torch.cat([slots.detach().flatten(), gradient.flatten()]).double().numpy()


def ours(
    style: str, shapes: dict[str, tuple[int, ...]], width: int = DIN, dtype: torch.dtype = torch.float64
) -> Numbers:
    """Numbers of our module, loaded with `load_published`; in float32 the slots alone."""

    def numbers(case: int) -> np.ndarray:
        import warnings

        tokens, slots = (torch.from_numpy(t).to(dtype) for t in inputs(case, width))
        state = _state(shapes, case, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # slots are given, so that no prior is needed
            module = SlotAttention.load_published(state, style=style, iterations=ITERATIONS)
        if style == "lucidrains":  # as our module draws slots, with its own prior
            slots = module.mu + module.log_sigma.exp() * slots
        if dtype == torch.float32:
            with torch.no_grad():
                return module(tokens, slots).slots.double().numpy().ravel()
        tokens.requires_grad_()
        return _outputs(module(tokens, slots).slots, tokens, case)

    return numbers


def lucidrains(peers: Peers) -> tuple[str, Numbers]:
    """lucidrains/slot-attention, as its package."""
    package, version = peers.package("slot_attention", "slot-attention")

    def numbers(case: int) -> np.ndarray:
        module = package.SlotAttention(num_slots=N, dim=D, iters=ITERATIONS, hidden_dim=H).double()
        module.load_state_dict(_state(LUCIDRAINS_SHAPES, case, torch.float64))
        tokens, noise = (torch.from_numpy(t) for t in inputs(case, D))
        tokens.requires_grad_()
        drawn, torch.randn = torch.randn, lambda *_, **__: noise
        try:
            slots = module(tokens)
        finally:
            torch.randn = drawn
        return _outputs(slots, tokens, case)

    return version, numbers


def evelinehong(peers: Peers) -> tuple[str, Numbers]:
    """The port of evelinehong, whose prior is a mean and a deviation."""
    noise = SimpleNamespace(value=None)

    class Drawn:
        """PyTorch, with normal numbers that are given."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def normal(self, mean: Tensor, deviation: Tensor) -> Tensor:
            return mean + deviation * noise.value

    given = {"torch": Drawn(), "nn": nn, "F": nn.functional}
    published = peers.definitions(EVELINEHONG, "model.py", ("SlotAttention",), **given)["SlotAttention"]

    def numbers(case: int) -> np.ndarray:
        module = published(N, D, iters=ITERATIONS, hidden_dim=H).double()
        module.load_state_dict(_state(EVELINEHONG_SHAPES, case, torch.float64))
        tokens, noise.value = (torch.from_numpy(t) for t in inputs(case, D))
        tokens.requires_grad_()
        return _outputs(module(tokens), tokens, case)

    return peers.commit(EVELINEHONG), numbers


def slotformer(peers: Peers) -> tuple[str, Numbers]:
    """SlotFormer's module, which its SAVi uses."""
    given = {"torch": torch, "nn": nn, "F": nn.functional}
    path = "slotformer/base_slots/models/savi.py"
    published = peers.definitions(SLOTFORMER, path, ("SlotAttention",), **given)["SlotAttention"]

    def numbers(case: int) -> np.ndarray:
        module = published(DIN, ITERATIONS, N, D, H).double()
        module.load_state_dict(_state(SLOTFORMER_SHAPES, case, torch.float64))
        tokens, slots = (torch.from_numpy(t) for t in inputs(case))
        tokens.requires_grad_()
        return _outputs(module(tokens, slots), tokens, case)

    return peers.commit(SLOTFORMER), numbers


def savi_pytorch(peers: Peers) -> tuple[str, Numbers]:
    """SAVi's module in PyTorch, whose attention is float32."""
    from typing import Optional

    fillers = {"linear_w": nn.init.ones_, "linear_b": nn.init.zeros_}
    given = {"torch": torch, "nn": nn, "Array": Any, "DType": Any, "Optional": Optional, "init_fn": fillers}
    code = peers.definitions(SAVI_PYTORCH, "savi/modules/misc.py", ("MLP", "myGRUCell"), **given)
    given["misc"] = SimpleNamespace(MLP=code["MLP"], myGRUCell=code["myGRUCell"])
    names = ("SlotAttention", "InvertedDotProductAttention", "GeneralizedDotProductAttention")
    published = peers.definitions(SAVI_PYTORCH, "savi/modules/attention.py", names, **given)["SlotAttention"]

    def numbers(case: int) -> np.ndarray:
        kinds = {name: name for name in fillers}
        module = published(DIN, D, D, num_iterations=ITERATIONS, mlp_size=H, weight_init=kinds)
        module.load_state_dict(_state(SAVI_PYTORCH_SHAPES, case, torch.float32))
        tokens, slots = (torch.from_numpy(t).float() for t in inputs(case))
        with torch.no_grad():
            return np.asarray(module(slots, tokens)[0].double().numpy().ravel())

    return peers.commit(SAVI_PYTORCH), numbers


def oclf(peers: Peers) -> tuple[str, Numbers]:
    """OCLF's module, which DINOSAUR uses."""
    from typing import Optional, Union

    types = {"Optional": Optional, "Union": Union, "Callable": Callable, "List": list, "torch": torch, "nn": nn}
    folder = "ocl/neural_networks"
    residual = peers.definitions(OCLF, f"{folder}/wrappers.py", ("Residual",), nn=nn)["Residual"]
    names = ("get_activation_fn", "build_mlp", "build_two_layer_mlp")
    built = peers.definitions(OCLF, f"{folder}/convenience.py", names, Residual=residual, **types)
    path = "ocl/perceptual_grouping.py"
    published = peers.definitions(OCLF, path, ("SlotAttention",), **types)["SlotAttention"]

    def numbers(case: int) -> np.ndarray:
        mlp = built["build_two_layer_mlp"](D, D, H, initial_layer_norm=True, residual=True)
        module = published(D, DIN, iters=ITERATIONS, ff_mlp=mlp).double()
        module.load_state_dict(_state(OCLF_SHAPES, case, torch.float64))
        tokens, slots = (torch.from_numpy(t) for t in inputs(case))
        tokens.requires_grad_()
        return _outputs(module(tokens, slots)[0], tokens, case)

    return peers.commit(OCLF), numbers


def _activation(_: Any) -> nn.Module:
    return nn.ReLU()


def grouper(repository: str, path: str) -> Callable[[Peers], tuple[str, Numbers]]:
    """The slot attention of VideoSAUR and of Slot Contrast."""

    def peer(peers: Peers) -> tuple[str, Numbers]:
        from typing import Optional, Union

        types = {"Optional": Optional, "Union": Union, "Tuple": tuple, "List": list, "torch": torch, "nn": nn}
        helpers = SimpleNamespace(get_activation_fn=_activation, init_parameters=lambda *_: None)
        given = types | {"utils": helpers, "DEFAULT_WEIGHT_INIT": "default"}
        mlp = peers.definitions(VIDEOSAUR, "videosaur/modules/networks.py", ("MLP",), **given)["MLP"]
        given = types | {"networks": SimpleNamespace(MLP=mlp)}
        published = peers.definitions(repository, path, ("SlotAttention",), **given)["SlotAttention"]

        def numbers(case: int) -> np.ndarray:
            module = published(DIN, D, hidden_dim=H, n_iters=ITERATIONS).double()
            module.load_state_dict(_state(VIDEOSAUR_SHAPES, case, torch.float64))
            tokens, slots = (torch.from_numpy(t) for t in inputs(case))
            tokens.requires_grad_()
            return _outputs(module(slots, tokens)["slots"], tokens, case)

        return peers.commit(repository), numbers

    return peer


def savi(peers: Peers) -> tuple[str, Numbers]:
    """SAVi's module in Flax, float32."""
    import functools
    from typing import Optional

    jax, jax_version = peers.package("jax", "jax")
    linen, version = peers.package("flax.linen", "flax")
    # Newer Flax wants the width of a GRU cell, which SAVi's code leaves out.
    layers = SimpleNamespace(**{name: getattr(linen, name) for name in dir(linen)})
    layers.GRUCell = lambda: linen.GRUCell(features=D)
    given = {"nn": layers, "jax": jax, "jnp": jax.numpy, "Array": Any, "DType": Any, "Optional": Optional}
    code = peers.definitions(SAVI, "savi/modules/misc.py", ("MLP", "GRU"), Callable=Callable, **given)
    misc = SimpleNamespace(MLP=code["MLP"], GRU=code["GRU"])
    names = ("SlotAttention", "InvertedDotProductAttention", "GeneralizedDotProductAttention")
    given |= {"functools": functools, "misc": misc}
    published = peers.definitions(SAVI, "savi/modules/attention.py", names, **given)["SlotAttention"]

    def numbers(case: int) -> np.ndarray:
        tree: dict[str, Any] = {}
        for name, value in parameters(SAVI_SHAPES, case).items():
            *folders, leaf = name.split(".")
            place = functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)
            place[leaf] = jax.numpy.asarray(value, "float32")
        tokens, slots = (jax.numpy.asarray(t, "float32") for t in inputs(case))
        module = published(num_iterations=ITERATIONS, mlp_size=H)
        return np.asarray(module.apply({"params": tree}, slots, tokens), np.float64).ravel()

    return f"{peers.commit(SAVI)}, {version}, {jax_version}", numbers


def keras(peers: Peers) -> tuple[str, Numbers]:
    """The module of Locatello et al. 2020 in TensorFlow, float32."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # the GRU cell of Keras 3 takes no batches of sets
    _, keras_version = peers.package("tf_keras", "tf-keras")
    tf, version = peers.package("tensorflow", "tensorflow-cpu")
    noise = SimpleNamespace(value=None)

    class Drawn:
        """TensorFlow, with normal numbers that are given."""

        random = SimpleNamespace(normal=lambda shape: tf.constant(noise.value, tf.float32))

        def __getattr__(self, name: str) -> Any:
            return getattr(tf, name)

    given = {"tf": Drawn(), "layers": tf.keras.layers, "np": np}
    published = peers.definitions(KERAS, "slot_attention/model.py", ("SlotAttention",), **given)["SlotAttention"]

    def numbers(case: int) -> np.ndarray:
        tokens, slots = inputs(case)
        values = parameters(KERAS_SHAPES, case)
        noise.value = (slots - values["slots_mu"]) / np.exp(values["slots_log_sigma"])
        module = published(ITERATIONS, N, D, H)
        tokens = tf.constant(tokens, tf.float32)
        module(tokens)  # makes the variables
        dense = {f"project_{k}": getattr(module, f"project_{k}") for k in "qkv"}
        norms = {name: getattr(module, name) for name in ("norm_inputs", "norm_slots", "norm_mlp")}
        for variable in ("slots_mu", "slots_log_sigma"):
            getattr(module, variable).assign(values[variable])
        for name, layer in dense.items():
            layer.kernel.assign(values[f"{name}/kernel"])
        for name, layer in norms.items():
            layer.gamma.assign(values[f"{name}/gamma"])
            layer.beta.assign(values[f"{name}/beta"])
        for kind in ("kernel", "recurrent_kernel", "bias"):
            getattr(module.gru, kind).assign(values[f"gru/{kind}"])
        for place, layer in enumerate(module.mlp.layers):
            layer.kernel.assign(values[f"mlp/layer_with_weights-{place}/kernel"])
            layer.bias.assign(values[f"mlp/layer_with_weights-{place}/bias"])
        return np.asarray(module(tokens), np.float64).ravel()

    return f"{peers.commit(KERAS)}, {version}, {keras_version}", numbers
