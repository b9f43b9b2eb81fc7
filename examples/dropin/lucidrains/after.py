"""An autoencoder of images with slotkernels instead of the slot attention of lucidrains."""

import torch
from slotkernels import SlotAttention
from slotkernels.slot_attention import LUCIDRAINS
from torch import Tensor, nn


class Model(nn.Module):
    """Maps images [B, 3, 32, 32] to the error of their reconstruction from slots."""

    def __init__(self, num_slots: int = 7, dim: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, dim, 5, padding=2), nn.ReLU())
        self.places = nn.Parameter(torch.randn(32 * 32, dim) * 0.1)
        self.slot_attention = SlotAttention(
            num_slots, dim, iterations=3, hidden_dim=128, implicit="none", conventions=LUCIDRAINS
        )
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, images: Tensor) -> Tensor:
        """A scalar."""
        tokens = self.encoder(images).flatten(2).mT + self.places  # [B, M, D]
        slots, _ = self.slot_attention(tokens)
        colours, logits = self.decoder(slots[:, :, None] + self.places).split([3, 1], dim=-1)  # [B, N, M, 3 or 1]
        reconstruction = (logits.softmax(dim=1) * colours).sum(dim=1)
        return (reconstruction - images.flatten(2).mT).square().mean()
