"""A small SOLV and batches for it."""

import dataclasses

import torch

from interpreter.methods.solv.config import SolvModelConfig
from interpreter.methods.solv.model import Solv

CONFIG = SolvModelConfig(num_slots=4, dim=16, heads=4, decoder_dim=24, decoder_layers=2, dropout=0.0)
GRID, FEATURES, KEPT, FRAMES = (4, 5), 12, 9, 5
PATCHES = GRID[0] * GRID[1]


def build(seed=0, frames=FRAMES, **changes):
    torch.manual_seed(seed)
    return Solv(dataclasses.replace(CONFIG, **changes), FEATURES, GRID, frames).double()


def batch(size=3, kept=KEPT, seed=1):
    """Features of windows, one at the beginning and one at the end of a video. All samples but one merge."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(size, FRAMES, PATCHES, generator=generator).argsort(-1)[..., :kept].sort(-1).values
    whole = torch.randn(size, FRAMES, PATCHES, FEATURES, generator=generator, dtype=torch.float64)
    present = torch.ones(size, FRAMES, dtype=torch.bool)
    present[0, :2] = False
    present[-1, -1] = False
    dropped = whole.gather(2, numbers[..., None].expand(-1, -1, -1, FEATURES)) * present[..., None, None]
    return dropped, whole[:, FRAMES // 2], numbers, present, torch.arange(size) != 1


def seeded(seed):
    return torch.Generator().manual_seed(seed)
