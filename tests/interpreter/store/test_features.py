import errno
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from interpreter.configs import BackboneConfig
from interpreter.data import open_video
from interpreter.data.loaders import open_loader
from interpreter.interrupts import Interrupted, StopRequest
from interpreter.models.backbones import Backbone, VisionTransformer, load_backbone
from interpreter.store.features import FeatureMaker, StoredFeatures, StreamedFeatures, encode
from interpreter.store.files import read_content
from interpreter.store.fill import Cache, Shard

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


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("flip", [False, True])
def test_cache_is_as_large_as_announced_and_other_readers_can_read_it(dtype, flip, videos, tmp_path):
    cache = make_cache(tmp_path / "store", videos, Patches(), flip, dtype)
    cache.fill(Shard(), 2, "")
    assert sum(len(data) for data in files(tmp_path / "store").values()) == cache.num_bytes()
    assert len(files(tmp_path / "store")) == (1 + flip) * len(LENGTHS)
    found = load_file(cache.maker.stores[False].path(cache.contents[1].digest))
    expected = Patches().features(torch.from_numpy(videos[1].read(range(40), SIZE)))
    # bf16 keeps 8 bits.
    torch.testing.assert_close(found["features"].float(), expected, atol=1e-2, rtol=1e-2 if dtype == "bf16" else 1e-3)


def test_stored_tensors_are_mapped_and_not_read(videos, tmp_path):
    source = store(tmp_path / "store", videos, Patches())
    source.batch(torch.tensor([5]), torch.tensor([False]))
    assert str(tmp_path / "store") in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("seen", [7, 70], ids=["at the start of the second video", "inside of it"])
def test_interrupted_encoding_goes_on_at_its_video_with_the_same_bytes(seen, videos, tmp_path):
    store(tmp_path / "whole", videos, Patches())
    backbone = Patches()
    backbone.fail_at = seen
    with pytest.raises(RuntimeError, match="power cut"):
        store(tmp_path / "store", videos, backbone)
    assert len(files(tmp_path / "store")) == 2  # the first video's, and nothing half
    assert not list((tmp_path / "store").glob("*/.*"))
    backbone = Patches()
    store(tmp_path / "store", videos, backbone)
    assert backbone.seen == 2 * (LENGTHS[1] + LENGTHS[2])  # the first video is not encoded again
    assert files(tmp_path / "store") == files(tmp_path / "whole")
    backbone = Patches()
    store(tmp_path / "store", videos, backbone)
    assert backbone.seen == 0


def test_interruption_ends_the_video_in_work_and_keeps_those_that_are_done(videos, tmp_path):
    cache = make_cache(tmp_path / "store", videos, Patches())
    make = cache.maker.make

    def interrupted(video, content, flips, check):
        if video is videos[1]:
            os.kill(os.getpid(), signal.SIGTERM)
            while True:  # a long video: nothing but `check` ends it
                check()
        make(video, content, flips, check)

    cache.maker.make = interrupted
    with StopRequest(at_once=True), pytest.raises(Interrupted):
        cache.fill(Shard(), 1, "")
    assert len(files(tmp_path / "store")) == 2
    assert not list((tmp_path / "store").glob("*/.*"))
    backbone = Patches()
    store(tmp_path / "store", videos, backbone)
    assert backbone.seen == 2 * (LENGTHS[1] + LENGTHS[2])


def test_encoding_ends_within_a_batch_of_frames(videos, tmp_path):
    maker, asked = make_cache(tmp_path / "store", videos, Patches(), flip=False).maker, []

    def check():
        asked.append(1)
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        maker.make(videos[1], read_content(videos[1]), [False], check)
    assert (asked, maker.backbone.seen) == ([1], 32)
    assert not list((tmp_path / "store").glob("*/*"))


def test_two_processes_that_fill_one_cache_share_the_work(videos, tmp_path):
    store(tmp_path / "one", videos, Patches())
    slow, quick = (make_cache(tmp_path / "two", videos, Patches()) for _ in range(2))
    started, others_are_made = threading.Event(), threading.Event()
    make = {cache: cache.maker.make for cache in (slow, quick)}

    def wait_for_the_others(*arguments):
        started.set()
        assert others_are_made.wait(60)
        make[slow](*arguments)

    def make_the_others(video, *arguments):
        make[quick](video, *arguments)
        if video is videos[2]:
            others_are_made.set()

    slow.maker.make, quick.maker.make = wait_for_the_others, make_the_others
    with ThreadPoolExecutor(1) as pool:
        filled = pool.submit(slow.fill, Shard(), 1, "")
        assert started.wait(60)
        quick.fill(Shard(), 1, "")  # returns when all are there
        assert files(tmp_path / "two") == files(tmp_path / "one")
        filled.result()
    assert slow.maker.backbone.seen == 2 * LENGTHS[0]
    assert quick.maker.backbone.seen == 2 * (LENGTHS[1] + LENGTHS[2])


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_live_one_kept(videos, tmp_path):
    cache = make_cache(tmp_path / "store", videos, Patches(), flip=False)
    paths = [cache.maker.stores[False].path(content.digest) for content in cache.contents]
    paths[0].parent.mkdir(parents=True)
    for path in paths[:2]:
        path.with_name(f".{path.name}.abcd.tmp").write_bytes(b"half")
    paths[2].with_name(f".{paths[2].stem}.lock").touch()
    alive = cache._lock(1)
    assert alive.take()
    cache._remove_leftovers()
    assert sorted(path.name for path in paths[0].parent.glob(".*")) == sorted(
        [alive.path.name, f".{paths[1].name}.abcd.tmp"]
    )
    alive.release()
    cache.fill(Shard(), 1, "")
    assert not list(paths[0].parent.glob(".*"))


@pytest.mark.parametrize("damage", ["lost", "cut", "header", "longer"])
def test_damaged_file_is_made_anew_and_the_others_stay(damage, videos, tmp_path):
    store(tmp_path / "store", videos, Patches())
    whole = files(tmp_path / "store")
    path = make_cache(tmp_path / "store", videos, Patches()).maker.stores[True].path(read_content(videos[1]).digest)
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "header":
        path.write_bytes(path.read_bytes().replace(b'"patch', b'"match'))
    else:
        path.write_bytes(path.read_bytes() + b"x")
    backbone = Patches()
    store(tmp_path / "store", videos, backbone)
    assert backbone.seen == LENGTHS[1]  # that flip of that video
    assert files(tmp_path / "store") == whole


def test_address_changes_with_all_that_features_depend_on(videos, tmp_path):
    def address(backbone=None, **changes):
        (store,) = make_cache(tmp_path, videos, backbone or Patches(), flip=False, **changes).maker.stores.values()
        return store.directory

    first = address()
    assert address() == first
    other, mean = Patches(), Patches()
    other.weight.data[3, 2, 1, 0] += 1e-7
    mean.mean += 1
    found = [first, address(Patches(1)), address(other), address(mean), address(size=(64, 96))]
    found += [address(config=BackboneConfig(feature_layer=2)), address(config=BackboneConfig(feature_norm=False))]
    found += [address(precision="bf16"), address(dtype="bf16")]
    found += [make_cache(tmp_path, videos, Patches()).maker.stores[True].directory]
    assert len(set(found)) == len(found)


def test_transformer_with_other_heads_and_the_same_weights_has_another_address(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    addresses = set()
    for heads in (1, 2, 2):
        config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=heads, patch_size=4, image_size=8)
        model = Dinov2Model(config)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        backbone = VisionTransformer(model, None, True)
        addresses.add(
            FeatureMaker(tmp_path, backbone, BackboneConfig(), (8, 8), "fp32", "fp16", False).stores[False].directory
        )
    assert len(addresses) == 2


def test_video_has_the_same_content_wherever_it_is_and_another_when_a_pixel_changes(videos, tmp_path):
    before = read_content(videos[0])
    moved = shutil.copytree(videos[0].path, tmp_path / "elsewhere")
    assert read_content(open_video(moved)).digest == before.digest
    frame = np.array(Image.open(moved / "001.png"))
    frame[0, 0, 0] ^= 1
    Image.fromarray(frame).save(moved / "001.png")
    os.utime(moved / "001.png", ns=(1, 1))
    assert read_content(open_video(moved)).digest != before.digest
    shutil.copy(videos[0].path / "001.png", moved / "001.png")
    assert read_content(open_video(moved)).digest == before.digest
    (moved / "001.png").rename(moved / "003.png")  # the same frames in another order
    assert read_content(open_video(moved)).digest != before.digest


def test_cache_serves_videos_in_any_order_and_equal_ones_once(videos, tmp_path):
    first = store(tmp_path / "store", videos, Patches())
    backbone = Patches()
    turned = store(tmp_path / "store", [videos[2], videos[0], videos[2]], backbone)
    assert backbone.seen == 0
    assert torch.equal(
        turned.batch(torch.tensor([0, 5, 8]), torch.tensor([True, False, True])),
        first.batch(torch.tensor([43, 0, 43]), torch.tensor([True, False, True])),
    )
    store(tmp_path / "other", [videos[0], videos[0]], backbone)
    assert backbone.seen == 2 * LENGTHS[0]


def test_ranks_make_together_what_one_makes(videos, tmp_path):
    store(tmp_path / "one", videos, Patches())
    seen = []
    for rank in (1, 0):
        backbone = Patches()
        make_cache(tmp_path / "two", videos, backbone).fill(Shard(rank, 2), 2, "")
        seen.append(backbone.seen)
    assert seen == [2 * LENGTHS[1], 2 * (LENGTHS[0] + LENGTHS[2])]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_rank_waits_until_the_others_are_done(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("interpreter.store.fill.POLL_SECONDS", 0.01)
    mine, others = (make_cache(tmp_path / "store", videos, Patches()) for _ in range(2))
    mine.fill(Shard(0, 2), 1, "")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(others.fill, Shard(1, 2), 1, "")
        mine.wait_for_others()
    assert mine.missing() == {}
    assert len(files(tmp_path / "store")) == 6


def test_disk_without_room_is_found_before_encoding(videos, small_disk):
    disk, backbone = small_disk(16384), Patches()
    (disk / "video").write_bytes(b"kept")
    with pytest.raises(OSError, match=r"the features need .* but .*/features has .* free; ADVICE") as caught:
        store(disk / "features", videos, backbone)
    assert caught.value.errno == errno.ENOSPC
    assert backbone.seen == 0
    assert [path.name for path in disk.iterdir()] == ["video"]
    assert (disk / "video").read_bytes() == b"kept"


def test_disk_that_fills_up_meanwhile_keeps_what_is_done(videos, small_disk, monkeypatch):
    disk = small_disk(24576)
    monkeypatch.setattr(Cache, "free_bytes", lambda self: 1 << 30)
    with pytest.raises(OSError, match="the disk is full"):
        store(disk / "features", videos, Patches())
    assert len(files(disk / "features")) == 2  # both flips of the first video
    assert not list(disk.glob("*/.*.tmp"))


def test_video_that_lost_frames_is_named(videos, tmp_path):
    for frame in videos[2].files[3:]:
        frame.unlink()
    shorter = open_video(videos[2].path)

    class Counted(type(shorter)):
        num_frames = 5

    shorter.__class__ = Counted
    with pytest.raises(ValueError, match=r"2 gave 3 frames, but 5 were counted"):
        store(tmp_path / "store", [videos[0], shorter], Patches())
    assert len(files(tmp_path / "store")) == 2


def test_video_that_changes_while_it_is_encoded_leaves_no_file(videos, tmp_path):
    cache = make_cache(tmp_path / "store", videos, Patches())
    os.utime(videos[1].files[39], ns=(1, 1))
    with pytest.raises(ValueError, match=r"videos/1 changed while it was read"):
        cache.fill(Shard(), 1, "")
    assert len(files(tmp_path / "store")) == 2


def test_value_that_does_not_fit_names_the_other_type(videos, tmp_path):
    backbone = Patches()
    backbone.weight.data *= 1e6
    with pytest.raises(ValueError, match="use --dtype bf16"):
        store(tmp_path / "store", videos, backbone)
    make_cache(tmp_path / "store", videos, backbone, dtype="bf16").fill(Shard(), 1, "")


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("-1", "2"), ("0", "")])
def test_senseless_rank_is_refused(rank, world, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"RANK={rank} and WORLD_SIZE={world}"):
        Shard.from_environment()
