"""Features of the frames of a data set, read from the cache or encoded for each batch."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from interpreter.configs import BackboneConfig, Dtype
from interpreter.data import Video
from interpreter.data.loaders import Loader, Request
from interpreter.models.autocast import autocast
from interpreter.models.backbones import Backbone
from interpreter.store.files import Content, Store, require_unchanged
from interpreter.store.table import FrameTable

ENCODE_BATCH = 32
NOT_STORED = (
    "features of random squares (--crop random) differ in every step, so they cannot be stored; use --crop central, or "
    "--features streamed"
)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class FeatureSource(Protocol):
    """Features by global frame number (see :class:`interpreter.data.frame_index.FrameIndex`)."""

    def batches(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """Yield the features [n, M, D] fp32 of each request for n frames. Requests are taken ahead."""


def encode(backbone: Backbone, frames: Iterable[np.ndarray], precision: str) -> Iterator[Tensor]:
    """Yield features [≤32, M, D] of a stream of frames uint8 [H, W, 3], in order, with constant memory."""
    for chunk in _chunks(frames):
        yield _encode(backbone, chunk, precision)


def _chunks(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    stream = iter(frames)
    while chunk := list(itertools.islice(stream, ENCODE_BATCH)):
        yield np.stack(chunk)


def _encode(backbone: Backbone, frames: np.ndarray, precision: str) -> Tensor:
    device = backbone.device
    with autocast(device, precision):
        return backbone.features(torch.from_numpy(frames).to(device))


def encode_batch(backbone: Backbone, pixels: Tensor, precision: str, keep: Tensor | None = None) -> Tensor:
    """Features [n, M, D] of frames uint8 [n, H, W, 3], or [n, M', D] of the patches ``keep`` [n, M']; see
    :meth:`Backbone.features`. The backbone gets at most 32 frames at once."""
    kept = itertools.repeat(None) if keep is None else keep.split(ENCODE_BATCH)
    with autocast(backbone.device, precision):
        parts = zip(pixels.split(ENCODE_BATCH), kept, strict=False)
        return torch.cat([backbone.features(*part) for part in parts])


class StreamedFeatures:
    """Encodes each batch again. A loader decodes the frames ahead."""

    def __init__(self, backbone: Backbone, loader: Loader, precision: str) -> None:
        self.backbone, self.loader, self.precision = backbone, loader, precision

    def batches(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """See :class:`FeatureSource`."""
        for pixels in self.loader.batches(requests):
            yield encode_batch(self.backbone, pixels, self.precision)


class StoredFeatures:
    """Features from the cache, memory-mapped, so a batch reads only the frames of its request.

    Args:
        table: rows named "features".
        device: device of the batches.
    """

    def __init__(self, table: FrameTable, device: torch.device) -> None:
        self.table, self.device = table, device

    def batches(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """See :class:`FeatureSource`.

        Raises:
            ValueError: if a request has offsets of squares, whose features are not in the cache.
        """
        for request in requests:
            frames, flips, offsets = Request(*request)
            if offsets is not None:
                raise ValueError(NOT_STORED)
            yield self.table.rows("features", frames, flips).to(self.device).float()


class FeatureMaker:
    """Computes the files of the feature cache.

    Args:
        root: directory of all stores.
        backbone: frozen feature extractor.
        config: options that the backbone was loaded with.
        size: frame size (H, W).
        precision: precision of matrix products, "bf16" or "fp32".
        dtype: type of the stored values, "fp16" or "bf16".
        flip: whether to store mirrored frames too.
    """

    name, unit = "features", "frames"

    def __init__(
        self,
        root: Path,
        backbone: Backbone,
        config: BackboneConfig,
        size: tuple[int, int],
        precision: str,
        dtype: Dtype,
        flip: bool,
    ) -> None:
        self.backbone, self.size, self.precision, self.dtype = backbone, size, precision, dtype
        grid = backbone.grid(size)
        self.recipe: dict[str, object] = {
            "format": 1,
            "backbone": backbone.settings(),
            "weights": tensors_hash({**backbone.state_dict(), "mean": backbone.mean, "std": backbone.std}),
            "layer": config.feature_layer,
            "norm": config.feature_norm,
            "frame_size": list(size),
            "precision": precision,
            "dtype": dtype,
        }
        if config.output != "tokens":  # for tokens the recipe must not change: existing caches use it
            self.recipe["output"] = config.output
        rows = {"features": (DTYPES[dtype], (grid[0] * grid[1], backbone.dim))}
        self.stores: Mapping[bool, Store] = {
            mirrored: Store(root, {"kind": "features", **self.recipe, "flip": mirrored}, rows)
            for mirrored in ((False, True) if flip else (False,))
        }

    def rows(self, video: Video) -> int:
        """See :class:`interpreter.store.fill.Maker`."""
        return video.num_frames

    def pieces(self, video: Video, digest: str, flips: Sequence[bool]) -> Iterator[tuple[bool, int, Tensor]]:
        """Yield (flip, first frame, features [≤32, M, D] in the type of the files).

        They are read from the cache or encoded; the values are the same.
        """
        length = video.num_frames
        stored = [flip for flip in flips if flip in self.stores and self.stores[flip].holds(digest, length)]
        for flip in stored:
            for start, piece in enumerate(self.stores[flip].tensor(digest, "features").split(ENCODE_BATCH)):
                yield flip, start * ENCODE_BATCH, piece.to(self.backbone.device)
        missing = [flip for flip in flips if flip not in stored]
        for number, chunk in enumerate(_chunks(video.frames(self.size)) if missing else ()):
            for flip in missing:
                pixels = np.ascontiguousarray(chunk[:, :, ::-1]) if flip else chunk
                encoded = _encode(self.backbone, pixels, self.precision)
                yield flip, number * ENCODE_BATCH, encoded.to(DTYPES[self.dtype])

    def make(self, video: Video, content: Content, flips: Sequence[bool], check: Callable[[], None]) -> None:
        """See :class:`interpreter.store.fill.Maker`."""
        with ExitStack() as files:
            write = {f: files.enter_context(self.stores[f].writing(video, content.digest)) for f in flips}
            for flip, start, features in self.pieces(video, content.digest, flips):
                check()
                write[flip]("features", start, features)
            require_unchanged(video, content)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        # Flattened first, because a 0-dimensional tensor cannot be viewed as bytes.
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
