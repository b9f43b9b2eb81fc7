"""Attention propagation: from patches over image slots to objects, as soft attention, soft masks or label maps."""

from . import reference  # noqa: F401  (registers the ops' composite forms)
from .levels import bytes_moved, flops
from .op import LabelMaps, propagate_attention, propagate_labels, propagate_masks

__all__ = ["LabelMaps", "bytes_moved", "flops", "propagate_attention", "propagate_labels", "propagate_masks"]
