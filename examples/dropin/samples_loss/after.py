"""An autoencoder of point clouds whose loss is the Sinkhorn divergence of slotkernels."""

from slotkernels import SamplesLoss
from torch import Tensor, nn


class Model(nn.Module):
    """Encodes each cloud [B, N, 3] to one vector, decodes 128 points, and returns the mean divergence of the two."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128 * 3))
        self.divergence = SamplesLoss("sinkhorn", p=2, blur=0.05, scaling=0.5)

    def forward(self, clouds: Tensor) -> Tensor:
        """A scalar."""
        decoded = self.decoder(self.encoder(clouds).amax(dim=1)).unflatten(-1, (128, 3))
        return self.divergence(decoded, clouds).mean()
