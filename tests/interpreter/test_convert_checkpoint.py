"""Published checkpoints become runs with the results of the public code."""

import json
import pathlib
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from interpreter import convert_checkpoint, evaluate, segment, segment_video
from interpreter.commands import run_command
from interpreter.data import open_video
from interpreter.engine.checkpoint import load_checkpoint, newest_step
from interpreter.engine.run import read_config, to_dict, unfinished
from interpreter.methods import METHODS
from interpreter.methods.runs import load_trained

from .clips import make_clip, read_annotations
from .published_video_models import BACKBONE, PUBLISHED, forward, random_state, small

LAYOUTS = pytest.mark.parametrize("layout", PUBLISHED)
CPU = torch.device("cpu")


def save_vit(folder, sizes):
    """A random ViT of Hugging Face with the published patch size; its final norm is far from the identity."""
    import transformers

    kind = "Dinov2" if sizes.dinov2 else "ViT"
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=sizes.channels,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        patch_size=sizes.patch,
        image_size=3 * sizes.patch,
        initializer_range=0.3,
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        model.layernorm.weight.add_(3)
    model.save_pretrained(folder)
    return model


def arguments(path, sizes, out, *more):
    slots = ["--num-slots", str(sizes.slots)] * (sizes.method == "videosaur")
    return [str(each) for each in (path, "--method", sizes.method, "--out", out, *slots, *more)]


@pytest.fixture
def converted(tmp_path):
    """converted(sizes, *options, **changed) -> the run made of a random checkpoint, and its published tensors."""

    def make(sizes, *options, without=(), **changed):
        state = random_state(sizes) | changed
        state = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(without))}
        path, out = tmp_path / "model.ckpt", tmp_path / "runs" / "run"
        torch.save({"state_dict": state, "epoch": 3, "global_step": 12}, path)
        convert_checkpoint.main(arguments(path, sizes, out, *options))
        return out, state

    return make


@pytest.fixture
def small_run(converted, tmp_path):
    """small_run(layout) -> a run with small widths and its own ViT, its published tensors, sizes and the ViT."""

    def make(layout):
        sizes = small(PUBLISHED[layout])
        vit = save_vit(tmp_path / "vit", sizes)
        return *converted(sizes, "--backbone", tmp_path / "vit"), sizes, vit

    return make


def fail(words, capsys):
    """Run the command, which must fail with one line and leave no run; returns the line."""
    out = pathlib.Path(words[words.index("--out") + 1])
    before = out.exists() and sorted(out.rglob("*"))
    with pytest.raises(SystemExit) as left:
        run_command(lambda: convert_checkpoint.main(words))
    assert left.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert (out.exists() and sorted(out.rglob("*"))) == before
    return lines[0]


def assert_same(ours, theirs, what):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda text: f"{what}: {text}")


@LAYOUTS
def test_run_computes_what_the_public_code_does(small_run, layout):
    run, state, sizes, _ = small_run(layout)
    _, trained = load_trained(METHODS[sizes.method], run, "model", CPU)
    model = trained.model.double()
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(4, sizes.patches, sizes.channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(sizes.slots, sizes.dim, generator=generator, dtype=torch.float64)
    expected = forward({name: tensor.double() for name, tensor in state.items()}, features, noise)
    drawn = (noise[None],) if sizes.method == "videosaur" else ()
    slots = model.find_slots(features[None], model.initial(1, *drawn)).slots[0]
    assert_same(slots, expected.slots, "slots")
    output, masks = model.decoder(slots)
    assert_same(masks, expected.masks, "masks of the decoder")
    assert_same(model.masks(slots), expected.masks, "masks")
    assert_same(output, expected.output, "output of the decoder")


@LAYOUTS
@pytest.mark.parametrize("without", [(), (BACKBONE,)], ids=["with backbone", "without backbone"])
def test_sizes_choose_preset_backbone_and_frames(converted, layout, without, capsys):
    sizes, preset = PUBLISHED[layout], layout.split()[1].replace("ytvis", "ytvis21")
    run, state = converted(sizes, without=without)
    stage = METHODS[sizes.method].stages[0]
    expected = stage.presets[f"{preset}-published"]
    expected = replace(expected, run=run, optim=replace(expected.optim, precision="fp32"))
    stored = read_config(run)
    assert stored.options("model", stage.config) == expected
    assert (stored.method, list(stored.stages), stored.trained_on) == (sizes.method, ["model"], {})
    assert newest_step(run / "model") == expected.optim.steps
    assert unfinished(run, "model", stored) is None
    weights = load_checkpoint(run / "model").weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    theirs = sum(tensor.numel() for name, tensor in state.items() if not name.startswith(BACKBONE))
    assert sum(tensor.numel() for tensor in weights.values()) == theirs
    printed = capsys.readouterr().out
    assert f"{sizes.method} with {sizes.slots} slots of width {sizes.dim}" in printed
    assert ("tensors of the backbone, which is loaded by its name" in printed) == (not without)
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_own_copy_of_the_backbone_keeps_the_preset(converted, tmp_path):
    sizes, stage = PUBLISHED["slot-contrast ytvis"], METHODS["slot-contrast"].stages[0]
    save_vit(tmp_path / "copy", sizes)
    run, _ = converted(sizes, "--backbone", tmp_path / "copy")
    expected = stage.presets["ytvis21-published"]
    expected = replace(
        expected,
        run=run,
        backbone=replace(expected.backbone, backbone=str(tmp_path / "copy")),
        optim=replace(expected.optim, precision="fp32"),
    )
    assert read_config(run).options("model", stage.config) == expected


@pytest.mark.parametrize("layout", ["slot-contrast movi-c", "videosaur ytvis"])
def test_clip_is_segmented_with_features_before_the_norm(small_run, tmp_path, layout, capsys):
    run, state, sizes, vit = small_run(layout)
    clip, side = make_clip(tmp_path / "clip.mp4", frames=5), 3 * sizes.patch
    assert segment.main([str(each) for each in (clip, "--run", run, "--out", tmp_path / "out")]) == 0
    assert "unfinished" not in capsys.readouterr().err
    segmentation = segment_video(clip, run).segmentation
    pixels = torch.from_numpy(np.stack(list(open_video(clip).frames((side, side))))).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        features = vit(pixel_values=(pixels - mean) / std, output_hidden_states=True).hidden_states[-1][:, 1:]
    if sizes.method == "slot-contrast":
        expected = forward(state, features)
        torch.testing.assert_close(segmentation.masks(), expected.masks, rtol=0, atol=2e-3)
        torch.testing.assert_close(segmentation.tensors["slots"], expected.slots, rtol=1e-2, atol=1e-3)
    assert segmentation.num_segments == sizes.slots
    assert read_annotations(tmp_path / "out", "clip").shape == (5, 48, 64)


def test_run_is_evaluated(small_run, scenes, capsys):
    run, *_ = small_run("videosaur ytvis-dinov2")
    options = ["--run", run, "--root", scenes, "--split", "val", "--num-videos", "2", "--protocol", "slot-contrast"]
    assert evaluate.main([str(each) for each in options]) == 0
    assert "videosaur" in capsys.readouterr().out


def test_all_kinds_of_files_hold_the_same_weights(tmp_path):
    sizes = PUBLISHED["videosaur ytvis"]
    state = random_state(sizes)
    torch.save(state, tmp_path / "a.pth")
    torch.save({"state_dict": state, "optimizer_states": [{"state": {0: {"step": 3}}}]}, tmp_path / "b.ckpt")
    save_file(state, tmp_path / "c.safetensors")
    torch.save({name: tensor.double() for name, tensor in state.items()}, tmp_path / "d.pt")
    weights = []
    for name in ("a.pth", "b.ckpt", "c.safetensors", "d.pt"):
        convert_checkpoint.main(arguments(tmp_path / name, sizes, tmp_path / "runs" / name))
        weights.append(load_checkpoint(tmp_path / "runs" / name / "model").weights)
    for others in weights[1:]:
        torch.testing.assert_close(others, weights[0], rtol=0, atol=0)


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_objects_are_not_unpickled_and_the_remedy_works(tmp_path, capsys):
    sizes = PUBLISHED["videosaur ytvis"]
    path, trace = tmp_path / "model.ckpt", tmp_path / "trace"
    torch.save({"state_dict": random_state(sizes), "hyper_parameters": Marker(trace)}, path)
    line = fail(arguments(path, sizes, tmp_path / "run"), capsys)
    assert "holds objects besides tensors, whose loading can run code" in line
    assert not trace.exists()
    command = re.search(r'python (-c "[^"]*")', line)[1]
    subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, check=True)
    assert trace.exists()
    assert convert_checkpoint.main(arguments(tmp_path / "tensors.pt", sizes, tmp_path / "run")) == 0


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.ckpt", b"not a checkpoint", "is damaged, or holds objects"),
        ("a.pth", b"", "is not a readable checkpoint"),
        ("a.pt", b"PK\x03\x04 cut off", "is not a readable checkpoint"),
        ("a.safetensors", b"\x10\0\0\0", "is not a readable checkpoint"),
        ("a.ckpt", [torch.zeros(2)], "holds no named tensors"),
        ("a.ckpt", {"state_dict": {"steps": 3}}, "holds no named tensors"),
        ("a.ckpt", {"epoch": 3}, "holds no named tensors"),
        ("a.ckpt", {3: torch.zeros(2)}, "holds no named tensors"),
        ("a.ckpt", {}, "not a published checkpoint of slot-contrast: "),
        ("a.ckpt", None, "no checkpoint at"),
    ],
)
def test_unreadable_files_are_named(tmp_path, capsys, name, content, reason):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    line = fail(arguments(path, PUBLISHED["slot-contrast ytvis"], tmp_path / "run"), capsys)
    assert reason in line
    assert str(path) in line or content == {}


def wrong(change, tmp_path, capsys, layout="videosaur ytvis", *more):
    """The message about a checkpoint after ``change`` has modified it in place."""
    sizes = PUBLISHED[layout]
    state = random_state(sizes)
    change(state)
    torch.save(state, tmp_path / "model.pth")
    return fail(arguments(tmp_path / "model.pth", sizes, tmp_path / "run", *more), capsys)


def test_missing_and_unexpected_names_are_listed(tmp_path, capsys):
    def change(state):
        del state["decoder.module.norm_q.bias"], state["decoder.module.allocator.blocks.1.norm1.weight"]
        state |= {"processor.module.predictor.blocks.1.norm1.weight": torch.ones(64), "extra": torch.ones(1)}

    line = wrong(change, tmp_path, capsys)
    assert "not a published checkpoint of videosaur: 2 missing (" in line
    assert "decoder.module.norm_q.bias" in line
    assert "decoder.module.allocator.blocks.1.norm1.weight" in line
    assert "2 unexpected (processor.module.predictor.blocks.1.norm1.weight, extra)" in line


@pytest.mark.parametrize(
    ("method", "layout"), [("videosaur", "slot-contrast ytvis"), ("slot-contrast", "videosaur ytvis")]
)
def test_checkpoint_of_the_other_method_is_refused(tmp_path, capsys, method, layout):
    torch.save(random_state(PUBLISHED[layout]), tmp_path / "model.pth")
    line = fail([str(tmp_path / "model.pth"), "--method", method, "--out", str(tmp_path / "run")], capsys)
    assert f"not a published checkpoint of {method}: " in line
    assert re.search(r"\d+ missing \(.*\); \d+ unexpected \(initializer\.", line)
    assert len(re.findall(r" and \d+ more\)", line)) == 1  # one of the two lists is longer than the printed part


def test_wrong_shapes_are_listed(tmp_path, capsys):
    def change(state):
        state["processor.module.predictor.blocks.0.self_attn.qkv.weight"] = torch.zeros(190, 64)
        state["decoder.module.output_transform.bias"] = torch.zeros(963)
        state["initializer.mean"] = torch.zeros(1, 7, 64)

    line = wrong(change, tmp_path, capsys)
    assert "3 of the wrong shape (" in line
    assert "processor.module.predictor.blocks.0.self_attn.qkv.weight is [190, 64] instead of [192, 64]" in line
    assert "decoder.module.output_transform.bias is [963] instead of [964]" in line
    assert "initializer.mean is [1, 7, 64] instead of [1, 1, 64]" in line


@pytest.mark.parametrize("layout", ["slot-contrast ytvis", "videosaur movi-c", "videosaur ytvis"])
def test_every_tensor_is_needed_and_has_one_shape(layout):
    sizes = PUBLISHED[layout]._replace(channels=384, dim=8, hidden=10, patch=14, patches=4)
    options = convert_checkpoint.Converting(
        checkpoint=pathlib.Path("-"),
        method=sizes.method,
        out=pathlib.Path("-"),
        num_slots=sizes.slots if sizes.method == "videosaur" else None,
    )
    state = random_state(sizes)
    convert_checkpoint.convert(options, state)
    for name, tensor in state.items():
        if name.startswith(BACKBONE):
            continue
        with pytest.raises(ValueError, match=rf"1 missing \({re.escape(name)}\)|\d unexpected"):
            convert_checkpoint.convert(options, {key: value for key, value in state.items() if key != name})
        for changed in (tensor.sum(), tensor[None], tensor[..., :-1], torch.cat([tensor, tensor])):
            with pytest.raises(
                ValueError,
                match=r"of the wrong shape|expected \d axes|do not have the|unknown backbone with features of",
            ):
                convert_checkpoint.convert(options, {**state, name: changed})


def test_tensor_of_another_rank_is_named(tmp_path, capsys):
    def change(state):
        state["decoder.module.pos_emb"] = state["decoder.module.pos_emb"][0]

    assert "decoder.module.pos_emb of the checkpoint is [196, 64]; expected 3 axes" in wrong(change, tmp_path, capsys)


def test_number_of_slots_is_asked_for_where_the_file_has_none(tmp_path, capsys):
    for layout, more, reason in (
        ("videosaur movi-c", [], "does not contain its number of slots"),
        ("slot-contrast movi-c", ["--num-slots", "11"], "omit --num-slots"),
        ("videosaur movi-c", ["--num-slots", "0"], "--num-slots must be at least 1"),
    ):
        torch.save(random_state(PUBLISHED[layout]), tmp_path / "model.pth")
        method = PUBLISHED[layout].method
        words = [str(tmp_path / "model.pth"), "--method", method, "--out", str(tmp_path / "run"), *more]
        assert reason in fail(words, capsys)


def test_backbone_and_frames_have_to_fit(tmp_path, capsys):
    sizes = PUBLISHED["videosaur ytvis"]
    save_vit(tmp_path / "narrow", sizes._replace(channels=12))
    line = wrong(lambda state: None, tmp_path, capsys, "videosaur ytvis", "--backbone", tmp_path / "narrow")
    assert "has features of width 12 and patches of 16 pixels; the checkpoint was trained on width 768" in line
    save_vit(tmp_path / "fine", sizes._replace(patch=8))
    line = wrong(lambda state: None, tmp_path, capsys, "videosaur ytvis", "--backbone", tmp_path / "fine")
    assert "patches of 8 pixels; the checkpoint was trained on width 768 and patches of 16 pixels" in line
    line = wrong(lambda state: None, tmp_path, capsys, "videosaur ytvis", "--frame-size", "224", "240")
    assert "frames of 224x240 do not have the 196 patches of 16x16 pixels" in line
    line = wrong(lambda state: None, tmp_path, capsys, "videosaur ytvis", "--frame-size", "225", "224")
    assert "frames of 225x224 do not have the 196 patches" in line


def test_oblong_frames_are_named_by_the_user(converted, tmp_path, capsys):
    sizes = PUBLISHED["slot-contrast ytvis"]._replace(patches=24)
    torch.save(random_state(sizes), tmp_path / "model.pth")
    assert "with --frame-size" in fail(arguments(tmp_path / "model.pth", sizes, tmp_path / "run"), capsys)
    run, _ = converted(sizes, "--frame-size", "56", "84")
    stored = read_config(run).stages["model"]
    assert (stored["data"]["frame_size"], stored["model"]["logit_scale"]) == ([56, 84], "published")


def test_unknown_backbone_is_asked_for(tmp_path, capsys):
    sizes = PUBLISHED["slot-contrast ytvis"]._replace(channels=1000)
    torch.save(random_state(sizes), tmp_path / "model.pth")
    line = fail(arguments(tmp_path / "model.pth", sizes, tmp_path / "run"), capsys)
    assert "unknown backbone with features of width 1000 and 1369 patches; name it with --backbone" in line


def test_existing_run_is_never_overwritten(converted, tmp_path, capsys):
    sizes = PUBLISHED["slot-contrast movi-c"]
    run, _ = converted(sizes)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "exists already" in fail(arguments(tmp_path / "model.ckpt", sizes, run), capsys)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_failed_write_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "the disk is full")

    sizes = PUBLISHED["slot-contrast movi-c"]
    torch.save(random_state(sizes), tmp_path / "model.pth")
    monkeypatch.setattr(convert_checkpoint, "write_config", full)
    assert "the disk is full" in fail(arguments(tmp_path / "model.pth", sizes, tmp_path / "runs" / "run"), capsys)
    assert list((tmp_path / "runs").iterdir()) == []


def test_config_is_that_of_a_run_of_format_2(converted):
    run, _ = converted(PUBLISHED["slot-contrast movi-e"])
    content = json.loads((run / "config.json").read_text())
    assert (content["format"], content["method"]) == (2, "slot-contrast")
    assert content["stages"]["model"]["optim"]["steps"] == 300_000
    assert content["stages"]["model"]["backbone"] == to_dict(
        METHODS["slot-contrast"].stages[0].presets["movi-e"].backbone
    )
