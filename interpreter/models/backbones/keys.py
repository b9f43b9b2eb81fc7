"""Keys of a ViT's self-attention as features: its last block is replaced by one that returns them.

The keys are computed from the block's layers by themselves, not caught by a hook while the block runs: a call keeps no
state, so that several threads may encode with one backbone. For keys alone, the rest of the block is not computed; for
both, the block's own keys are computed a second time, which is a twelfth of its linear layers.
"""

import torch
from torch import Tensor, nn

NORMS = ("norm1", "layernorm_before")  # names of the norm before the attention


class Keys(nn.Module):
    """The keys [B, M, C] of a block's self-attention, all heads joined; the rest of the block is dropped."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.to_keys = key_layers(block)

    def forward(self, hidden: Tensor, *arguments: object, **options: object) -> Tensor:
        """Keys of what the block gets; its other arguments (masks, positions) do not enter."""
        keys: Tensor = self.to_keys(self.norm(hidden))
        return keys


class TokensAndKeys(nn.Module):
    """The output of a block and the keys of its self-attention, [B, M, 2C].

    Args:
        block: the block.
        norm: the model's final norm, which is applied to the output alone.
    """

    def __init__(self, block: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.block, self.norm = block, norm

    def forward(self, hidden: Tensor, *arguments: object, **options: object) -> Tensor:
        """Output and keys of what the block gets."""
        return self.joined(hidden, self.block(hidden, *arguments, **options))

    def joined(self, hidden: Tensor, output: Tensor) -> Tensor:
        """The block's output, and the keys of what it got."""
        norm, to_keys = key_layers(self.block)  # each time anew: float8 layers may have replaced them
        return torch.cat([self.norm(output), to_keys(norm(hidden))], -1)


def key_layers(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The norm before a block's self-attention, and the projection of its output to keys.

    Raises:
        LookupError: if the block has other layers.
    """
    norm = next((getattr(block, name) for name in NORMS if hasattr(block, name)), None)
    to_keys = getattr(getattr(block, "attention", None), "k_proj", None)
    if norm is None or to_keys is None:
        raise LookupError(f"no {' or '.join(NORMS)}, or no attention.k_proj")
    return norm, to_keys
