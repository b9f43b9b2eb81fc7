"""Two views of clips, from pixels and from features, and the options that choose between them."""

import doctest
import re
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
from interpreter.engine.inputs import Clips, InputSettings
from interpreter.engine.randomness import Stream, crop_batch, partner_batch, photometric_batch
from interpreter.methods import METHODS
from interpreter.methods import views as module
from interpreter.methods.base import Context, Method
from interpreter.methods.views import AugmentConfig, FeatureViews, ViewInputs, ViewStage, ViewTraining, partners
from interpreter.models import augment
from interpreter.models.backbones import load_backbone

from ..store.small_caches import LENGTHS, SIZE, write_frames

CPU, T = torch.device("cpu"), 3
PLAIN = AugmentConfig(photometric=False)


def test_examples():
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0


class SmallStage(ViewStage):
    """A stage of views without a model."""

    name, config = "model", ViewTraining
    presets = {"demo": ViewTraining(run=Path("runs/views"), num_frames=T, stride=2)}  # noqa: RUF012

    def build(self, config, context):
        raise NotImplementedError

    def loss(self, model, *batch):
        raise NotImplementedError

    def segmenter(self, config, model, context, settings=None, frame_size=None):
        raise NotImplementedError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for number, length in enumerate(LENGTHS):
        write_frames(root / f"{number}", length, number)
    return VideoDataset([open_video(root / f"{number}") for number in range(len(LENGTHS))])


def settings_of(dataset, ranks=None, **optim):
    return InputSettings(dataset, OptimConfig(**{"batch_size": 4, "precision": "fp32", **optim}), ranks or Ranks())


def views(dataset, config=AugmentConfig(), ranks=None, squares=False, partner="random", size=SIZE, **optim):  # noqa: B008
    clips = Clips(settings_of(dataset, ranks, **optim), T, squares, 2)
    loader = open_loader("torch", dataset.videos, config.decoded_size(size), CPU, squares=squares)
    return ViewInputs(clips, loader, size, config, partner)


def batch(inputs, step):
    return next(iter(inputs.batches([step])))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_views_are_the_requested_frames(dataset):
    inputs = views(dataset, PLAIN)
    student, teacher, _ = batch(inputs, 1)
    assert torch.equal(student, teacher)
    request = inputs.clips.request(1)
    videos, numbers = inputs.clips.index.locate(request.frames)
    frames = zip(videos, numbers, request.flips.tolist(), student.flatten(0, 1), strict=True)
    for video, number, flip, found in frames:
        pixels = torch.from_numpy(dataset[video].read([number], SIZE))[0]
        assert torch.equal(found, pixels.flip(1) if flip else pixels)


def test_views_differ_in_colours_and_share_everything_else(dataset, monkeypatch):
    """With unchanged colours, both views are the same crops of the same frames."""
    config = AugmentConfig(crop_side=0.8)
    student, teacher, partner = batch(views(dataset, config), 2)
    assert student.shape == teacher.shape == (4, T, *SIZE, 3)
    differ = [(one.int() - other.int()).abs().max() > 10 for one, other in zip(student, teacher, strict=True)]
    assert sum(differ) >= 2  # a view may keep its colours
    monkeypatch.setattr(augment, "adjust", lambda clips, parameters, order: clips)
    geometry = batch(views(dataset, config), 2)
    assert torch.equal(geometry[0], geometry[1])
    assert torch.equal(geometry[2], partner)


def test_colours_are_drawn_once_for_each_view_of_a_clip(dataset, monkeypatch):
    seen, real = [], augment.adjust
    monkeypatch.setattr(augment, "adjust", lambda *arguments: seen.append(arguments) or real(*arguments))
    student, teacher, _ = batch(views(dataset), 3)
    (clips, one, first), (same, other, second) = seen
    assert clips is same
    assert len(one.brightness) == len(other.brightness) == 4
    assert not torch.equal(one.brightness, other.brightness)
    assert sorted(first) == sorted(second) == [0, 1, 2, 3]
    for view, parameters, order in ((student, one, first), (teacher, other, second)):
        for number, clip in enumerate(clips):
            for t in range(T):  # each frame by itself, with the parameters of its clip
                alone = augment.Photometry(*(part[number : number + 1] for part in parameters))
                assert torch.equal(view[number, t], real(clip[None, t : t + 1], alone, order)[0, 0])


def test_batch_is_a_function_of_its_step(dataset):
    config = AugmentConfig(crop_side=0.7)
    straight = list(views(dataset, config).batches(range(4)))
    assert equal(batch(views(dataset, config), 2), straight[2])
    for number in range(3):
        assert not torch.equal(straight[2][number], straight[3][number])


def test_rows_of_processes_join_to_the_batch(dataset):
    for squares in (False, True):
        config, size = AugmentConfig(crop_side=0.7), (32, 32)
        whole = batch(views(dataset, config, None, squares, size=size), 5)
        halves = [batch(views(dataset, config, Ranks(rank, 2), squares, size=size), 5) for rank in range(2)]
        assert equal([torch.cat(pair) for pair in zip(*halves, strict=True)], whole)


def test_crops_are_parts_of_larger_frames(dataset):
    config = AugmentConfig(photometric=False, crop_side=0.75)
    height, width = config.decoded_size(SIZE)
    assert (height, width) == (43, 64)  # 32 / 0.75, rounded up
    inputs = views(dataset, config)
    student, _, _ = batch(inputs, 4)
    whole = views(dataset, PLAIN, size=(height, width))
    frames = batch(whole, 4)[0]
    corners = crop_batch((height - SIZE[0], width - SIZE[1]), 4, 0, 4)
    for clip, cut, (top, left) in zip(frames, student, corners.tolist(), strict=True):
        assert torch.equal(cut, clip[:, top : top + SIZE[0], left : left + SIZE[1]])
    reached = torch.cat([crop_batch((2, 5), 8, 0, step) for step in range(40)])
    assert sorted(set(reached[:, 0].tolist())) == [0, 1, 2]
    assert sorted(set(reached[:, 1].tolist())) == list(range(6))


def test_partners_are_other_frames(dataset):
    clips = Clips(settings_of(dataset), 5)
    assert partners("previous", clips, 7).tolist() == 4 * [[4, 0, 1, 2, 3]]
    drawn = torch.cat([partners("random", clips, step) for step in range(50)])
    assert (drawn != torch.arange(5)).all()
    for frame in range(5):
        counts = drawn[:, frame].bincount(minlength=5)
        # 200 draws of one of four: a standard deviation of 6.
        assert all(25 < count < 75 for other, count in enumerate(counts.tolist()) if other != frame)
    assert torch.equal(partner_batch(4, 2, 0, 0), torch.tensor([[1, 0]]).repeat(4, 1))


def test_draws_have_streams_of_their_own():
    assert (Stream.PHOTOMETRIC, Stream.CROPS, Stream.PARTNERS) == (9, 10, 11)
    draws = (
        lambda *key: photometric_batch(5, 8, *key)[0],
        lambda *key: crop_batch((50, 50), 5, *key),
        lambda *key: partner_batch(9, 9, *key),
    )
    for draw in draws:
        first, second, third = (draw(*key).tolist() for key in ((0, 3), (0, 4), (1, 3)))
        assert first != second != third != first
        assert draw(0, 3).tolist() == first


def test_shapes_and_types_are_those_of_a_batch(dataset):
    inputs = views(dataset)
    tensors = batch(inputs, 0)
    assert [tuple(tensor.shape) for tensor in tensors] == inputs.shapes(4)
    assert [tensor.dtype for tensor in tensors] == inputs.dtypes()
    assert inputs.frames_per_sample == T


@contextmanager
def opened(dataset, run, **options):
    """The inputs of `SmallStage`."""
    data = DataConfig(frame_size=options.pop("size", SIZE), crop=options.pop("crop", "none"))
    config = replace(SmallStage.presets["demo"], run=run, data=data, backbone=BackboneConfig(), **options)
    context = Context(run, CPU, "fp32", data, config.backbone, load_backbone(config.backbone), run / "cache")
    stage = SmallStage()
    with stage.inputs(config, context, settings_of(dataset, flip=False)) as inputs:
        yield inputs, stage.describe(config, context)


def test_options_choose_what_it_trains_on(dataset, tmp_path):
    for options, kind in [
        ({}, ViewInputs),
        ({"train_backbone": False}, ViewInputs),
        ({"augment": PLAIN}, ViewInputs),
        ({"train_backbone": False, "augment": replace(PLAIN, crop_side=0.9)}, ViewInputs),
        ({"train_backbone": False, "augment": PLAIN}, FeatureViews),
        ({"train_backbone": False, "augment": PLAIN, "features": "streamed"}, FeatureViews),
    ]:
        with opened(dataset, tmp_path, **options) as (inputs, described):
            assert type(inputs) is kind
            tensors = batch(inputs, 0)
            assert [tuple(tensor.shape) for tensor in tensors] == inputs.shapes(4)
            assert [tensor.dtype for tensor in tensors] == inputs.dtypes()
            assert described == "clips of 3 frames, 2 apart, 2x3 tokens of width 192"


def test_features_are_those_of_the_pixels(dataset, tmp_path):
    backbone = load_backbone(BackboneConfig())
    with opened(dataset, tmp_path, train_backbone=False, augment=PLAIN, features="streamed") as (inputs, _):
        features = batch(inputs, 1)
    with opened(dataset, tmp_path, augment=PLAIN) as (inputs, _):
        pixels = batch(inputs, 1)
    torch.testing.assert_close(features[0].flatten(0, 1), backbone.features(pixels[0].flatten(0, 1)))
    assert torch.equal(features[1], pixels[2])


def test_pixels_are_neither_stored_nor_cached(dataset, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot be stored \(with --no-train-backbone.*use --features streamed"):  # noqa: SIM117
        with opened(dataset, tmp_path, features="stored"):
            pass
    with opened(dataset, tmp_path):  # auto streams
        assert not (tmp_path / "cache").exists()
    monkeypatch.setitem(METHODS, "test-views", Method("test-views", "views", "-", (SmallStage(),), dict))
    with pytest.raises(ValueError, match=r"cannot be stored.*there is nothing to compute beforehand"):
        cache(["--method", "test-views", "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("side", [0.0, -0.5, 1.1])
def test_a_side_out_of_range_is_refused(side):
    with pytest.raises(ValueError, match=re.escape(f"--crop-side must be more than 0 and at most 1, got {side}")):
        AugmentConfig(crop_side=side)
