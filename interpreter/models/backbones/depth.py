"""Stochastic depth: branches of a vision transformer's blocks that are left out at random (Huang et al. 2016)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .keys import Keys, TokensAndKeys

NORMS = (("norm1", "norm2"), ("layernorm_before", "layernorm_after"))  # names of a block's two norms


def depth_factors(noise: Tensor, rate: float) -> Tensor:
    """Factors of the attention and the MLP branch of each block, as in DINO.

    A branch of block l of L is left out (factor 0) with probability p = ``rate`` l / (L - 1); else its factor is
    1 / (1 - p). The two branches of a block have the same p and are drawn independently.

    >>> depth_factors(torch.zeros(1, 6), rate=0.2)  # 0 is the median: nothing is left out
    tensor([[[1.0000, 1.0000],
             [1.1111, 1.1111],
             [1.2500, 1.2500]]])

    Args:
        noise: standard normal numbers [R, 2 L] for R frames.
        rate: probability for the last block, at least 0 and below 1.

    Returns:
        [R, L, 2], for :meth:`Backbone.encode`.
    """
    rates = torch.linspace(0.0, rate, noise.shape[1] // 2, device=noise.device, dtype=noise.dtype)[:, None]
    kept = torch.special.ndtr(noise.unflatten(1, (-1, 2))) <= 1 - rates
    return kept.to(noise.dtype) / (1 - rates)


def scaled_block(block: nn.Module, hidden: Tensor, factors: Tensor, options: Mapping[str, object]) -> Tensor:
    """The output [R, M, C] of a block whose attention and MLP branch are multiplied by ``factors`` [R, 2].

    Args:
        block: a block of a model that :meth:`VisionTransformer.require_blocks` accepts.
        hidden: [R, M, C], the input of the block.
        factors: with factors of 1 the output equals the unchanged block's.
        options: further arguments of its attention, such as DINOv3's rotations.
    """
    if isinstance(block, Keys):  # has no branches
        return block(hidden, **options)
    if isinstance(block, TokensAndKeys):
        return block.joined(hidden, scaled_block(block.block, hidden, factors, options))
    layers: Any = block
    before, after = next(pair for pair in NORMS if hasattr(block, pair[0]))
    attention, mlp = factors[:, :, None, None].unbind(1)
    branch = layers.attention(getattr(block, before)(hidden), **options)[0]
    hidden = hidden + (attention * _layer_scale(block, "layer_scale1", branch)).to(hidden.dtype)
    branch = layers.mlp(getattr(block, after)(hidden))
    return hidden + (mlp * _layer_scale(block, "layer_scale2", branch)).to(hidden.dtype)


def _layer_scale(block: nn.Module, name: str, branch: Tensor) -> Tensor:
    """A branch times the learned scale of each channel (layer scale). DINO and MAE, for example, have no such scale."""
    return getattr(block, name)(branch) if hasattr(block, name) else branch
