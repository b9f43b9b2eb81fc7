"""Labels carried along entropic transport plans between two sets of tokens: targets of alignment losses (SMTC)."""

from . import reference  # noqa: F401  (registers the op's composite form)
from .op import bytes_moved, flops, transport_targets

__all__ = ["bytes_moved", "flops", "transport_targets"]
