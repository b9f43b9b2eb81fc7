"""Use slotkernels.SlotAttention in a model of your own: an autoencoder that finds coloured discs without labels.

    python examples/slot_attention_in_your_model.py

Every slot is decoded into colours and a mask. The masks compete for pixels, so each slot specialises on one disc.
Prints the error of the reconstruction and the FG-ARI of the masks (0: random masks, 1: the true discs).
"""

import argparse

import torch
from sklearn.metrics import adjusted_rand_score
from slotkernels import SlotAttention
from torch import Tensor, nn

SIZE, DISCS, SLOTS, WIDTH = 16, 2, 3, 64
GRID = torch.cartesian_prod(*[torch.linspace(-1, 1, SIZE)] * 2)  # [M, 2] positions of the M = SIZE * SIZE pixels


def discs(batch: int) -> tuple[Tensor, Tensor]:
    """Pixels [B, M, 3] of discs on black, and the disc of each pixel [B, M], 0 for the background."""
    pixels, labels = torch.zeros(batch, SIZE**2, 3), torch.zeros(batch, SIZE**2, dtype=torch.int64)
    for disc in range(1, DISCS + 1):
        inside = (GRID - torch.rand(batch, 1, 2) * 1.2 + 0.6).norm(dim=-1) < 0.4
        pixels = torch.where(inside[..., None], torch.rand(batch, 1, 3) * 0.7 + 0.3, pixels)
        labels[inside] = disc
    return pixels, labels


class SlotAutoencoder(nn.Module):
    """An MLP over pixels and positions, slot attention, and an MLP that decodes every slot at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.slot_attention = SlotAttention(SLOTS, WIDTH)  # [B, M, WIDTH] -> [B, SLOTS, WIDTH]
        hidden = [nn.Linear(WIDTH + 2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        self.decoder = nn.Sequential(*hidden, nn.Linear(WIDTH, 4))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction [B, M, 3] and masks [B, SLOTS, M] of pixels [B, M, 3]."""
        slots, _ = self.slot_attention(self.encoder(torch.cat([pixels, GRID.expand(len(pixels), -1, -1)], dim=-1)))
        everywhere = slots[:, :, None].expand(-1, -1, SIZE**2, -1), GRID.expand(len(pixels), SLOTS, -1, -1)
        colours, logits = self.decoder(torch.cat(everywhere, dim=-1)).split([3, 1], dim=-1)
        masks = logits.softmax(dim=1)
        return (masks * colours).sum(dim=1), masks[..., 0]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=600)
steps = parser.parse_args().steps
torch.manual_seed(0)
model = SlotAutoencoder()
optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(1, steps + 1):
    pixels, labels = discs(16)
    reconstruction, masks = model(pixels)
    loss = (reconstruction - pixels).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step % 100 == 0 or step == steps:
        pairs = zip(labels, masks.argmax(dim=1), strict=True)
        scores = [adjusted_rand_score(true[true > 0], predicted[true > 0]) for true, predicted in pairs]
        print(f"step {step}: error {loss.item():.4f}, FG-ARI {sum(scores) / len(scores):.2f}")
