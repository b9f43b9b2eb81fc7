"""slotkernels: the building blocks of object-centric learning, fast and checked against an oracle.

Every function runs on any device through the ``reference`` backend (plain PyTorch); faster backends serve the calls they
support. See :func:`use_backend`.
"""

from ._dispatch import use_backend
from .slot_attention import SlotAttention, SlotAttentionOutput, inverted_attention

__all__ = ["SlotAttention", "SlotAttentionOutput", "inverted_attention", "use_backend"]
