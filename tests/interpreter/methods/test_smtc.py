"""SMTC: gradients of the two stages, teacher, presets, training and segmenting."""

import dataclasses
import doctest
import json

import numpy as np
import pytest
import torch
from slotkernels.slot_attention.reference import textbook_slot_attention

from interpreter.configs import BackboneConfig, DataConfig
from interpreter.data import open_video
from interpreter.engine.checkpoint import load_checkpoint
from interpreter.engine.randomness import torch_generator
from interpreter.engine.schedule import learning_rate
from interpreter.evaluate import main as evaluate
from interpreter.methods.base import Context
from interpreter.methods.smtc import SMTC, segmenter
from interpreter.methods.smtc.config import PRESETS, SmtcModelConfig, SmtcSettings
from interpreter.methods.smtc.model import Smtc
from interpreter.methods.smtc.segmenter import largest_tracks, link_instances
from interpreter.models.backbones import load_backbone
from interpreter.train import main as train

from ..clips import Repeated
from ..models.small_vits import save_vit
from ..runs import TWO_RANKS, curve, finish, start
from .smtc_models import FEATURES, GRID, INSTANCES, PATCHES, SEMANTICS, batch, build, seeded

STAGE = SMTC.stages[0]


def group(model, rows=4, seed=5, noise=None):
    """The student's result on random features."""
    features, partners = (
        torch.randn(rows, PATCHES, FEATURES, dtype=torch.float64, generator=seeded(seed + i)) for i in range(2)
    )
    shape = (rows, SEMANTICS, INSTANCES, FEATURES)
    noise = torch.randn(shape, dtype=torch.float64, generator=seeded(seed + 2)) if noise is None else noise
    return model.student.group(features, partners, noise)


@pytest.mark.parametrize("loss", ["semantic", "regulariser", "instance"])
def test_deviations_get_no_gradient_unless_draws_are_reparameterised(loss):
    only = {f"{name}_weight": float(name == loss) for name in ("semantic", "regulariser", "instance")}
    gradients = {}
    for sampling in ("none", "reparameterised"):
        model = build(loss=only, sampling_gradient=sampling)
        model(*batch())[0].backward()
        gradients[sampling] = model.student.mu.grad, model.student.log_sigma.grad
    mu, sigma = gradients["none"]
    assert torch.equal(sigma, torch.zeros_like(sigma))
    if loss == "instance":  # without gradients of the draws, no gradient reaches the means
        assert torch.equal(mu, torch.zeros_like(mu))
        assert all((gradient != 0).any() for gradient in gradients["reparameterised"])
    else:  # only the semantic stage gives the means a gradient; the deviations get none
        assert (mu != 0).any()
        torch.testing.assert_close(gradients["reparameterised"][0], mu)
        assert torch.equal(gradients["reparameterised"][1], torch.zeros_like(sigma))


def test_gradient_of_the_means_is_that_of_one_iteration_from_the_fixed_point():
    one, three = build(iterations=1), build(iterations=3)
    one.load_state_dict(three.state_dict())
    with torch.no_grad():
        reached = group(build(iterations=2)).semantics  # the same weights: those of the same seed
    found = group(three)
    found.masks.square().sum().backward()

    features, partners = (
        torch.randn(4, PATCHES, FEATURES, dtype=torch.float64, generator=seeded(5 + i)) for i in range(2)
    )
    student = one.student
    tokens = features + student.correlation(features, partners)
    initial = reached.clone().requires_grad_()
    prepared = student.slot_attention.prepare(tokens)
    student.slot_attention(prepared, initial).attention.square().sum().backward()
    torch.testing.assert_close(three.student.mu.grad, initial.grad.sum(0))


def test_one_instance_that_sees_all_patches_takes_their_mean():
    """Its softmax has one element: the weights are uniform, and the semantic's mask does not select among them."""
    model = build(mask_threshold=-1.0)
    noise = torch.randn(4, SEMANTICS, 1, FEATURES, dtype=torch.float64, generator=seeded(9))
    found = group(model, noise=noise)
    assert torch.equal(found.shares, torch.ones_like(found.shares))
    start = model.student.draw(noise)
    features, partners = (
        torch.randn(4, PATCHES, FEATURES, dtype=torch.float64, generator=seeded(5 + i)) for i in range(2)
    )
    tokens = features + model.student.correlation(features, partners)
    for semantic in range(SEMANTICS):
        expected, _ = textbook_slot_attention(model.student.slot_attention, tokens, start[:, semantic])
        torch.testing.assert_close(found.instances[:, semantic], expected)


def test_instances_of_a_semantic_do_not_depend_on_those_of_others():
    model = build()
    noise = torch.randn(4, SEMANTICS, INSTANCES, FEATURES, dtype=torch.float64, generator=seeded(9))
    other = noise.clone()
    other[:, 1:] = 3.0
    one, changed = group(model, noise=noise), group(model, noise=other)
    assert torch.equal(one.instances[:, 0], changed.instances[:, 0])
    assert not torch.equal(one.instances[:, 1], changed.instances[:, 1])
    assert torch.equal(one.semantics, changed.semantics)


def test_semantic_without_patches_moves_by_its_mlp_alone():
    model = build(mask_threshold=2.0)  # no probability is above it
    noise = torch.randn(4, SEMANTICS, INSTANCES, FEATURES, dtype=torch.float64, generator=seeded(9))
    slots = model.student.draw(noise)
    attend = model.student.slot_attention
    for _ in range(attend.iterations):
        slots = slots + attend.mlp(attend.norm_mlp(slots))
    torch.testing.assert_close(group(model, noise=noise).instances, slots)


@pytest.mark.parametrize(("momentum", "moved"), [(0.0, 1.0), (0.75, 0.25), (1.0, 0.0)])
def test_teacher_moves_towards_the_student_and_gets_no_gradient(momentum, moved):
    model = build()
    model.config = dataclasses.replace(
        model.config, teacher=dataclasses.replace(model.config.teacher, momentum=momentum)
    )
    before = [parameter.clone() for parameter in model.teacher.parameters()]
    model(*batch())[0].backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    STAGE.after_step(model)
    for old, new, student in zip(before, model.teacher.parameters(), model.student.parameters(), strict=True):
        torch.testing.assert_close(new.data, old + moved * (student.data - old))


def test_model_applies_to_other_grids():
    model = build()
    features, partners = (torch.randn(2, 30 * 50, FEATURES, dtype=torch.float64, generator=seeded(i)) for i in range(2))
    noise = torch.randn(2, SEMANTICS, INSTANCES, FEATURES, dtype=torch.float64, generator=seeded(2))
    found = model.student.group(features, partners, noise, (30, 50), iterations=5)
    assert found.masks.shape == (2, 1500, SEMANTICS)
    torch.testing.assert_close(found.masks.sum(-1), torch.ones(2, 1500, dtype=torch.float64))
    assert found.instances.isfinite().all()


def test_published_preset_changes_what_the_public_code_computes_differently():
    ours, theirs = PRESETS["ytvos"], PRESETS["ytvos-published"]
    assert theirs.model == dataclasses.replace(ours.model, mask_on="logits")
    assert theirs.loss == dataclasses.replace(ours.loss, marginals="norm", same_frame=True)
    assert (ours.teacher.ema_encoder, theirs.teacher.ema_encoder) == (True, False)
    assert (ours.decay_gaussians, theirs.decay_gaussians) == (False, True)
    assert (ours.optim.flip, theirs.optim.flip) == (True, False)
    assert ours.augment.crop_side < theirs.augment.crop_side == 1.0
    assert (ours.model.num_semantics, ours.model.num_instances, ours.num_frames, ours.stride) == (16, 4, 4, 4)
    rates = [learning_rate(step, ours.optim) for step in (0, ours.optim.steps - 1)]
    assert rates == pytest.approx([2e-5, 2e-6])


def test_parameters_are_grouped_by_rate_start_and_decay():
    for name, decaying in (("demo", False), ("ytvos-published", True)):
        config = dataclasses.replace(PRESETS[name], train_backbone=False)
        model = Smtc(config, FEATURES, GRID)
        groups = STAGE.parameter_groups(model)
        names = {id(parameter): name for name, parameter in model.student.named_parameters()}
        decays = {
            names[id(parameter)]: group.get("weight_decay") is None for group in groups for parameter in group["params"]
        }
        assert decays.keys() == set(names.values())
        assert decays["mu"] == decays["log_sigma"] == decaying
        assert decays["slot_attention.to_q.weight"]
        assert not decays["slot_attention.to_q.bias"]


def test_too_many_instances_and_a_width_that_does_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"--num-instances must be at most 5, got 6: .* raise --num-semantics"):
        dataclasses.replace(PRESETS["demo"], model=SmtcModelConfig(num_instances=6))
    with pytest.raises(ValueError, match=r"--dim 8 differs from the width 12 .* use --project-features"):
        build(dim=8)


def test_stochastic_depth_needs_a_transformer(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"EfficientNetLite0 is no vision transformer.* use --drop-path 0"):
        train(["--method", "smtc", "--run", str(tmp_path / "run"), "--root", str(scenes), "--train-backbone"])


def test_links_of_instances_are_chains_of_matches():
    assert doctest.testmod(segmenter).attempted > 0
    assert doctest.testmod(segmenter).failed == 0
    order = torch.stack([torch.randperm(4, generator=seeded(i)) for i in range(12)]).view(6, 2, 4)
    instances = torch.eye(4)[order]
    expected = torch.zeros(6, 2, 4, dtype=torch.long)
    for semantic in range(2):  # each instance is recognised by its direction
        ids = order[0, semantic].argsort()
        expected[:, semantic] = ids[order[:, semantic]]
    assert torch.equal(link_instances(instances), expected)


def test_largest_tracks_are_kept_and_the_rest_is_background():
    attention = torch.tensor([[[0.5, 0.1, 0.25, 0.15]], [[0.1, 0.5, 0.2, 0.2]]])  # two frames of one patch
    ids = torch.tensor([[[0, 1], [0, 1]], [[1, 0], [0, 1]]])
    valid = torch.ones(2, 2, 2, dtype=torch.bool)
    assert largest_tracks(attention, valid, ids, 2).tolist() == [[1, 0, 2, 0], [0, 1, 2, 0]]
    assert largest_tracks(attention, valid, ids, 9).tolist() == [[1, 2, 3, 4], [2, 1, 3, 4]]
    valid[1, 0, 1] = False
    assert largest_tracks(attention, valid, ids, 1).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert largest_tracks(attention, torch.zeros_like(valid), ids, 2).max() == 0


def opened(scenes, size=None, mask_threshold=0.3, **settings):
    """A segmenter of random weights, at the frame size of the training or another."""
    backbone = load_backbone(BackboneConfig())
    data = DataConfig(frame_size=(64, 96))
    context = Context(scenes, torch.device("cpu"), "fp32", data, BackboneConfig(), backbone, scenes)
    torch.manual_seed(0)
    demo = PRESETS["demo"]
    config = dataclasses.replace(demo, data=data, model=dataclasses.replace(demo.model, mask_threshold=mask_threshold))
    model = STAGE.build(config, context)
    return STAGE.segmenter(config, model, context, SmtcSettings(**settings), size), model


def test_frames_are_correlated_with_those_before_them_across_chunks(scenes):
    """40 frames, encoded in chunks of 32, get the same masks as in one pass."""
    segmenter, model = opened(scenes, area_threshold=0.0, similarity_threshold=-1.0)
    video, kept = Repeated(open_video(next(scenes.glob("JPEGImages/*/train-00000"))), 40), []
    encoded = segmenter.encode(video, (0, 1), keep=kept.append)
    assert [len(chunk) for chunk in kept] == [32, 8]
    features = torch.cat(kept)
    partners = features[[1, *range(39)]]
    segmentation = segmenter.segment(encoded, 1)
    semantics, masks, instances, shares = encoded.by_seed[1]
    model_config = model.config.model
    shape = (1, model_config.num_semantics, model_config.num_instances, model.student.dim)
    noise = torch.randn(shape, generator=torch_generator(segmenter.device, 1))
    with torch.no_grad():
        found = model.student.group(features, partners, noise.expand(40, -1, -1, -1))
    for one, other in ((masks, found.masks), (shares, found.shares)):
        torch.testing.assert_close(one.float(), other, atol=1e-3, rtol=0)
    torch.testing.assert_close(semantics, found.semantics, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(instances, found.instances, atol=1e-4, rtol=1e-4)
    joined = segmentation.masks()
    torch.testing.assert_close(joined.sum(-1), torch.ones(40, joined.shape[1]), atol=2e-3, rtol=0)
    assert segmentation.num_segments <= 21
    assert not torch.equal(segmenter.segment(encoded, 0).masks(), joined)  # another draw of the instances


def test_union_is_the_complement_of_what_no_valid_instance_has(scenes):
    settings = {"area_threshold": 0.3, "similarity_threshold": 0.0}
    segmenter, _ = opened(scenes, mask_threshold=0.125, segments="union", **settings)
    encoded = segmenter.encode(open_video(next(scenes.glob("JPEGImages/*/train-00000"))))
    union = segmenter.segment(encoded)
    tracks = segmenter.segment(encoded, segments="tracks", max_tracks=24)
    torch.testing.assert_close(union.masks()[..., 0], tracks.masks()[..., 0], atol=2e-3, rtol=0)
    valid = union.tensors["valid"]
    assert valid.any()
    assert not valid.all()
    assert union.num_segments == 2
    with pytest.raises(ValueError, match="iterations cannot be swept"):
        segmenter.segment(encoded, inference_iterations=5)


def test_one_frame_and_another_size_are_segmented(scenes):
    segmenter, _ = opened(scenes, size=(96, 64), inference_iterations=5)
    video = Repeated(open_video(next(scenes.glob("JPEGImages/*/train-00000"))), 1)
    assert segmenter.segment(segmenter.encode(video)).masks().isfinite().all()


OPTIONS = ["--method", "smtc", "--frame-size", "64", "96", "--num-videos", "3", "--batch-size", "4"]
OPTIONS += ["--precision", "fp32", "--log-every", "1", "--sample-every", "1000", "--steps", "4", "--warmup-steps", "1"]


@pytest.mark.slow
def test_two_processes_train_as_one_and_a_run_is_evaluated(scenes, tmp_path):
    """Every step has the loss and gradient norm of a single process: instances are averaged over the whole batch."""
    options = [*OPTIONS, "--root", str(scenes), "--cache", str(tmp_path / "cache")]
    runs = [tmp_path / name for name in ("alone", "together")]
    train(["--run", str(runs[0]), *options])
    finish(start(["--run", str(runs[1]), *options], TWO_RANKS))
    alone, together = (curve(run, "model") for run in runs)
    for key in ("loss", "grad_norm", "semantic", "overlap"):
        assert [r[key] for r in together] == pytest.approx([r[key] for r in alone], rel=1e-4), key
    for segments in ("tracks", "union"):
        out = tmp_path / segments
        limits = ["--num-videos", "2", "--seeds", "0", "--baselines", "--pictures", "0", "--out", str(out)]
        protocols = ["--protocol", "smtc" if segments == "union" else "smtc-multi-object"]
        evaluate(["--run", str(runs[0]), "--root", str(scenes), *limits, *protocols, "--segments", segments])
        (result,) = json.loads((out / "scores.json").read_text())["results"]
        assert result["method"] == "smtc"


@pytest.mark.slow
def test_trained_backbone_starts_late_and_resumes_bit_for_bit(scenes, tmp_path):
    """A ViT with keys, augmented views and stochastic depth: it is frozen for two steps, and the teacher follows it."""
    save_vit("ViT", tmp_path / "vit")
    run, steps = tmp_path / "run", ["--encoder-start", "2", "--encoder-lr", "1", "--momentum", "0.5"]
    options = [*OPTIONS, "--root", str(scenes), "--backbone", str(tmp_path / "vit"), "--output", "keys"]
    views = ["--train-backbone", "--photometric", "--crop-side", "0.8", "--features", "auto", "--checkpoint-every", "1"]
    sizes = ["--num-frames", "2", "--num-semantics", "3", "--num-instances", "2", "--drop-path", "0.2"]
    command = ["--run", str(run), *options, *views, *steps, *sizes]
    weights = []
    for count in ("2", "4"):
        train([*command, "--steps", count])
        weights.append(newest_weights(run))
    fresh = load_backbone(BackboneConfig(backbone=str(tmp_path / "vit"), output="keys")).state_dict()
    name = next(key for key in fresh if key.endswith("attention.q_proj.weight"))
    for branch in ("student", "teacher"):
        assert torch.equal(weights[0][f"{branch}.encoder.{name}"], fresh[name])
        assert not torch.equal(weights[1][f"{branch}.encoder.{name}"], fresh[name])
    assert all(np.isfinite(record["loss"]) for record in curve(run, "model"))
    (run / "model" / "checkpoint-00000004.safetensors").unlink()
    train([*command, "--steps", "4"])
    again = newest_weights(run)
    assert again.keys() == weights[1].keys()
    assert all(torch.equal(again[key], weights[1][key]) for key in again)


def newest_weights(run):
    return load_checkpoint(run / "model").weights
