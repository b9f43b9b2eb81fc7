"""A small SAVi (Kipf et al. 2022): the slots of a frame start from the slots predicted by the frame before."""

import torch
from slotkernels import SlotAttention
from slotkernels.slot_attention import SAVI
from torch import Tensor, nn


class Model(nn.Module):
    """Maps videos [B, T, 3, 32, 32] to the error of their reconstruction from slots."""

    def __init__(self, num_slots: int = 7, dim: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, dim, 5, padding=2), nn.ReLU())
        self.places = nn.Parameter(torch.randn(32 * 32, dim) * 0.1)
        self.initial = nn.Parameter(torch.randn(num_slots, dim))
        self.slot_attention = SlotAttention(
            num_slots, dim, iterations=1, implicit="none", prior=False, conventions=SAVI._replace(use_mlp=False)
        )
        self.predictor = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True)
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, video: Tensor) -> Tensor:
        """A scalar."""
        frames = self.encoder(video.flatten(0, 1)).flatten(2).mT + self.places  # [B * T, M, D]
        predicted, corrected = self.initial.expand(len(video), -1, -1), []
        for tokens in frames.unflatten(0, video.shape[:2]).unbind(dim=1):
            slots, _ = self.slot_attention(slots=predicted, inputs=tokens)
            predicted = self.predictor(slots)
            corrected.append(slots)
        everywhere = torch.stack(corrected, dim=1)[:, :, :, None] + self.places  # [B, T, N, M, D]
        colours, logits = self.decoder(everywhere).split([3, 1], dim=-1)
        reconstruction = (logits.softmax(dim=2) * colours).sum(dim=2)
        return (reconstruction - video.flatten(3).mT).square().mean()
