"""Layouts of published checkpoints of slot attention: the names of the parameters, and how to convert them.

| style | names of | conventions | initial slots |
|---|---|---|---|
| locatello | google-research/slot_attention (Keras) | LOCATELLO | one Gaussian |
| | PyTorch ports that keep its attributes' names | STANDARD | one Gaussian |
| lucidrains | lucidrains/slot-attention, before and since 1.1 | LUCIDRAINS | one Gaussian |
| | evelinehong/slot-attention-pytorch, two versions | LUCIDRAINS | one Gaussian |
| savi | google-research/slot-attention-video (Flax) | SAVI | another module's |
| | junkeun-yi/SAVi-pytorch | SAVI | another module's |
| | pairlab/SlotFormer | SLOTFORMER | another module's |
| videosaur | martius-lab/videosaur, Slot Contrast | VIDEOSAUR | another module's |
| oclf | amazon-science/object-centric-learning-framework (DINOSAUR) | OCLF | another module's |

Keras and Flax save the matrix of a linear layer as [in, out]; Flax saves queries, keys and values as [in, heads,
width]. The GRU of Keras stacks its gates in the order z, r, n. The GRU of Flax has six layers, of which hr and hz have
no bias. Flax numbers layer norms in the order of their construction: LayerNorm_0 is for the slots, LayerNorm_1 for the
tokens. SAVi has one iteration, SlotFormer two, VideoSAUR three by default; VideoSAUR's configuration for YouTube-VIS
has three on the first frame and two on others. This configuration and those of SAVi (small, and SAVi++) have no MLP.

A Gaussian is saved as its mean and the logarithm of its deviation, with two exceptions. ``slots_sigma`` of evelinehong
is the deviation itself (another version has ``slots_log_sigma``). ``slots_sigma`` of lucidrains before version 1.1 is a
factor of the noise; a negative factor mirrors the noise, which does not change the distribution of the slots. VideoSAUR
and OCLF save the Gaussian in another module of the same model. It is read if all slots share it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .conventions import LOCATELLO, LUCIDRAINS, OCLF, SAVI, SLOTFORMER, STANDARD, VIDEOSAUR, Conventions

_MODULES = ("norm_inputs", "norm_slots", "norm_mlp", "to_q", "to_k", "to_v", "mlp.0", "mlp.2")


class TensorRule(NamedTuple):
    """How one parameter of this package is computed from published tensors."""

    names: tuple[str, ...]
    convert: Callable[..., Tensor]


class Neighbour(NamedTuple):
    """The module of the same model that makes the initial slots."""

    roots: tuple[str, ...]  # endings of slot attention's prefix; its names replace the ending
    names: dict[str, TensorRule]


class Layout(NamedTuple):
    """How one repository saves slot attention; the keys of ``names`` are the parameters of :class:`SlotAttention`."""

    names: dict[str, TensorRule]
    conventions: Conventions
    iterations: int = 3
    optional: tuple[tuple[str, ...], ...] = ()  # prefixes of names that are saved all or none
    neighbour: Neighbour | None = None


class NegativeDeviation(ValueError):
    """A negative standard deviation, which the published code refuses too."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _vector(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).squeeze(0)  # [1, 1, D] -> [D]; [N, D], if each slot has its own, stays


def _log_of_deviation(deviation: Tensor) -> Tensor:
    """Logarithm of the deviation. 0, for which published code returns the mean, becomes the least positive number."""
    if not (deviation >= 0).all():
        raise NegativeDeviation(f"a standard deviation of {deviation.min().item():.3g}, expected at least 0")
    return _vector(deviation.clamp_min(torch.finfo(deviation.dtype).tiny).log())


def _log_of_factor(factor: Tensor) -> Tensor:
    return _log_of_deviation(factor.abs())


def _transposed(kernel: Tensor) -> Tensor:
    return kernel.flatten(1).t()


def _keras_gates(kernel: Tensor) -> Tensor:
    z, r, n = kernel.t().chunk(3)
    return torch.cat((r, z, n))


def _keras_bias(row: int) -> Callable[[Tensor], Tensor]:
    return lambda bias: _keras_gates(bias[row].unsqueeze(0)).squeeze(1)


def _stacked(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _stacked_kernels(*kernels: Tensor) -> Tensor:
    return torch.cat([kernel.t() for kernel in kernels])


def _bias_of_n(bias: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(bias).repeat(2), bias))


def _modules(
    theirs: str,
    weight: str = "weight",
    convert: Callable[..., Tensor] = _same,
    norm: tuple[str, str] = ("weight", "bias"),
    qkv_bias: bool = False,
) -> dict[str, TensorRule]:
    """Layer norms and linear layers: their names, in the order of ``_MODULES``."""
    names = {}
    for ours, module in zip(_MODULES, theirs.split(), strict=True):
        if ours.startswith("norm"):
            names[f"{ours}.weight"] = TensorRule((f"{module}.{norm[0]}",), _same)
            names[f"{ours}.bias"] = TensorRule((f"{module}.{norm[1]}",), _same)
        else:
            names[f"{ours}.weight"] = TensorRule((f"{module}.{weight}",), convert)
            if qkv_bias or not ours.startswith("to_"):
                names[f"{ours}.bias"] = TensorRule((f"{module}.bias",), _same)
    return names


def _gru_of_six(stem: str, weight: str, stack: Callable[..., Tensor]) -> dict[str, TensorRule]:
    return {
        "gru.weight_ih": TensorRule(tuple(f"{stem}i{gate}.{weight}" for gate in "rzn"), stack),
        "gru.weight_hh": TensorRule(tuple(f"{stem}h{gate}.{weight}" for gate in "rzn"), stack),
        "gru.bias_ih": TensorRule(tuple(f"{stem}i{gate}.bias" for gate in "rzn"), _stacked),
        "gru.bias_hh": TensorRule((f"{stem}hn.bias",), _bias_of_n),
    }


def _prior(mu: str, sigma: str, log_sigma: Callable[[Tensor], Tensor] = _vector) -> dict[str, TensorRule]:
    return {"mu": TensorRule((mu,), _vector), "log_sigma": TensorRule((sigma,), log_sigma)}


_TORCH_GRU = {
    name: TensorRule((name,), _same) for name in ("gru.weight_ih", "gru.weight_hh", "gru.bias_ih", "gru.bias_hh")
}
_KERAS_GRU = {
    "gru.weight_ih": TensorRule(("gru.kernel",), _keras_gates),
    "gru.weight_hh": TensorRule(("gru.recurrent_kernel",), _keras_gates),
    "gru.bias_ih": TensorRule(("gru.bias",), _keras_bias(0)),
    "gru.bias_hh": TensorRule(("gru.bias",), _keras_bias(1)),
}
_MLP, _QKV_BIAS = ("mlp.", "norm_mlp."), ("to_q.bias", "to_k.bias", "to_v.bias")
_LUCIDRAINS = "norm_input norm_slots norm_pre_ff to_q to_k to_v"
_OF_LUCIDRAINS = _modules(f"{_LUCIDRAINS} mlp.0 mlp.2", qkv_bias=True) | _TORCH_GRU
_OF_EVELINEHONG = _modules(f"{_LUCIDRAINS} fc1 fc2", qkv_bias=True) | _TORCH_GRU

STYLES = {
    "locatello": {
        "google-research/slot_attention": Layout(
            _modules(
                "norm_inputs norm_slots norm_mlp project_q project_k project_v "
                "mlp.layer_with_weights-0 mlp.layer_with_weights-1",
                weight="kernel",
                convert=_transposed,
                norm=("gamma", "beta"),
            )
            | _KERAS_GRU
            | _prior("slots_mu", "slots_log_sigma"),
            LOCATELLO,
        ),
        "PyTorch ports of google-research/slot_attention": Layout(
            _modules("norm_inputs norm_slots norm_mlp project_q project_k project_v mlp.0 mlp.2")
            | _TORCH_GRU
            | _prior("slots_mu", "slots_log_sigma"),
            STANDARD,
        ),
    },
    "lucidrains": {
        "lucidrains/slot-attention": Layout(
            _OF_LUCIDRAINS | _prior("slots_mu", "slots_logsigma"), LUCIDRAINS, optional=(_QKV_BIAS,)
        ),
        "lucidrains/slot-attention before 1.1": Layout(
            _OF_LUCIDRAINS | _prior("slots_mu", "slots_sigma", _log_of_factor), LUCIDRAINS, optional=(_QKV_BIAS,)
        ),
        "evelinehong/slot-attention-pytorch": Layout(
            _OF_EVELINEHONG | _prior("slots_mu", "slots_sigma", _log_of_deviation), LUCIDRAINS
        ),
        "evelinehong/slot-attention-pytorch with slots_log_sigma": Layout(
            _OF_EVELINEHONG | _prior("slots_mu", "slots_log_sigma"), LUCIDRAINS
        ),
    },
    "savi": {
        "google-research/slot-attention-video": Layout(
            _modules(
                "LayerNorm_1 LayerNorm_0 MLP_0.LayerNorm_0 general_dense_q_0 general_dense_k_0 general_dense_v_0 "
                "MLP_0.dense_mlp_0 MLP_0.dense_mlp_1",
                weight="kernel",
                convert=_transposed,
                norm=("scale", "bias"),
            )
            | _gru_of_six("GRU_0.GRUCell_0.", "kernel", _stacked_kernels),
            SAVI,
            iterations=1,
            optional=(_MLP,),
        ),
        "junkeun-yi/SAVi-pytorch": Layout(
            _modules(
                "layernorm_input layernorm_q mlp.layernorm_module dense_q dense_k dense_v "
                "mlp.model.dense_mlp_0 mlp.model.dense_mlp_1"
            )
            | _gru_of_six("gru.dense_", "weight", _stacked),
            SAVI,
            iterations=1,
            optional=(_MLP,),
        ),
        "pairlab/SlotFormer": Layout(
            _modules("norm_inputs project_q.0 mlp.0 project_q.1 project_k project_v mlp.1 mlp.3") | _TORCH_GRU,
            SLOTFORMER,
            iterations=2,
        ),
    },
    "videosaur": {
        "martius-lab/videosaur": Layout(
            _modules("norm_features norm_slots mlp.layers.0 to_q to_k to_v mlp.layers.1 mlp.layers.3") | _TORCH_GRU,
            VIDEOSAUR,
            optional=(_MLP,),
            neighbour=Neighbour(
                ("processor.module.corrector.", "processor.corrector."),
                _prior("initializer.mean", "initializer.log_std"),
            ),
        ),
    },
    "oclf": {
        "amazon-science/object-centric-learning-framework": Layout(
            _modules(
                "norm_input norm_slots ff_mlp.module.0 to_q to_k to_v ff_mlp.module.1 ff_mlp.module.3", qkv_bias=True
            )
            | _TORCH_GRU,
            OCLF,
            optional=(_MLP, _QKV_BIAS),
            neighbour=Neighbour(
                ("perceptual_grouping.slot_attention.",),
                _prior("conditioning.slots_mu", "conditioning.slots_logsigma"),
            ),
        ),
    },
}
