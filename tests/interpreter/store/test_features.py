"""Features of frames: stored and streamed ones are the same, in any order."""

import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from interpreter.configs import BackboneConfig, LoaderConfig
from interpreter.data.loaders import Request
from interpreter.data.video import CentralSquare
from interpreter.interrupts import Interrupted
from interpreter.models.backbones import load_backbone
from interpreter.store.features import FeatureMaker, encode
from interpreter.store.files import read_content
from interpreter.store.open import opened_features

from .small_caches import LENGTHS, SIZE, Patches, all_frames, batch, make_cache, store, streamed_features


@pytest.mark.parametrize("flip", [False, True])
def test_stored_features_equal_streamed_ones(flip, videos, tmp_path):
    backbone = load_backbone(BackboneConfig())
    stored = batch(store(tmp_path / "store", videos, backbone), *all_frames(flip))
    streamed = batch(streamed_features(backbone, videos), *all_frames(flip))
    assert stored.shape == (48, 6, 192)
    assert stored.dtype == torch.float32
    # fp16 keeps 11 bits; other batch sizes round differently.
    torch.testing.assert_close(stored, streamed, atol=2e-3, rtol=2e-3)


def test_flips_are_the_features_of_mirrored_frames(videos, tmp_path):
    backbone = Patches()
    mirrored = torch.from_numpy(np.concatenate([video.read(range(len(video)), SIZE) for video in videos])).flip(2)
    expected = backbone.features(mirrored)
    for source in (store(tmp_path / "store", videos, backbone), streamed_features(backbone, videos)):
        torch.testing.assert_close(batch(source, *all_frames(True)), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("stored", [False, True])
def test_batches_follow_the_asked_order(stored, videos, tmp_path):
    backbone = Patches()
    source = store(tmp_path / "store", videos, backbone) if stored else streamed_features(backbone, videos)
    frames = torch.tensor([47, 0, 3, 2, 42, 43, 0])
    flips = torch.tensor([True, False, True, False, False, True, True])
    features = batch(source, frames, flips)
    for row, (frame, flip) in enumerate(zip(frames, flips, strict=True)):
        torch.testing.assert_close(features[row], batch(source, frame[None], flip[None])[0])
    assert (features[1] - features[6]).abs().max() > 0.1


def test_encoding_is_in_order_and_in_pieces(videos):
    backbone = Patches()
    pieces = list(encode(backbone, videos[1].frames(SIZE), "fp32"))
    assert [len(piece) for piece in pieces] == [32, 8]
    torch.testing.assert_close(torch.cat(pieces), backbone.features(torch.from_numpy(videos[1].read(range(40), SIZE))))


def test_stored_tensors_are_mapped_and_not_read(videos, tmp_path):
    source = store(tmp_path / "store", videos, Patches())
    batch(source, torch.tensor([5]), torch.tensor([False]))
    assert str(tmp_path / "store") in Path("/proc/self/maps").read_text()


def test_encoding_ends_within_a_batch_of_frames(videos, tmp_path):
    maker, asked = make_cache(tmp_path / "store", videos, Patches(), flip=False).maker, []

    def check():
        asked.append(1)
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        maker.make(videos[1], read_content(videos[1]), [False], check)
    assert (asked, maker.backbone.seen) == ([1], 32)
    assert not list((tmp_path / "store").glob("*/*"))


def test_cache_serves_videos_in_any_order_and_equal_ones_once(videos, tmp_path):
    first = store(tmp_path / "store", videos, Patches())
    backbone = Patches()
    turned = store(tmp_path / "store", [videos[2], videos[0], videos[2]], backbone)
    assert backbone.seen == 0
    assert torch.equal(
        batch(turned, torch.tensor([0, 5, 8]), torch.tensor([True, False, True])),
        batch(first, torch.tensor([43, 0, 43]), torch.tensor([True, False, True])),
    )
    store(tmp_path / "other", [videos[0], videos[0]], backbone)
    assert backbone.seen == 2 * LENGTHS[0]


@contextmanager
def opened(choice, videos, root, crop):
    """The result of `opened_features` for squares of 32 pixels."""
    backbone, size = Patches(), (32, 32)

    def make(dtype):
        return FeatureMaker(root, backbone, BackboneConfig(), size, "fp32", dtype, True)

    with opened_features(choice, make, backbone, videos, size, "fp32", LoaderConfig(workers=1), crop) as features:
        yield features


def test_features_of_random_squares_are_streamed(videos, tmp_path):
    squares = [CentralSquare(video) for video in videos]
    offsets = torch.tensor([0.0, 1.0, 0.3, 0.3])
    request = Request(torch.tensor([2, 2, 44, 44]), torch.tensor([False, False, False, True]), offsets)
    for choice in ("auto", "streamed"):
        with opened(choice, squares, tmp_path / "store", "random") as source:
            features = next(source.batches([request]))
    frame, other = videos[0].read([2])[0], videos[2].read([1])[0][:, 5:37]  # 5 = 0.3 * 17 places
    pixels = np.stack([frame[:, :32], frame[:, 16:], other, other[:, ::-1]])
    torch.testing.assert_close(features, Patches().features(torch.from_numpy(pixels)))
    assert not (tmp_path / "store").exists()
    with pytest.raises(ValueError, match="cannot be stored; use --crop central, or --features streamed"):  # noqa: SIM117
        with opened("stored", squares, tmp_path / "store", "random"):
            pass


def test_features_of_central_squares_are_stored(videos, tmp_path):
    squares = [CentralSquare(video) for video in videos]
    frames, flips = torch.tensor([2, 44]), torch.tensor([False, True])
    with opened("stored", squares, tmp_path / "store", "central") as source:
        features = batch(source, frames, flips)
        with pytest.raises(ValueError, match=r"random squares .*cannot be stored"):
            next(source.batches([Request(frames, flips, torch.zeros(2))]))
    pixels = np.stack([videos[0].read([2])[0][:, 8:40], videos[2].read([1])[0][:, 8:40][:, ::-1]])
    expected = Patches().features(torch.from_numpy(pixels))
    torch.testing.assert_close(features, expected, atol=2e-3, rtol=2e-3)
