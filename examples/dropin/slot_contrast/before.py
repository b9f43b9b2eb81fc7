"""A small Slot Contrast (Manasyan et al. 2025): recurrent slots, and a loss between slots of consecutive frames."""

import torch
import torch.nn.functional as F
from textbook.slot_contrast import SlotAttention
from torch import Tensor, nn


def contrast(slots: Tensor, temperature: float = 0.1) -> Tensor:
    """For slots [B, T, N, D]: each slot has to find itself among the slots of the frame before, of all videos."""
    directions = F.normalize(slots, dim=-1).transpose(0, 1).flatten(1, 2)  # [T, B * N, D]
    logits = directions[:-1] @ directions[1:].mT / temperature
    return F.cross_entropy(logits, torch.arange(logits.shape[1]).expand(len(logits), -1))


class Model(nn.Module):
    """Maps features [B, T, 256, feature_dim] to the loss: error of the reconstruction plus half of the contrast."""

    def __init__(self, num_slots: int = 11, dim: int = 64, feature_dim: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, dim))
        self.initial = nn.Parameter(torch.randn(num_slots, dim))
        self.slot_attention = SlotAttention(inp_dim=dim, slot_dim=dim, n_iters=2)
        self.predictor = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.0, batch_first=True)
        self.places = nn.Parameter(torch.randn(256, dim) * 0.1)
        self.decoder = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, feature_dim + 1))

    def forward(self, features: Tensor) -> Tensor:
        """A scalar."""
        predicted, corrected = self.initial.expand(len(features), -1, -1), []
        for tokens in self.encoder(features).unbind(dim=1):
            slots = self.slot_attention(slots=predicted, features=tokens)["slots"]
            predicted = self.predictor(slots)
            corrected.append(slots)
        slots = torch.stack(corrected, dim=1)  # [B, T, N, D]
        everywhere = self.decoder(slots[:, :, :, None] + self.places)  # [B, T, N, M, feature_dim + 1]
        reconstruction = (everywhere[..., -1:].softmax(dim=2) * everywhere[..., :-1]).sum(dim=2)
        return F.mse_loss(reconstruction, features) + 0.5 * contrast(slots)
