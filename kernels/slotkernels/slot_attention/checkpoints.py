"""Reads published checkpoints of slot attention: finds layout (``layouts.py``) and prefix, and converts tensors."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._checks import check_choice, check_that, describe
from .conventions import Conventions
from .layouts import STYLES, Layout, NegativeDeviation, TensorRule

M = TypeVar("M", bound=nn.Module)

_LOG = logging.getLogger(__name__)
_SHOWN = 30  # names listed in an error message


class _Match(NamedTuple):
    """A layout, compared with the names of a checkpoint under a prefix."""

    repository: str
    layout: Layout
    prefix: str
    rules: dict[str, TensorRule]  # without optional parameters that are absent
    missing: list[str]
    unexpected: list[str]  # other names under the prefix; they may change what the module computes

    def __str__(self) -> str:
        parts = [f"names of {self.repository} with prefix {self.prefix!r}"]
        parts += [f"missing {_listed(self.missing)}"] if self.missing else []
        parts += [f"unexpected {_listed(self.unexpected)}"] if self.unexpected else []
        return "; ".join(parts)


def read_published(
    state_dict: Mapping[str, Any], style: str, prefix: str | None
) -> tuple[dict[str, Any], Conventions, dict[str, Tensor]]:
    """Options and parameters for :meth:`SlotAttention.load_published`.

    Returns:
        constructor options (sizes and iterations, without ``num_slots``), the conventions of the style, and the
        parameters with the names of this package. ``mu`` and ``log_sigma`` are missing if they are not published.

    Raises:
        ValueError: if the style is unknown, names are missing, ambiguous or unexpected, or a rank is wrong.
    """
    check_choice("load_published", "style", style, tuple(STYLES))
    published = dict(_flattened(state_dict))
    match = _find(published, style, prefix)
    tensors = {ours: _converted(published, match.prefix, rule) for ours, rule in match.rules.items()}
    tensors |= _prior_beside(published, match)
    _LOG.info("%s: %s loaded; %s", style, ", ".join(tensors), match)
    if "mu" not in tensors:
        warnings.warn(
            f"load_published: {style}: in {match.repository} another module makes the initial slots; mu and log_sigma "
            "are not loaded: pass slots to each call",
            stacklevel=3,
        )
    matrices = [tensors[ours] for ours in ("to_q.weight", "to_k.weight", "mlp.0.weight") if ours in tensors]
    for matrix in matrices:
        check_that(matrix.dim() == 2, f"load_published: {style}: {describe(matrix)}, expected a matrix")
    (qkv_dim, dim), (_, input_dim), *mlp = [matrix.shape for matrix in matrices]
    sizes = {"dim": dim, "input_dim": input_dim, "qkv_dim": qkv_dim, "hidden_dim": mlp[0][0] if mlp else None}
    conventions = match.layout.conventions._replace(use_mlp=bool(mlp), qkv_bias="to_q.bias" in tensors)
    return sizes | {"iterations": match.layout.iterations}, conventions, tensors


def _prior_beside(published: dict[str, Any], match: _Match) -> dict[str, Tensor]:
    """``mu`` and ``log_sigma`` from another module of the same model; empty if absent or if each slot has its own."""
    neighbour = match.layout.neighbour
    if neighbour is None:
        return {}
    for root in neighbour.roots:
        outer = match.prefix.removesuffix(root)
        if outer != match.prefix and outer + neighbour.names["mu"].names[0] in published:
            prior = {ours: _converted(published, outer, rule) for ours, rule in neighbour.names.items()}
            return prior if all(tensor.dim() == 1 for tensor in prior.values()) else {}
    return {}


def load_parameters(module: M, tensors: Mapping[str, Tensor], style: str) -> M:
    """Load the parameters that :func:`read_published` returned into ``module``.

    Raises:
        ValueError: if a shape is wrong.
    """
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = [f"{n} is {list(t.shape)}, expected {shapes[n]}" for n, t in tensors.items() if list(t.shape) != shapes[n]]
    check_that(not wrong, f"load_published: {style}: {'; '.join(wrong)}")
    module.load_state_dict(tensors, strict=False)
    return module


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All tensors and arrays of a nested checkpoint, by names with dots."""
    for key, value in tree.items():
        name = prefix + _dotted(str(key).removesuffix("/.ATTRIBUTES/VARIABLE_VALUE"))
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{name}.")
        elif hasattr(value, "__array__") and ".OPTIMIZER_SLOT" not in name:  # TensorFlow: Adam's moments
            yield name, value


def _dotted(name: str) -> str:
    return name.replace("/", ".")


def _find(published: dict[str, Any], style: str, prefix: str | None) -> _Match:
    """The only layout and prefix with all names present and no unexpected names."""
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
    rules = layout.names
    for group in layout.optional:
        optional = {ours for ours in layout.names if ours.startswith(group)}
        if not any(under.intersection(layout.names[ours].names) for ours in optional):
            rules = {ours: rule for ours, rule in rules.items() if ours not in optional}
    required = {name for rule in rules.values() for name in rule.names}
    return _Match(repository, layout, prefix, rules, sorted(required - under), sorted(under - required))


def _converted(published: dict[str, Any], prefix: str, rule: TensorRule) -> Tensor:
    check_that(
        all(prefix + name in published for name in rule.names),
        f"load_published: missing {_listed([prefix + name for name in rule.names])}",
    )
    values = [published[prefix + name] for name in rule.names]
    tensors = [value.detach() if isinstance(value, Tensor) else torch.tensor(value.__array__()) for value in values]
    for name, tensor in zip(rule.names, tensors, strict=True):
        if not tensor.is_floating_point():
            raise ValueError(f"load_published: {prefix}{name} is {describe(tensor)}, expected floats")
    try:
        return rule.convert(*tensors)
    except NegativeDeviation as error:
        raise ValueError(f"load_published: {prefix}{rule.names[0]} has {error}") from error
    except (IndexError, RuntimeError, ValueError) as error:
        shapes = ", ".join(f"{prefix}{n} is {describe(t)}" for n, t in zip(rule.names, tensors, strict=True))
        raise ValueError(f"load_published: {shapes}: not of the expected rank, or not of one width") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "nothing"
