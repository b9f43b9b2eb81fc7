"""slotkernels: fast building blocks of object-centric learning, such as slot attention.

Every function runs on any device with the backend ``reference`` (plain PyTorch). Faster backends are chosen for the
calls that they support; see :func:`use_backend`.
"""

from ._backends import decomposed, use_backend
from .guided_labels import guided_labels
from .invariant_slot_attention import InvariantSlotAttention, InvariantSlotAttentionOutput
from .matching import match_slots
from .merging import cluster_slots, merge_slots
from .mixing import mix_slots
from .propagation import LabelMaps, propagate_attention, propagate_labels, propagate_masks
from .sinkhorn import SamplesLoss, sinkhorn_divergence, sinkhorn_potentials
from .slot_attention import SlotAttention, SlotAttentionOutput, inverted_attention
from .transport_plan import sinkhorn_plan
from .transport_targets import transport_targets

__version__ = "0.1.0"

__all__ = [
    "InvariantSlotAttention",
    "InvariantSlotAttentionOutput",
    "LabelMaps",
    "SamplesLoss",
    "SlotAttention",
    "SlotAttentionOutput",
    "cluster_slots",
    "decomposed",
    "guided_labels",
    "inverted_attention",
    "match_slots",
    "merge_slots",
    "mix_slots",
    "propagate_attention",
    "propagate_labels",
    "propagate_masks",
    "sinkhorn_divergence",
    "sinkhorn_plan",
    "sinkhorn_potentials",
    "transport_targets",
    "use_backend",
]
