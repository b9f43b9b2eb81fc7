import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from interpreter.configs import BackboneConfig
from interpreter.data import open_video
from interpreter.data.loaders import open_loader
from interpreter.engine.features import (
    StreamedFeatures,
    encode,
    features_key,
    store_features,
    stored_bytes,
)
from interpreter.models.backbone import Backbone, load_backbone

SIZE = (32, 48)
LENGTHS = (3, 40, 5)  # the second is longer than one encoding batch


class Patches(Backbone):
    """A small random linear map of 16x16 patches; counts the frames that it sees."""

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


@pytest.fixture
def videos(tmp_path):
    for number, length in enumerate(LENGTHS):
        write_frames(tmp_path / "videos" / str(number), length, number)
    return [open_video(tmp_path / "videos" / str(number)) for number in range(len(LENGTHS))]


def store(home, videos, backbone, flip=True, advance=lambda frames: None, key="key"):
    return store_features(home, backbone, key, videos, SIZE, "fp32", flip, advance)


def streamed_features(backbone, videos):
    return StreamedFeatures(backbone, open_loader("torch", videos, SIZE, torch.device("cpu")), "fp32")


def table(home):
    (path,) = home.glob("*/features.f16")
    return path.read_bytes()


def all_frames(flip):
    count = sum(LENGTHS)
    return torch.arange(count), torch.full((count,), flip)


@pytest.mark.parametrize("flip", [False, True])
def test_stored_features_equal_streamed_ones(flip, videos, tmp_path):
    backbone = load_backbone(BackboneConfig())
    stored = store(tmp_path / "store", videos, backbone).batch(*all_frames(flip))
    streamed = streamed_features(backbone, videos).batch(*all_frames(flip))
    assert stored.shape == (48, 6, 192)
    assert stored.dtype == torch.float32
    # fp16 keeps 11 bits; other batch sizes round differently.
    torch.testing.assert_close(stored, streamed, atol=2e-3, rtol=2e-3)


def test_flips_are_the_features_of_mirrored_frames(videos, tmp_path):
    backbone = Patches()
    mirrored = torch.from_numpy(np.concatenate([video.read(range(len(video)), SIZE) for video in videos])).flip(2)
    expected = backbone.features(mirrored)
    for source in (store(tmp_path / "store", videos, backbone), streamed_features(backbone, videos)):
        torch.testing.assert_close(source.batch(*all_frames(True)), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("stored", [False, True])
def test_batches_follow_the_asked_order(stored, videos, tmp_path):
    backbone = Patches()
    source = store(tmp_path / "store", videos, backbone) if stored else streamed_features(backbone, videos)
    frames = torch.tensor([47, 0, 3, 2, 42, 43, 0])
    flips = torch.tensor([True, False, True, False, False, True, True])
    found = source.batch(frames, flips)
    for row, (frame, flip) in enumerate(zip(frames, flips, strict=True)):
        torch.testing.assert_close(found[row], source.batch(frame[None], flip[None])[0])
    assert (found[1] - found[6]).abs().max() > 0.1


def test_encoding_is_in_order_and_in_pieces(videos):
    backbone = Patches()
    pieces = list(encode(backbone, videos[1].frames(SIZE), "fp32"))
    assert [len(piece) for piece in pieces] == [32, 8]
    torch.testing.assert_close(torch.cat(pieces), backbone.features(torch.from_numpy(videos[1].read(range(40), SIZE))))


def test_store_is_as_large_as_announced(videos, tmp_path):
    for flip in (False, True):
        store(tmp_path / "store", videos, Patches(), flip)
        assert len(table(tmp_path / "store")) == stored_bytes(Patches(), videos, SIZE, flip)


@pytest.mark.parametrize("seen", [7, 70], ids=["at the start of the second video", "inside of it"])
def test_interrupted_encoding_goes_on_at_its_video_with_the_same_bytes(seen, videos, tmp_path):
    store(tmp_path / "whole", videos, Patches())
    backbone, advanced = Patches(), []
    backbone.fail_at = seen
    with pytest.raises(RuntimeError, match="power cut"):
        store(tmp_path / "store", videos, backbone)
    backbone = Patches()
    store(tmp_path / "store", videos, backbone, advance=advanced.append)
    assert backbone.seen == 2 * (LENGTHS[1] + LENGTHS[2])  # the first video is not encoded again
    assert advanced == list(LENGTHS)
    assert table(tmp_path / "store") == table(tmp_path / "whole")
    backbone = Patches()
    store(tmp_path / "store", videos, backbone)
    assert backbone.seen == 0


def test_stop_between_videos_keeps_what_is_done(videos, tmp_path):
    def stop(frames):
        if frames:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "store", videos, Patches(), advance=stop)
    backbone = Patches()
    store(tmp_path / "store", videos, backbone)
    assert backbone.seen == 2 * (LENGTHS[1] + LENGTHS[2])


@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_damaged_store_is_encoded_anew(damage, videos, tmp_path):
    store(tmp_path / "store", videos, Patches())
    whole = table(tmp_path / "store")
    (path,) = (tmp_path / "store").glob("*/features.f16")
    path.unlink() if damage == "lost" else os.truncate(path, 1000)
    store(tmp_path / "store", videos, Patches())
    assert table(tmp_path / "store") == whole


def test_key_changes_with_all_that_features_depend_on(videos, tmp_path):
    def key(backbone=None, config=None, chosen=None, size=SIZE, precision="fp32"):
        return features_key(backbone or Patches(), config or BackboneConfig(), chosen or videos, size, precision)

    first = key()
    assert key() == first
    other = Patches()
    other.weight.data[3, 2, 1, 0] += 1e-7
    keys = [first, key(Patches(1)), key(other), key(config=BackboneConfig(feature_layer=2)), key(size=(64, 96))]
    keys += [key(config=BackboneConfig(feature_norm=False)), key(precision="bf16"), key(chosen=videos[::-1])]
    keys += [key(chosen=videos[:2])]
    write_frames(tmp_path / "elsewhere" / "0", LENGTHS[0], 0)
    keys += [key(chosen=[open_video(tmp_path / "elsewhere" / "0"), *videos[1:]])]
    assert len(set(keys)) == len(keys)


def test_key_changes_when_a_frame_is_replaced(videos):
    def key(video):
        return features_key(Patches(), BackboneConfig(), [video], SIZE, "fp32")

    before = key(videos[0])
    frame = videos[0].files[1]
    folder_time = frame.parent.stat().st_mtime_ns
    os.utime(frame, ns=(1, 1))  # replaced in place: the folder's own time stays
    assert frame.parent.stat().st_mtime_ns == folder_time
    assert key(videos[0]) != before


def test_stores_that_nothing_can_use_any_more_are_removed(videos, tmp_path):
    store(tmp_path / "store", videos, Patches(), key="old")
    store(tmp_path / "store", videos, Patches(), key="new")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["new-flip"]


def test_disk_without_room_is_found_before_encoding(videos, small_disk):
    disk, backbone = small_disk(8192), Patches()
    (disk / "video").write_bytes(b"kept")
    with pytest.raises(OSError, match=r"the features need .* GB.*--features streamed") as caught:
        store(disk / "features", videos, backbone)
    assert caught.value.errno == errno.ENOSPC
    assert backbone.seen == 0
    assert not list(disk.glob("features/*/features.f16"))  # what little it could claim is given back
    assert (disk / "video").read_bytes() == b"kept"


def test_video_that_lost_frames_is_named(videos, tmp_path):
    for frame in videos[2].files[3:]:
        frame.unlink()
    shorter = open_video(videos[2].path)

    class Counted(type(shorter)):
        num_frames = 5

    shorter.__class__ = Counted
    with pytest.raises(ValueError, match=r"2 gave 3 frames, but 5 were counted"):
        store(tmp_path / "store", [videos[0], shorter], Patches())
