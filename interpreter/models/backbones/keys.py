"""Keys of a ViT's self-attention as features: its last block is replaced by one that returns them.

The keys are computed from the block's layers, not recorded by a hook while the block runs. So a call keeps no state,
and several threads may use one backbone. For keys alone, the rest of the block is not computed. For tokens and keys,
the keys are computed twice; they are a twelfth of the block's linear layers.
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
        """Keys of the block's input. Its other arguments (masks, positions) are ignored."""
        keys: Tensor = self.to_keys(self.norm(hidden))
        return keys


class TokensAndKeys(nn.Module):
    """The output of a block and the keys of its self-attention, [B, M, 2C].

    Args:
        block: the block.
        norm: the model's final norm; it is applied to the output, not to the keys.
    """

    def __init__(self, block: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.block, self.norm = block, norm

    def forward(self, hidden: Tensor, *arguments: object, **options: object) -> Tensor:
        """Output and keys for the block's input."""
        return self.joined(hidden, self.block(hidden, *arguments, **options))

    def joined(self, hidden: Tensor, output: Tensor) -> Tensor:
        """The block's output, and the keys of its input."""
        norm, to_keys = key_layers(self.block)  # looked up at each call: float8 layers may have replaced them
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
