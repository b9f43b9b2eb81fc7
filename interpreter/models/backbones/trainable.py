"""A trainable copy of a backbone."""

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .base import Backbone
from .float8 import Float8Linear


def trainable(backbone: Backbone) -> Backbone:
    """A copy of a backbone with trainable parameters. Call its :meth:`Backbone.encode`.

    Parameters without any effect on the output, such as the mask token of DINOv2 or the pooler of a ViT, stay frozen.
    An optimiser would decay them, and in distributed training processes would wait for their gradients. The copy has
    the parameter names of the original. It stays in evaluation mode, so its only dropout is the stochastic depth of
    :meth:`Backbone.encode`.

    Args:
        backbone: a backbone in fp32. It is not changed.

    Raises:
        ValueError: if its linear layers are float8.
    """
    if any(isinstance(module, Float8Linear) for module in backbone.modules()):
        raise ValueError(
            "--precision fp8-backbone: float8 layers have no gradients, so this backbone cannot be trained; use "
            "--precision bf16, or --no-train-backbone"
        )
    copied = copy.deepcopy(backbone).requires_grad_(True)
    for module in copied.modules():
        if hasattr(module, "interpolate_pos_encoding") and hasattr(module, "position_embeddings"):
            module.__dict__["interpolate_pos_encoding"] = MethodType(_repeatable(module), module)
    # Tensors on "meta" have shapes and gradient functions, but no values: nothing is computed.
    probe = copy.deepcopy(copied).to("meta")
    frames = torch.empty(1, *probe.native_size, 3, dtype=torch.uint8, device="meta")
    gradients = torch.autograd.grad(probe.encode(frames).sum(), list(probe.parameters()), allow_unused=True)
    for parameter, gradient in zip(copied.parameters(), gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    return copied


def _repeatable(embeddings: Any) -> Any:
    """Interpolation of position embeddings with the same values, but a gradient that is deterministic on a GPU.

    PyTorch has no deterministic kernel for the gradient of bicubic interpolation. The interpolation is linear in the
    embeddings, so its gradient is a product with a matrix: the interpolated unit vectors.
    """
    interpolate = embeddings.interpolate_pos_encoding.__func__

    def interpolate_pos_encoding(self: Any, tokens: Tensor, height: int, width: int) -> Tensor:
        positions = self.position_embeddings  # [1, P, C]
        with torch.no_grad():
            values: Tensor = interpolate(self, tokens, height, width)
        if values is positions:  # of its own grid
            return positions
        if not (torch.is_grad_enabled() and positions.requires_grad):
            return values
        units = _UnitVectors(self)
        matrix = interpolate(units, tokens.new_empty(1, tokens.shape[1], positions.shape[1]), height, width)
        product = (matrix[0].double() @ positions[0].double()).to(positions.dtype)  # autocast would round fp32 products
        return values + (product - product.detach())

    return interpolate_pos_encoding


class _UnitVectors:
    """Embeddings whose positions [1, P, P] are the unit vectors."""

    def __init__(self, embeddings: Any) -> None:
        positions = embeddings.position_embeddings
        self.position_embeddings = torch.eye(positions.shape[1], dtype=positions.dtype, device=positions.device)[None]
        self.embeddings = embeddings

    def __getattr__(self, name: str) -> Any:  # which attributes are read depends on the version of transformers
        return getattr(self.embeddings, name)
