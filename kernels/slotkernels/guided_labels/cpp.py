"""Guided label maps by csrc/cpu/guided_labels.cpp."""

import torch

from ..propagation.op import LabelResults
from .op import GuidedArguments


def guided_labels(arguments: GuidedArguments) -> LabelResults:
    """As in ``reference.py``."""
    clusters = arguments.clusters
    contiguous = arguments if clusters is None else arguments._replace(clusters=clusters.contiguous())
    return LabelResults(*torch.ops.slotkernels_native.guided_labels(*contiguous))
