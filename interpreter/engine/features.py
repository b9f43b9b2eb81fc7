"""Features of every frame of a data set: encoded once and memory-mapped, or anew for each batch."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from interpreter.configs import BackboneConfig
from interpreter.data import FrameFolder, Video
from interpreter.data.loaders import Loader, Request
from interpreter.files import write_text
from interpreter.models.backbone import Backbone
from interpreter.models.transformer import autocast

ENCODE_BATCH = 32


class FeatureSource(Protocol):
    """Features by frame number; frames of all videos are counted through."""

    def batch(self, frames: Tensor, flips: Tensor) -> Tensor:
        """Features [n, M, D] fp32 of frames [n] int64; flips [n] bool asks for the mirrored frame."""

    def expect(self, requests: Iterable[Request]) -> None:
        """Announce what `batch` will be asked for next, soonest first; a source takes as many as it can use."""


def encode(backbone: Backbone, frames: Iterable[np.ndarray], precision: str) -> Iterator[Tensor]:
    """Yield features [≤32, M, D] of a stream of frames uint8 [H, W, 3], in order and in constant memory."""
    for chunk in _chunks(frames):
        yield _encode(backbone, chunk, precision)


def _chunks(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    stream = iter(frames)
    while chunk := list(itertools.islice(stream, ENCODE_BATCH)):
        yield np.stack(chunk)


def _encode(backbone: Backbone, frames: np.ndarray, precision: str) -> Tensor:
    device = backbone.mean.device
    with autocast(device, precision):
        return backbone.features(torch.from_numpy(frames).to(device))


class StreamedFeatures:
    """Encode the asked-for frames at every call; a loader decodes them ahead."""

    def __init__(self, backbone: Backbone, loader: Loader, precision: str) -> None:
        self.backbone, self.loader, self.precision = backbone, loader, precision

    def batch(self, frames: Tensor, flips: Tensor) -> Tensor:
        """See :class:`FeatureSource`."""
        pixels = self.loader.batch(frames, flips)
        with autocast(self.backbone.mean.device, self.precision):
            return torch.cat([self.backbone.features(part) for part in pixels.split(ENCODE_BATCH)])

    def expect(self, requests: Iterable[Request]) -> None:
        """See :class:`FeatureSource`."""
        self.loader.expect(requests)


class StoredFeatures:
    """Features of all frames, with both flips if asked for, in one fp16 file under ``directory``.

    The folder's name is a hash of backbone, weights, frame size, precision and the videos' paths, sizes and times:
    a stale file is never used. Encoding goes on video by video where it was interrupted.
    """

    def __init__(self, path: Path, count: int, tokens: int, dim: int, device: torch.device) -> None:
        self.count, self.device = count, device
        total = path.stat().st_size // 2
        self.table = torch.from_file(str(path), shared=False, size=total, dtype=torch.float16).view(-1, tokens, dim)

    def batch(self, frames: Tensor, flips: Tensor) -> Tensor:
        """See :class:`FeatureSource`."""
        return self.table[frames + self.count * flips].to(self.device).float()

    def expect(self, requests: Iterable[Request]) -> None:
        """See :class:`FeatureSource`; nothing is prepared here."""


def features_key(
    backbone: Backbone, config: BackboneConfig, videos: Sequence[Video], size: tuple[int, int], precision: str
) -> str:
    """Hash of everything that the features depend on."""
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps([config.feature_layer, config.feature_norm, size, precision]).encode())
    for video in videos:
        digest.update(f"{video.path.resolve()}|{video.num_frames}\n".encode())
        # A frame that is replaced in place leaves its folder's time as it was.
        for file in video.files if isinstance(video, FrameFolder) else [video.path]:
            status = file.stat()
            digest.update(f"{file.name}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def stored_bytes(backbone: Backbone, videos: Sequence[Video], size: tuple[int, int], flip: bool) -> int:
    """Size of the file that :func:`store_features` writes."""
    rows, columns = backbone.grid(size)
    return (1 + flip) * sum(v.num_frames for v in videos) * rows * columns * backbone.dim * 2


def store_features(
    directory: Path,
    backbone: Backbone,
    key: str,
    videos: Sequence[Video],
    size: tuple[int, int],
    precision: str,
    flip: bool,
    advance: Callable[[int], None],
) -> StoredFeatures:
    """Encode what is not yet stored and open the store.

    Args:
        directory: home of the store; stores with another key are removed, since nothing can use them any more.
        backbone: frozen feature extractor.
        key: what :func:`features_key` says.
        videos: the videos, in the order that numbers their frames.
        size: frame size (H, W).
        precision: "bf16" or "fp32".
        flip: store the mirrored frames too.
        advance: called with the number of frames that became available.

    Raises:
        OSError: if the disk cannot hold the store.
    """
    home = directory / f"{key}{'-flip' if flip else ''}"
    for other in directory.glob("*"):
        if other != home:
            shutil.rmtree(other)
    home.mkdir(parents=True, exist_ok=True)
    path, journal = home / "features.f16", home / "done.json"
    grid = backbone.grid(size)
    tokens, total = grid[0] * grid[1], sum(v.num_frames for v in videos)
    row = tokens * backbone.dim * 2
    whole = (1 + flip) * total * row
    # Without the file, or with a part of it, the journal says nothing.
    intact = journal.exists() and path.exists() and path.stat().st_size == whole
    done = json.loads(journal.read_text()) if intact else 0
    starts = np.cumsum([0] + [v.num_frames for v in videos])
    with path.open("r+b" if path.exists() else "w+b") as file:
        # Claim the space first: a full disk is found before an hour of encoding, not after.
        try:
            os.posix_fallocate(file.fileno(), 0, whole)
        except OSError as error:
            path.unlink()
            raise OSError(
                error.errno,
                f"the features need {whole / 1e9:.1f} GB, which {directory} has no room for ({error.strerror}); "
                "use --features streamed, or a --run on a larger disk",
            ) from error
        advance(int(starts[done]))
        for index in range(done, len(videos)):
            _store_video(file, backbone, videos[index], int(starts[index]), total, size, precision, flip, row)
            file.flush()
            os.fsync(file.fileno())
            write_text(journal, str(index + 1))
            advance(videos[index].num_frames)
    return StoredFeatures(path, total, tokens, backbone.dim, backbone.mean.device)


def _store_video(
    file: BinaryIO,
    backbone: Backbone,
    video: Video,
    start: int,
    total: int,
    size: tuple[int, int],
    precision: str,
    flip: bool,
    row: int,
) -> None:
    position = start
    for chunk in _chunks(video.frames(size)):
        for mirrored in (False, True) if flip else (False,):
            pixels = np.ascontiguousarray(chunk[:, :, ::-1]) if mirrored else chunk
            file.seek((position + total * mirrored) * row)
            file.write(_encode(backbone, pixels, precision).half().cpu().numpy().tobytes())
        position += len(chunk)
    if position != start + video.num_frames:
        raise ValueError(f"{video.path} gave {position - start} frames, but {video.num_frames} were counted before")
