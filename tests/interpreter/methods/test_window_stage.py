"""Windows from pixels, with patches dropped inside the backbone, and the options that choose between the sources."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from interpreter.cache import main as cache
from interpreter.configs import BackboneConfig, DataConfig, OptimConfig
from interpreter.data import VideoDataset, open_video
from interpreter.data.loaders import open_loader
from interpreter.engine.distributed import Ranks
from interpreter.engine.inputs import InputSettings
from interpreter.methods import METHODS
from interpreter.methods.base import Context, Method
from interpreter.methods.windows import FeatureWindows, PatchWindows, WindowInputs, WindowStage, WindowTraining
from interpreter.models.backbones import load_backbone
from interpreter.store import features
from interpreter.store.features import StreamedFeatures

from ..models.small_vits import save_vit
from ..store.small_caches import LENGTHS, SIZE, write_frames

CPU, TOKENS = torch.device("cpu"), 6


class SmallStage(WindowStage):
    """A stage of windows without a model."""

    name, config = "model", WindowTraining
    presets = {"demo": WindowTraining(run=Path("runs/windows"))}  # noqa: RUF012

    def build(self, config, context):
        raise NotImplementedError

    def loss(self, model, *batch):
        raise NotImplementedError

    def segmenter(self, config, model, context, settings=None, frame_size=None):
        raise NotImplementedError


class CountingLoader:
    """The frames of each request, and how many requests and frames there were."""

    def __init__(self, loader):
        self.loader, self.requests = loader, []

    def batches(self, requests):
        for pixels, request in zip(self.loader.batches(requests := list(requests)), requests, strict=True):
            self.requests.append(request)
            yield pixels


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for number, length in enumerate(LENGTHS):
        write_frames(root / f"{number}", length, number)
    return VideoDataset([open_video(root / f"{number}") for number in range(len(LENGTHS))])


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    save_vit("ViT", folder)
    return str(folder)


def settings_of(dataset, ranks=None, **optim):
    return InputSettings(dataset, OptimConfig(**{"batch_size": 8, "precision": "fp32", **optim}), ranks or Ranks())


def from_pixels(dataset, backbone, kept, ranks=None):
    loader = CountingLoader(open_loader("torch", dataset.videos, SIZE, CPU))
    source = PatchWindows(backbone, loader, "fp32")
    return WindowInputs(source, (TOKENS, backbone.dim), settings_of(dataset, ranks), 2, kept)


def from_features(dataset, backbone, kept):
    source = FeatureWindows(StreamedFeatures(backbone, open_loader("torch", dataset.videos, SIZE, CPU), "fp32"))
    return WindowInputs(source, (TOKENS, backbone.dim), settings_of(dataset), 2, kept)


def batches(inputs, steps):
    return list(inputs.batches(steps))


def test_kept_patches_of_the_window_and_all_of_the_centre(dataset, vit):
    backbone = load_backbone(BackboneConfig(vit))
    inputs = from_pixels(dataset, backbone, 4)
    for step, (dropped, target, kept, present, _) in enumerate(batches(inputs, range(3))):
        assert [tuple(t.shape) for t in (dropped, target)] == inputs.shapes(8)[:2]
        request = inputs.windows(step)[0].frames
        videos, numbers = inputs.index.locate(request.frames)
        rows = iter(zip(videos, numbers, request.flips.tolist(), strict=True))
        for b in range(8):
            for f in range(5):
                if not present[b, f]:
                    assert not dropped[b, f].any()
                    continue
                video, number, flip = next(rows)
                pixels = torch.from_numpy(dataset[video].read([number], SIZE))
                pixels = pixels.flip(2) if flip else pixels
                torch.testing.assert_close(dropped[b, f], backbone.features(pixels, kept[b, f][None])[0])
                if f == 2:
                    torch.testing.assert_close(target[b], backbone.features(pixels)[0])


def test_frames_are_decoded_once_and_absent_ones_never(dataset, vit):
    backbone = load_backbone(BackboneConfig(vit))
    inputs, encoded = from_pixels(dataset, backbone, 4), []
    backbone.model.embeddings.register_forward_pre_hook(lambda _, arguments: encoded.append(len(arguments[0])))
    present = torch.stack([present for *_, present, _ in batches(inputs, range(4))])
    requests = inputs.source.loader.requests
    assert len(requests) == 4
    assert sum(len(request.frames) for request in requests) == present.sum() < present.numel()
    assert sum(encoded) == present.sum() + 4 * 8  # the centres a second time
    assert max(encoded) <= features.ENCODE_BATCH < present[0].sum()


def test_dropping_nothing_gives_the_features_bit_for_bit(dataset, vit):
    backbone = load_backbone(BackboneConfig(vit))
    ours, theirs = (batches(make(dataset, backbone, TOKENS), range(3)) for make in (from_pixels, from_features))
    for one, other in zip(ours, theirs, strict=True):
        dropped, target, *draws = one
        assert torch.equal(dropped, other[0])
        torch.testing.assert_close(target, other[1])  # encoded together with other frames
        assert all(torch.equal(a, b) for a, b in zip(draws, other[2:], strict=True))


def test_processes_share_a_batch(dataset, vit):
    backbone = load_backbone(BackboneConfig(vit))
    whole = next(from_pixels(dataset, backbone, 4).batches([1]))
    halves = [next(from_pixels(dataset, backbone, 4, Ranks(rank, 2)).batches([1])) for rank in range(2)]
    for tensor, *parts in zip(whole, *halves, strict=True):
        torch.testing.assert_close(torch.cat(parts), tensor)


@contextmanager
def opened(dataset, run, backbone, **options):
    """The inputs of `SmallStage`."""
    data = DataConfig(frame_size=SIZE, crop=options.pop("crop", "none"))
    config = replace(SmallStage.presets["demo"], run=run, data=data, backbone=BackboneConfig(backbone), **options)
    context = Context(run, CPU, "fp32", data, config.backbone, load_backbone(config.backbone), run / "cache")
    stage = SmallStage()
    with stage.inputs(config, context, settings_of(dataset, flip=False)) as inputs:
        yield inputs, stage.describe(config, context)


def test_options_choose_the_source(dataset, vit, tmp_path):
    for options, kind, kept in [
        ({}, PatchWindows, 3),
        ({"features": "streamed", "token_drop": 0.4}, PatchWindows, 3),
        ({"token_drop": 0.0}, FeatureWindows, 6),
        ({"token_drop_at": "features", "token_drop": 0.9}, FeatureWindows, 1),
        ({"token_drop_at": "features", "features": "stored"}, FeatureWindows, 3),
    ]:
        with opened(dataset, tmp_path, vit, **options) as (inputs, described):
            assert type(inputs.source) is kind
            dropped, target, *_ = next(inputs.batches([0]))
            assert dropped.shape == (8, 5, kept, 32)
            assert target.shape == (8, 6, 32)
            assert described == f"windows of 5 frames with {kept} each of 2x3 tokens of width 32"


def test_drop_zero_is_the_features_source(dataset, vit, tmp_path):
    ways = [{"token_drop_at": "patches"}, {"token_drop_at": "features"}]
    found = []
    for number, options in enumerate(ways):
        with opened(
            dataset, tmp_path / f"{number}", vit, token_drop=0.0, features="streamed", half_window=1, **options
        ) as (inputs, _):
            found.append(next(inputs.batches([3])))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_features_of_dropped_patches_are_neither_stored_nor_cached(dataset, vit, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--token-drop-at patches.*cannot be stored; use --features streamed, or"):  # noqa: SIM117
        with opened(dataset, tmp_path, vit, features="stored"):
            pass
    with opened(dataset, tmp_path, vit):  # auto streams
        assert not (tmp_path / "cache").exists()
    monkeypatch.setitem(METHODS, "test-windows", Method("test-windows", "windows", "-", (SmallStage(),), dict))
    with pytest.raises(ValueError, match=r"cannot be stored, and there is nothing to compute beforehand"):
        cache(["--method", "test-windows", "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_cnn_needs_features(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"no vision transformer.*--token-drop-at features"):  # noqa: SIM117
        with opened(dataset, tmp_path, "efficientnet-lite0"):
            pass
    with opened(dataset, tmp_path, "efficientnet-lite0", token_drop_at="features") as (inputs, _):
        assert next(inputs.batches([0]))[0].shape == (8, 5, 3, 192)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=f"--token-drop must be at least 0 and less than 1, got {share}"):
        WindowTraining(run=Path("run"), token_drop=share)


def test_kept_tokens_are_rounded_down():
    kept = [WindowTraining(run=Path("run"), token_drop=share).kept(864) for share in (0.5, 0.0, 0.9, 0.999)]
    assert kept == [432, 864, 86, 1]
    assert WindowTraining(run=Path("run"), token_drop=0.9).kept(10) == 1
