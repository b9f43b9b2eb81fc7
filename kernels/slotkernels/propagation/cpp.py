"""Label maps by csrc/cpu/propagation.cpp."""

import torch

from .op import LabelArguments, LabelResults


def propagate_labels(arguments: LabelArguments) -> LabelResults:
    """As in ``reference.py``."""
    (image, video, clusters), sizes, confidence, statistics = arguments
    clusters = None if clusters is None else clusters.contiguous()
    native = torch.ops.slotkernels_native.propagate_labels
    return LabelResults(*native(image, video, clusters, *sizes, confidence, statistics))
