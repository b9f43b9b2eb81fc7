"""What a slot-attention iteration does after the attention, without its matrix products (Locatello et al. 2020)."""

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
