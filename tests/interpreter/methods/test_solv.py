"""SOLV: the model against the published computation, its schedules, merging, and segmenting."""

import dataclasses
import doctest
import json

import pytest
import torch

from interpreter.configs import BackboneConfig, DataConfig
from interpreter.data import open_video
from interpreter.engine.schedule import learning_rate
from interpreter.evaluate import main as evaluate
from interpreter.methods.base import Context
from interpreter.methods.solv import SOLV, config
from interpreter.methods.solv.config import PRESETS, SolvModelConfig, SolvSettings, keeping_probability
from interpreter.methods.solv.model import Solv, places_of
from interpreter.models.backbones import load_backbone
from interpreter.models.linking import link_frames
from interpreter.train import main as train

from ..clips import Repeated
from ..runs import TWO_RANKS, curve, finish, start
from .solv_models import CONFIG, FEATURES, KEPT, PATCHES, batch, build, seeded

STAGE = SOLV.stages[0]


def test_plain_binding_knows_no_places():
    """With plain binding the loss does not depend on the order of the kept tokens."""
    model, (dropped, target, kept, present, merges) = build(binding="plain"), batch()
    shuffled = dropped[:, :, torch.randperm(KEPT, generator=seeded(0))]
    torch.testing.assert_close(model(shuffled, target, kept, present, merges)[0], model(*batch())[0])
    invariant = build()
    assert invariant(shuffled, target, kept, present, merges)[0] != invariant(*batch())[0]


def test_without_dropped_tokens_both_frame_indices_agree():
    inputs = batch(kept=PATCHES)
    losses = [build(frame_indices=which)(*inputs)[0] for which in ("centre", "published")]
    assert torch.equal(*losses)
    assert build(frame_indices="published")(*batch())[0] != build()(*batch())[0]


def test_absent_frames_change_nothing():
    model, (dropped, *rest) = build(), batch()
    other = dropped.clone()
    other[~rest[2]] = 7.0
    assert torch.equal(model(dropped, *rest)[0], model(other, *rest)[0])


def test_equal_slots_become_their_mean_and_their_attention_adds_up():
    model = build()
    slots = torch.eye(16, dtype=torch.float64)[[0, 0, 1, 2]][None].clone()
    slots[0, 1] *= 3
    attention = torch.rand(1, PATCHES, 4, dtype=torch.float64).softmax(-1)
    labels = model.labels(slots)
    assert labels.tolist() == [[0, 0, 1, 2]]
    merged = model.merged(slots, attention, model.places(), labels)
    assert merged.valid.tolist() == [[True, True, True, False]]
    assert torch.equal(merged.slots[0, 0], 2 * slots[0, 0])
    together = torch.cat([attention[..., :2].sum(-1, keepdim=True), attention[..., 2:]], -1)
    torch.testing.assert_close(merged.positions[:, :3], places_of(together, model.places())[0])


def test_merging_that_leaves_two_slots_is_cancelled():
    slots = torch.eye(16)[[0, 0, 1, 1]][None]
    assert build().labels(slots).tolist() == [[0, 1, 2, 3]]
    assert build(min_clusters=1).labels(slots).tolist() == [[0, 0, 1, 1]]
    assert build().labels(slots, num_clusters=2).tolist() == [[0, 0, 1, 1]]


def test_places_are_the_mean_and_deviation_of_the_tokens():
    places = build().places()
    uniform = torch.ones(1, PATCHES, 1, dtype=torch.float64)
    positions, scales = places_of(uniform, places)
    torch.testing.assert_close(positions, torch.zeros(1, 1, 2, dtype=torch.float64), atol=1e-7, rtol=0)
    expected = [((n + 1) / (3 * (n - 1))) ** 0.5 for n in (5, 4)]  # deviation of linspace(-1, 1, n): x, then y
    torch.testing.assert_close(scales.squeeze(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    one = torch.zeros(1, PATCHES, 1, dtype=torch.float64, requires_grad=True)
    one.data[0, 7] = 1
    positions, scales = places_of(one, places)
    torch.testing.assert_close(positions.squeeze(), places[7], atol=1e-6, rtol=0)
    assert torch.autograd.grad(scales.sum(), one)[0].isfinite().all()


def test_all_slots_and_their_updates_learn():
    """Gradients pass through all iterations. Clusters are constants; target and features get no gradient."""
    model, (dropped, target, *rest) = build(), batch()
    loss, _, _ = model(dropped, target, *rest)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().max() > 0) == (name != "decoder.to_alpha.bias"), name  # a part of every logit
    one = build(iterations=1)
    one.load_state_dict(model.state_dict())
    one(dropped, target, *rest)[0].backward()
    three, single = (m.slot_attention.gru.weight_hh.grad for m in (model, one))
    assert not torch.allclose(three, single)


def test_perfect_decoder_has_no_loss_and_zeros_have_that_of_the_target():
    model, (dropped, target, *rest) = build(), batch()
    for parameter in model.decoder.to_features.parameters():
        torch.nn.init.zeros_(parameter)
    assert model(dropped, target, *rest)[0].item() == pytest.approx(target.square().mean().item())
    constant = torch.randn(FEATURES, dtype=torch.float64)
    model.decoder.to_features.bias.data.copy_(constant)
    loss, _, _ = model(dropped, constant.expand_as(target), *rest)
    assert loss.item() == pytest.approx(0, abs=1e-20)


def test_dropout_uses_all_noise_and_none_is_needed_without_it():
    model, inputs = build(dropout=0.1), batch()
    assert STAGE.noise(build()) is None
    (count,) = STAGE.noise(model)
    noise = torch.randn(3, count, dtype=torch.float64, generator=seeded(3))
    losses = [model(*inputs, noise)[0], model(*inputs, noise.clone())[0], model(*inputs)[0]]
    assert losses[0] == losses[1] != losses[2]
    for wrong in (noise[:, :-1], torch.cat([noise, noise[:, :1]], 1)):
        with pytest.raises((RuntimeError, AssertionError)):
            model(*inputs, wrong)
    assert STAGE.noise(build(dropout=0.1, binding="plain"))[0] == 4 * model.temporal.noise_size()
    half = noise.clone()
    half[:, count // 2 :] = -9.0
    assert model(*inputs, half)[0] != losses[0]


def test_merging_begins_with_none_and_ends_with_all():
    values = [keeping_probability(step, 1800, 180) for step in range(1800)]
    assert values[0] == 1.0
    assert values[-1] == 0.0
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 180
    assert keeping_probability(0, 10, 1) == 0.0
    assert doctest.testmod(config).attempted == 1
    assert doctest.testmod(config).failed == 0


@pytest.mark.parametrize("name", ["ytvis19", "movi-e", "davis"])
def test_learning_rate_warms_up_and_falls_to_an_eighth(name):
    optim = PRESETS[name].optim
    rates = [learning_rate(step, optim) for step in (0, optim.steps // 20, optim.steps - 1)]
    assert rates == pytest.approx([1e-5 * optim.peak_lr, optim.peak_lr, optim.peak_lr / 8])


def test_published_presets_change_what_the_public_code_computes_differently():
    for name in ("ytvis19", "movi-e", "davis"):
        ours, theirs = PRESETS[name], PRESETS[f"{name}-published"]
        changed = {
            field.name
            for field in dataclasses.fields(SolvModelConfig)
            if getattr(ours.model, field.name) != getattr(theirs.model, field.name)
        }
        assert changed == {"frame_init", "learn_grid", "merge_attention", "frame_indices"}
        assert ours.optim == theirs.optim
        assert (ours.half_window, ours.token_drop, ours.token_drop_at) == (2, 0.5, "patches")
    assert PRESETS["ytvis19"].data.split == "train+valid+test"  # without the videos for evaluation
    assert PRESETS["ytvis19-published"].data.split == "all+valid+test"
    assert not PRESETS["davis"].model.merge
    assert PRESETS["davis-published"].init == PRESETS["ytvis19-published"].run
    assert (PRESETS["movi-e"].model.num_slots, PRESETS["ytvis19"].model.num_slots) == (18, 8)
    assert [PRESETS[name].merge_epochs for name in ("ytvis19", "movi-e", "davis")] == [180, 60, 300]


def segmenter_of(model_config, scenes, frames=3, size=None, **settings):
    backbone = load_backbone(BackboneConfig())
    context = Context(
        scenes, torch.device("cpu"), "fp32", DataConfig(frame_size=(64, 96)), BackboneConfig(), backbone, scenes
    )
    torch.manual_seed(0)
    model = Solv(model_config, backbone.dim, context.grid, frames)
    return STAGE.segmenter(PRESETS["demo"], model, context, SolvSettings(**settings), size), model


@pytest.mark.parametrize("options", [{}, {"input_positions": True, "learn_grid": True}, {"binding": "plain"}], ids=str)
def test_every_frame_is_the_centre_of_its_window(scenes, options):
    """40 frames, encoded in chunks of 32, get the same masks as in forward passes on single windows."""
    segmenter, model = segmenter_of(dataclasses.replace(CONFIG, merge_threshold=0.3, min_clusters=1, **options), scenes)
    video = Repeated(open_video(next(scenes.glob("JPEGImages/*/train-00000"))), 40)
    kept = []
    encoded = segmenter.encode(video, (0, 1), keep=kept.append)
    assert [len(chunk) for chunk in kept] == [32, 8]
    segmentation, features = segmenter.segment(encoded, 1), torch.cat(kept)
    everything = torch.arange(features.shape[1]).expand(1, 3, -1)
    ids, joined = segmentation.tensors["ids"], segmentation.masks()
    for centre in (0, 17, 32, 39):
        frames = torch.arange(centre - 1, centre + 2)
        present = ((frames >= 0) & (frames < 40))[None]
        window = features[frames.clamp(0, 39)][None] * present[..., None, None]
        with torch.no_grad():
            _, masks, valid = model(window, features[centre][None], everything, present, torch.tensor([True]))
        expected = torch.zeros_like(joined[centre])
        for slot in valid[0].nonzero().flatten().tolist():
            expected[:, ids[centre, slot]] += masks[0, :, slot]
        torch.testing.assert_close(joined[centre], expected, atol=3e-3, rtol=0)
    assert torch.equal(ids, link_frames(segmentation.tensors["slots"], ids >= 0))
    assert torch.equal(segmenter.segment(encoded, 0).masks(), joined)


def test_without_merging_a_slots_number_is_its_identity(scenes):
    segmenter, _ = segmenter_of(dataclasses.replace(CONFIG, merge=False), scenes)
    encoded = segmenter.encode(open_video(next(scenes.glob("JPEGImages/*/train-00000"))))
    segmentation = segmenter.segment(encoded)
    assert segmentation.across is None
    assert segmentation.num_segments == 4
    for setting in ({"num_slots": 2}, {"merge_threshold": 2.0}, {"merge": True, "merge_threshold": 2.0}):
        merged = segmenter.segment(encoded, **setting)
        assert merged.num_segments < 4 or "num_slots" not in setting
        assert merged.across is not None


def test_never_merging_keeps_all_slots_and_contradicts_a_threshold():
    model = build(merge=False)
    assert model(*batch())[2].all()
    assert STAGE.merge_schedule(PRESETS["davis"], None) is None
    for settings in ({"merge_threshold": 0.1}, {"num_slots": 3}):
        assert SolvSettings(**settings).merges
        with pytest.raises(ValueError, match="--merge False merges nothing"):
            SolvSettings(merge=False, **settings)


@pytest.mark.parametrize("options", [{}, {"binding": "plain"}], ids=str)
def test_gradients_of_the_last_iteration_reach_the_slots_start(options):
    model = build(implicit="bilevel", layer_init="lecun", **options)
    model(*batch())[0].backward()
    start = model.initial_slots if options else model.slot_attention.initial_slots
    assert (start.grad.abs().amax(1) > 0).all()
    default = build(**options)
    for name in ("to_q", "to_k") if not options else ():
        sharper, usual = (m.slot_attention.get_submodule(name).weight.std() for m in (model, default))
        assert (sharper / usual).item() == pytest.approx(3**0.5, rel=0.2)


def test_single_frames_without_temporal_binding_are_segmented_at_another_size(scenes):
    options = {"temporal_layers": 0, "learn_grid": True}
    segmenter, model = segmenter_of(dataclasses.replace(CONFIG, **options), scenes, frames=1, size=(96, 64))
    assert segmenter.grid != model.grid
    video = open_video(next(scenes.glob("JPEGImages/*/train-00000")))
    assert segmenter.segment(segmenter.encode(video)).masks().isfinite().all()


def test_one_frame_is_a_window_of_its_own(scenes):
    segmenter, _ = segmenter_of(CONFIG, scenes, frames=5)
    video = Repeated(open_video(next(scenes.glob("JPEGImages/*/train-00000"))), 1)
    assert segmenter.segment(segmenter.encode(video)).masks().shape[0] == 1


def test_preset_that_starts_from_another_run_names_the_command_that_trains_it(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a directory without runs/solv-ytvis19
    with pytest.raises(FileNotFoundError, match=r"no run directory at .*; make one with: .* --method solv --run"):
        train(["--method", "solv", "--preset", "davis", "--run", str(tmp_path / "run"), "--root", str(scenes)])


@pytest.mark.slow
def test_two_processes_train_as_one_and_a_run_is_swept(scenes, tmp_path):
    """Every step has the loss and gradient norm of a single process: each takes its rows of the batch's draws."""
    options = [
        "--method",
        "solv",
        "--frame-size",
        "64",
        "96",
        "--num-videos",
        "3",
        "--batch-size",
        "4",
        "--precision",
        "fp32",
        "--log-every",
        "1",
        "--sample-every",
        "1000",
        "--steps",
        "4",
        "--warmup-steps",
        "1",
        "--merge-epochs",
        "2",
    ]
    options += ["--root", str(scenes), "--cache", str(tmp_path / "cache")]
    runs = [tmp_path / name for name in ("alone", "together")]
    train(["--run", str(runs[0]), *options])
    finish(start(["--run", str(runs[1]), *options], TWO_RANKS))
    alone, together = (curve(run, "model") for run in runs)
    for key in ("loss", "grad_norm", "slots_left"):
        assert [r[key] for r in together] == pytest.approx([r[key] for r in alone], rel=1e-4), key
    sweeps = ["--sweep-merge", "0.05", "0.3", "--sweep-slots", "3"]
    limits = ["--num-videos", "2", "--clip-frames", "9", "--seeds", "0", "--baselines", "--pictures", "0"]
    protocols = ["--protocol", "solv", "solv-published", "interpreter"]
    out = ["--out", str(tmp_path / "scores")]
    evaluate(["--run", str(runs[0]), "--root", str(scenes), *sweeps, *limits, *protocols, *out])
    report = json.loads((tmp_path / "scores" / "scores.json").read_text())
    methods = {part["method"] for part in report["results"]}
    assert methods == {"solv", "solv, merge 0.05", "solv, merge 0.3", "solv, 3 slots"}
