"""The operations of a slot-attention iteration after the attention, between the matrix products."""

from . import reference  # noqa: F401  (registers the ops' composite forms)
from .op import add_norm, add_norm_bytes_moved, add_norm_flops, gru_norm, gru_norm_bytes_moved, gru_norm_flops

__all__ = [
    "add_norm",
    "add_norm_bytes_moved",
    "add_norm_flops",
    "gru_norm",
    "gru_norm_bytes_moved",
    "gru_norm_flops",
]
