"""A small SMTC and batches for it."""

import dataclasses

import torch

from interpreter.methods.smtc.config import PRESETS, SmtcModelConfig
from interpreter.methods.smtc.model import Smtc

GRID, FEATURES, FRAMES = (4, 5), 12, 3
PATCHES, SEMANTICS, INSTANCES = GRID[0] * GRID[1], 3, 2
CONFIG = SmtcModelConfig(num_semantics=SEMANTICS, num_instances=INSTANCES)


def build(seed=0, loss=None, features=FEATURES, **changes):
    """Student and teacher, whose weights differ. Masks have patches, and instances are valid."""
    torch.manual_seed(seed)
    demo = PRESETS["demo"]
    losses = dataclasses.replace(demo.loss, **{"area_threshold": 0.02, "similarity_threshold": 0.1, **(loss or {})})
    config = dataclasses.replace(
        demo, model=dataclasses.replace(CONFIG, **changes), loss=losses, num_frames=FRAMES, drop_path=0.0
    )
    model = Smtc(config, features, GRID).double()
    for parameter in model.parameters():  # weights that differ from the initial ones
        parameter.data += 0.05 * torch.randn(parameter.shape, dtype=parameter.dtype)
    return model


def batch(size=2, seed=1, features=FEATURES):
    """Features of student and teacher, partner frames, and noise: the arguments of the model."""
    shape = (size, FRAMES, PATCHES, features)
    student, teacher = (torch.randn(shape, dtype=torch.float64, generator=seeded(seed + i)) for i in range(2))
    partners = torch.tensor([[2, 0, 1], [1, 2, 0]])[torch.arange(size) % 2]
    noise = torch.randn(
        size, 2 * FRAMES * SEMANTICS * INSTANCES * FEATURES, dtype=torch.float64, generator=seeded(seed + 2)
    )
    return student, teacher, partners, noise


def seeded(seed):
    return torch.Generator().manual_seed(seed)
