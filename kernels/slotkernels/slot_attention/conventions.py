"""Differences between published implementations of slot attention.

All of them normalise tokens and slots, scale the logits by ``qkv_dim ** -0.5``, and add the output of an MLP to the
slots. They differ in the fields of :class:`Conventions` (repositories as of November 2026)::

    module = SlotAttention(7, 128, conventions=SAVI)
    module = SlotAttention(7, 128, conventions=SAVI._replace(use_mlp=False))
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from .._checks import check_choice, check_that
from .op import EPS_PLACEMENTS

GRU_STATES = ("slots", "normalised")
UPDATES = ("gru", "residual")


class Conventions(NamedTuple):
    """Details of an implementation that cannot be read from its saved parameters.

    Example:
        >>> from slotkernels.slot_attention import SAVI, Conventions
        >>> SAVI == Conventions(eps_placement="denominator", norm_eps=1e-6)
        True
    """

    scale: float | None = None
    """Factor of the logits; ``qkv_dim ** -0.5`` if None."""
    eps: float = 1e-8
    """See :func:`slotkernels.inverted_attention`."""
    eps_placement: str = "numerator"
    """"numerator" or "denominator", see :func:`slotkernels.inverted_attention`."""
    gru_state: str = "slots"
    """State of the GRU: the "slots", or the "normalised" slots, from which the queries are computed."""
    norm_eps: float = 1e-5
    """eps of the three layer norms. The default of PyTorch is 1e-5, that of Keras 1e-3, that of Flax 1e-6."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases."""
    use_mlp: bool = True
    """Whether an MLP follows the GRU. SAVi, and VideoSAUR on YouTube-VIS, have none."""

    def check(self, caller: str) -> None:
        """Raise ValueError if a choice is unknown."""
        for name, choices in (("eps_placement", EPS_PLACEMENTS), ("gru_state", GRU_STATES)):
            value = getattr(self, name)
            check_choice(caller, name, value, choices)


STANDARD = Conventions()  # the default; PyTorch ports of google-research/slot_attention with its attribute names
LOCATELLO = Conventions(norm_eps=1e-3)  # google-research/slot_attention (Keras)
LUCIDRAINS = Conventions(qkv_bias=True)  # lucidrains/slot-attention, evelinehong/slot-attention-pytorch
SAVI = Conventions(eps_placement="denominator", norm_eps=1e-6)  # google-research/slot-attention-video, SAVi-pytorch
SLOTFORMER = Conventions(eps=1e-6)  # pairlab/SlotFormer
VIDEOSAUR = Conventions(gru_state="normalised")  # martius-lab/videosaur, and Slot Contrast
OCLF = Conventions()  # amazon-science/object-centric-learning-framework (DINOSAUR): one head


def check_update(caller: str, update: str, conventions: Conventions, qkv_dim: int, dim: int) -> None:
    """Raise ValueError if ``update`` is unknown or does not fit the widths and conventions."""
    check_choice(caller, "update", update, UPDATES)
    if update == "residual":
        state = conventions.gru_state
        check_that(qkv_dim == dim, f"{caller}: qkv_dim={qkv_dim}, expected dim={dim} for update='residual'")
        check_that(state == "slots", f"{caller}: gru_state={state!r}, expected 'slots' for update='residual'")


class FormerOptions(TypedDict, total=False):
    """Former keyword arguments, now fields of :class:`Conventions`; the next release removes them (and ``eps``)."""

    scale: float | None
    eps_placement: str | None
    gru_state: str | None
    norm_eps: float | None
    qkv_bias: bool | None
    use_mlp: bool | None


def with_former_options(
    caller: str, conventions: Conventions, former: Mapping[str, Any], spelling: str = "Conventions"
) -> Conventions:
    """``conventions``, changed by former keyword arguments, with a DeprecationWarning that shows the new spelling.

    Raises:
        TypeError: if a keyword is unknown.
    """
    unknown = [name for name in former if name not in Conventions._fields]
    if unknown:
        raise TypeError(f"{caller}() got an unexpected keyword argument {unknown[0]!r}")
    changed = {name: value for name, value in former.items() if value is not None}
    if changed:
        listed = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        warnings.warn(
            f"{caller}({listed}) is deprecated (removed in the next release); write conventions={spelling}({listed})",
            DeprecationWarning,
            stacklevel=3,
        )
    return conventions._replace(**changed)
