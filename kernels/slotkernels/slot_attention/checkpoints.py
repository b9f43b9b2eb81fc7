"""Published checkpoints of slot attention: under which names parameters are saved, and how they are converted.

| style | names of | conventions | initial slots |
|---|---|---|---|
| locatello | google-research/slot_attention (Keras) | LOCATELLO | one Gaussian |
| | PyTorch ports that keep its attributes' names | STANDARD | one Gaussian |
| lucidrains | lucidrains/slot-attention | LUCIDRAINS | one Gaussian |
| | evelinehong/slot-attention-pytorch | LUCIDRAINS | one Gaussian |
| savi | google-research/slot-attention-video (Flax) | SAVI | another module's |
| | junkeun-yi/SAVi-pytorch | SAVI | another module's |
| | pairlab/SlotFormer | SLOTFORMER | another module's |
| videosaur | martius-lab/videosaur, Slot Contrast | VIDEOSAUR | another module's |

Keras and Flax keep a linear layer's matrix as [in, out], Flax' queries, keys and values as [in, heads, width]. Keras'
GRU stacks its gates as z, r, n; Flax' has six layers, of which hr and hz have no bias. Flax numbers layer norms in the
order of their construction: LayerNorm_0 is the slots', LayerNorm_1 the tokens'. SAVi makes one iteration, SlotFormer
two; VideoSAUR's default is three, and its YouTube-VIS configuration makes three on the first frame and two on others.
That configuration and SAVi's (small, and SAVi++) have no MLP.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._checks import check_that, describe
from .conventions import LOCATELLO, LUCIDRAINS, SAVI, SLOTFORMER, STANDARD, VIDEOSAUR, Conventions

M = TypeVar("M", bound=nn.Module)

_LOG = logging.getLogger(__name__)
_SHOWN = 30  # names listed in an error message
_MODULES = ("norm_inputs", "norm_slots", "norm_mlp", "to_q", "to_k", "to_v", "mlp.0", "mlp.2")


class TensorRule(NamedTuple):
    """How a parameter of ours is made of published tensors."""

    names: tuple[str, ...]
    convert: Callable[..., Tensor]


class Layout(NamedTuple):
    """How one repository saves slot attention; the keys of ``names`` are the parameters of :class:`SlotAttention`."""

    names: dict[str, TensorRule]
    conventions: Conventions
    iterations: int = 3
    optional: tuple[str, ...] = ()  # prefix of our names that are present either all together or not at all
    initializer: tuple[str, ...] = ()  # "initializer." lies where one of these prefixes begins


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _vector(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1]).squeeze(0)  # [1, 1, D] -> [D]; one for each slot stays [N, D]


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


def _prior(mu: str, log_sigma: str) -> dict[str, TensorRule]:
    return {"mu": TensorRule((mu,), _vector), "log_sigma": TensorRule((log_sigma,), _vector)}


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
            _modules("norm_input norm_slots norm_pre_ff to_q to_k to_v mlp.0 mlp.2", qkv_bias=True)
            | _TORCH_GRU
            | _prior("slots_mu", "slots_logsigma"),
            LUCIDRAINS,
            optional=_QKV_BIAS,
        ),
        "evelinehong/slot-attention-pytorch": Layout(
            _modules("norm_input norm_slots norm_pre_ff to_q to_k to_v fc1 fc2", qkv_bias=True)
            | _TORCH_GRU
            | _prior("slots_mu", "slots_log_sigma"),
            LUCIDRAINS,
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
            optional=_MLP,
        ),
        "junkeun-yi/SAVi-pytorch": Layout(
            _modules(
                "layernorm_input layernorm_q mlp.layernorm_module dense_q dense_k dense_v "
                "mlp.model.dense_mlp_0 mlp.model.dense_mlp_1"
            )
            | _gru_of_six("gru.dense_", "weight", _stacked),
            SAVI,
            iterations=1,
            optional=_MLP,
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
            optional=_MLP,
            initializer=("processor.module.corrector.", "processor.corrector."),
        ),
    },
}


class _Match(NamedTuple):
    """A layout read with a prefix."""

    repository: str
    layout: Layout
    prefix: str
    rules: dict[str, TensorRule]  # without optional ones that are absent
    missing: list[str]
    unexpected: list[str]  # unexpected names under the prefix, which may change what the module computes

    def __str__(self) -> str:
        parts = [f"names of {self.repository} with prefix {self.prefix!r}"]
        parts += [f"missing {_listed(self.missing)}"] if self.missing else []
        parts += [f"unexpected {_listed(self.unexpected)}"] if self.unexpected else []
        return "; ".join(parts)


def read_published(
    state_dict: Mapping[str, Any], style: str, prefix: str | None
) -> tuple[dict[str, Any], Conventions, dict[str, Tensor]]:
    """The options and parameters that :meth:`SlotAttention.load_published` builds the module from.

    Returns:
        constructor options (sizes and iterations, without ``num_slots``), the style's conventions, and the parameters
        by our names; ``mu`` and ``log_sigma`` only where published.

    Raises:
        ValueError: if the style is unknown, names are missing, ambiguous or not expected, or a rank is wrong.
    """
    check_that(style in STYLES, f"load_published: style={style!r}, expected one of {', '.join(STYLES)}")
    published = dict(_flattened(state_dict))
    match = _find(published, style, prefix)
    tensors = {ours: _converted(published, match.prefix, rule) for ours, rule in match.rules.items()}
    for beside in match.layout.initializer:
        root = match.prefix.removesuffix(beside)
        if root != match.prefix and f"{root}initializer.mean" in published:
            prior = _prior("initializer.mean", "initializer.log_std")
            tensors |= {ours: _converted(published, root, rule) for ours, rule in prior.items()}
    _LOG.info("%s: %s loaded; %s", style, ", ".join(tensors), match)
    if "mu" not in tensors:
        warnings.warn(
            f"load_published: {style}: in {match.repository} another module makes the initial slots; mu and log_sigma "
            "are not loaded, give slots to forward",
            stacklevel=3,
        )
    matrices = [tensors[ours] for ours in ("to_q.weight", "to_k.weight", "mlp.0.weight") if ours in tensors]
    for matrix in matrices:
        check_that(matrix.dim() == 2, f"load_published: {style}: {describe(matrix)} where a matrix was expected")
    (qkv_dim, dim), (_, input_dim), *mlp = [matrix.shape for matrix in matrices]
    sizes = {"dim": dim, "input_dim": input_dim, "qkv_dim": qkv_dim, "hidden_dim": mlp[0][0] if mlp else None}
    conventions = match.layout.conventions._replace(use_mlp=bool(mlp), qkv_bias="to_q.bias" in tensors)
    return sizes | {"iterations": match.layout.iterations}, conventions, tensors


def load_parameters(module: M, tensors: Mapping[str, Tensor], style: str) -> M:
    """``module`` with the parameters that :func:`read_published` returned.

    Raises:
        ValueError: if a shape is wrong.
    """
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = [f"{n} is {list(t.shape)}, expected {shapes[n]}" for n, t in tensors.items() if list(t.shape) != shapes[n]]
    check_that(not wrong, f"load_published: {style}: {'; '.join(wrong)}")
    module.load_state_dict(tensors, strict=False)
    return module


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and arrays, by names with dots; nothing else in a checkpoint is a parameter of slot attention."""
    for key, value in tree.items():
        name = prefix + _dotted(str(key).removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"))
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{name}.")
        elif hasattr(value, "__array__") and ".OPTIMIZER_SLOT" not in name:  # TensorFlow: Adam's moments
            yield name, value


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _find(published: dict[str, Any], style: str, prefix: str | None) -> _Match:
    """The one layout and prefix whose names are all present, without unexpected ones."""
    matches = []
    for repository, layout in STYLES[style].items():
        prefixes = {
            key.removesuffix(name)
            for rule in layout.names.values()
            for name in rule.names
            for key in published
            if key == name or key.endswith(f".{name}")
        }
        if prefix is not None:
            prefixes = {f"{stem}." if (stem := _dotted(prefix).rstrip(".")) else ""}
        matches += [_matched(published, repository, layout, candidate) for candidate in sorted(prefixes)]
    complete = [match for match in matches if not match.missing]
    if not complete:
        nearest = min(matches, key=lambda match: len(match.missing) - len(match.rules), default=None)
        expected = " or ".join(
            f"{repository}: {', '.join(name for rule in layout.names.values() for name in rule.names)}"
            for repository, layout in STYLES[style].items()
        )
        raise ValueError(
            f"load_published: {style}: {nearest or 'no name of this style'}; found {_listed(list(published))}; "
            f"expected the names of {expected}"
        )
    check_that(
        len(complete) == 1,
        f"load_published: {style}: found more than once, choose prefix= among "
        + ", ".join(sorted(repr(match.prefix) for match in complete)),
    )
    check_that(not complete[0].unexpected, f"load_published: {style}: {complete[0]}")
    return complete[0]


def _matched(published: dict[str, Any], repository: str, layout: Layout, prefix: str) -> _Match:
    under = {key.removeprefix(prefix) for key in published if key.startswith(prefix)}
    optional = {ours for ours in layout.names if ours.startswith(layout.optional)}
    absent = not any(under.intersection(layout.names[ours].names) for ours in optional)
    rules = {ours: rule for ours, rule in layout.names.items() if not (absent and ours in optional)}
    required = {name for rule in rules.values() for name in rule.names}
    return _Match(repository, layout, prefix, rules, sorted(required - under), sorted(under - required))


def _converted(published: dict[str, Any], prefix: str, rule: TensorRule) -> Tensor:
    check_that(
        all(prefix + name in published for name in rule.names),
        f"load_published: missing {_listed([prefix + name for name in rule.names])}",
    )
    values = [published[prefix + name] for name in rule.names]
    tensors = [value.detach() if isinstance(value, Tensor) else torch.tensor(value.__array__()) for value in values]
    try:
        return rule.convert(*tensors)
    except (IndexError, RuntimeError, ValueError) as error:
        shapes = ", ".join(f"{prefix}{n} is {describe(t)}" for n, t in zip(rule.names, tensors, strict=True))
        raise ValueError(f"load_published: {shapes}: not of the expected rank, or not of one width") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "nothing"
