"""Caches of a small backbone that counts the frames that it encodes."""

import numpy as np
import torch
from PIL import Image

from interpreter.configs import BackboneConfig
from interpreter.data.loaders import open_loader
from interpreter.models.backbones import Backbone
from interpreter.store.features import FeatureMaker, StoredFeatures, StreamedFeatures
from interpreter.store.files import read_content
from interpreter.store.fill import Cache, Shard

SIZE = (32, 48)
LENGTHS = (3, 40, 5)  # the second is longer than one encoding batch


class Patches(Backbone):
    """A small random linear map of 16x16 patches; counts the frames that it encodes."""

    def __init__(self, seed=0):
        super().__init__(8, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(8, 3, 16, 16, generator=generator) / 28, requires_grad=False)
        self.seen, self.fail_at = 0, None

    def tokens(self, x):
        self.seen += len(x)
        if self.fail_at is not None and self.seen > self.fail_at:
            raise RuntimeError("power cut")
        return torch.conv2d(x, self.weight, stride=16).flatten(2).transpose(1, 2)


def write_frames(folder, count, seed):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for t in range(count):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / f"{t:03d}.png")


def make_cache(root, videos, backbone, flip=True, dtype="fp16", size=SIZE, precision="fp32", config=None):
    maker = FeatureMaker(root, backbone, config or BackboneConfig(), size, precision, dtype, flip)
    return Cache(maker, videos, [read_content(video) for video in videos])


def streamed_features(backbone, videos):
    return StreamedFeatures(backbone, open_loader("torch", videos, SIZE, torch.device("cpu")), "fp32")


def store(root, videos, backbone, flip=True, shard=None):
    """Fill the cache, one video at a time and in order, and open it."""
    cache = make_cache(root, videos, backbone, flip)
    cache.fill(shard or Shard(), 1, "ADVICE")
    return StoredFeatures(cache.table(), backbone.device)


def files(root):
    return {path.relative_to(root): path.read_bytes() for path in root.glob("*/*") if path.suffix == ".safetensors"}


def all_frames(flip):
    count = sum(LENGTHS)
    return torch.arange(count), torch.full((count,), flip)


def batch(source, frames, flips):
    """Features of one request."""
    return next(source.batches([(frames, flips)]))
