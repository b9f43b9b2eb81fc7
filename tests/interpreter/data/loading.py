"""Shared by the tests of the loaders: requests, and the pixels that must be returned."""

import numpy as np
import psutil
import pytest
import torch

from interpreter.data.loaders.open import dali_is_installed

SIZE = (48, 80)
CPU = torch.device("cpu")
needs_dali = pytest.mark.skipif(not dali_is_installed(), reason="needs nvidia-dali-cuda120 or -cuda130")
ENGINES = ["pyav", "torch", pytest.param("dali", marks=needs_dali)]


def requests(videos, count=6, size=20, seed=0):
    """Requests of frames of all videos in any order, some of them twice."""
    rng = np.random.default_rng(seed)
    total = sum(video.num_frames for video in videos)
    draws = ((rng.integers(0, total, size), rng.random(size) < 0.5) for _ in range(count))
    return [(torch.from_numpy(frames), torch.from_numpy(flips)) for frames, flips in draws]


def truth(videos, request):
    """What `Video.read` returns for a request."""
    everything = np.concatenate([video.read(range(video.num_frames), SIZE) for video in videos])
    frames, flips = (part.numpy() for part in request)
    return np.where(flips[:, None, None, None], everything[frames, :, ::-1], everything[frames])


def whole(videos):
    """A request of all frames in order."""
    total = sum(video.num_frames for video in videos)
    return torch.arange(total), torch.zeros(total, dtype=torch.bool)


def children():
    """Processes that this one started and that still run."""
    return psutil.Process().children()
