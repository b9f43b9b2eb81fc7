"""Slot attention of VideoSAUR and Slot Contrast, with their names of parameters, options and results."""

from torch import Tensor, nn


class MLP(nn.Module):
    """Layer norm, two linear layers and the residual connection."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        hidden = nn.Linear(dim, hidden_dim)
        self.layers = nn.Sequential(nn.LayerNorm(dim), hidden, nn.ReLU(), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x + self.layers(x)


class SlotAttention(nn.Module):
    """Slots [B, N, slot_dim] compete for features [B, M, inp_dim]. The state of the GRU is the normalised slots."""

    def __init__(self, inp_dim: int, slot_dim: int, n_iters: int = 3, eps: float = 1e-8) -> None:
        super().__init__()
        self.n_iters, self.eps, self.scale = n_iters, eps, slot_dim**-0.5
        self.norm_features, self.norm_slots = nn.LayerNorm(inp_dim), nn.LayerNorm(slot_dim)
        self.to_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_k, self.to_v = (nn.Linear(inp_dim, slot_dim, bias=False) for _ in range(2))
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp = MLP(slot_dim, 4 * slot_dim)

    def forward(self, slots: Tensor, features: Tensor) -> dict[str, Tensor]:
        """New slots, and their masks [B, N, M]."""
        features = self.norm_features(features)
        k, v = self.to_k(features), self.to_v(features)
        for _ in range(self.n_iters):
            slots = self.norm_slots(slots)
            masks = (self.to_q(slots) @ k.mT * self.scale).softmax(dim=1)
            weights = (masks + self.eps) / (masks + self.eps).sum(dim=-1, keepdim=True)
            slots = self.gru((weights @ v).flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = self.mlp(slots)
        return {"slots": slots, "masks": masks}
