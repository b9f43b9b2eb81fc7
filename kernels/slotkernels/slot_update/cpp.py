"""The slot update on a CPU, in C++ (``csrc/cpu/slot_update.cpp``): threads share the rows."""

import torch

from .op import (
    AddNormArguments,
    AddNormBackwardArguments,
    AddNormGradients,
    GruNormArguments,
    GruNormBackwardArguments,
    GruNormGradients,
    Results,
)


def gru_norm(arguments: GruNormArguments) -> Results:
    """As in ``reference.py``."""
    return Results(*torch.ops.slotkernels_native.gru_norm(*arguments))


def gru_norm_backward(arguments: GruNormBackwardArguments) -> GruNormGradients:
    """As in ``reference.py``."""
    return GruNormGradients(*torch.ops.slotkernels_native.gru_norm_backward(*arguments))


def add_norm(arguments: AddNormArguments) -> Results:
    """As in ``reference.py``."""
    return Results(*torch.ops.slotkernels_native.add_norm(*arguments))


def add_norm_backward(arguments: AddNormBackwardArguments) -> AddNormGradients:
    """As in ``reference.py``."""
    return AddNormGradients(*torch.ops.slotkernels_native.add_norm_backward(*arguments))
