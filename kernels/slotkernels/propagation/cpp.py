"""Label maps by csrc/cpu/propagation.cpp."""

import torch

from .op import LabelArguments, LabelResults


def propagate_labels(arguments: LabelArguments) -> LabelResults:
    """As in ``reference.py``."""
    clusters = arguments.clusters
    contiguous = arguments if clusters is None else arguments._replace(clusters=clusters.contiguous())
    return LabelResults(*torch.ops.slotkernels_native.propagate_labels(*contiguous))
