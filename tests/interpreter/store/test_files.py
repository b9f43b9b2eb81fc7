"""Files of the store: their names, their sizes, and the replacement of damaged ones."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from interpreter.configs import BackboneConfig
from interpreter.data import open_video
from interpreter.models.backbones import VisionTransformer
from interpreter.store.features import FeatureMaker
from interpreter.store.files import read_content
from interpreter.store.fill import Shard

from .small_caches import LENGTHS, SIZE, Patches, files, make_cache, store


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("flip", [False, True])
def test_cache_is_as_large_as_announced_and_plain_safetensors(dtype, flip, videos, tmp_path):
    cache = make_cache(tmp_path / "store", videos, Patches(), flip, dtype)
    cache.fill(Shard(), 2, "")
    assert sum(len(data) for data in files(tmp_path / "store").values()) == cache.num_bytes()
    assert len(files(tmp_path / "store")) == (1 + flip) * len(LENGTHS)
    stored = load_file(cache.maker.stores[False].path(cache.contents[1].digest))
    expected = Patches().features(torch.from_numpy(videos[1].read(range(40), SIZE)))
    # bf16 keeps 8 bits.
    torch.testing.assert_close(stored["features"].float(), expected, atol=1e-2, rtol=1e-2 if dtype == "bf16" else 1e-3)


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
    addresses = [first, address(Patches(1)), address(other), address(mean), address(size=(64, 96))]
    addresses += [address(config=BackboneConfig(feature_layer=2)), address(config=BackboneConfig(feature_norm=False))]
    addresses += [address(config=BackboneConfig(output=output)) for output in ("keys", "tokens-and-keys")]
    addresses += [address(precision="bf16"), address(dtype="bf16")]
    addresses += [make_cache(tmp_path, videos, Patches()).maker.stores[True].directory]
    assert len(set(addresses)) == len(addresses)


def test_recipe_of_tokens_is_that_of_older_caches(videos, tmp_path):
    def recipe(output):
        return make_cache(tmp_path, videos, Patches(), config=BackboneConfig(output=output)).maker.recipe

    assert set(recipe("tokens")) == {
        "format", "backbone", "weights", "layer", "norm", "frame_size", "precision", "dtype",
    }  # fmt: skip
    assert recipe("keys") == {**recipe("tokens"), "output": "keys"}


def test_transformer_with_other_heads_has_another_address(tmp_path):
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


def test_content_of_a_video_is_that_of_its_pixels(videos, tmp_path):
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
