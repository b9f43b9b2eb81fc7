"""`python -m interpreter.export`: its files, its checks, and its errors."""

import dataclasses
import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch

from interpreter.export import __main__ as command
from interpreter.export import formats
from interpreter.export.__main__ import ExportOptions, export, main
from interpreter.export.trace import largest_difference, other_inputs, trace
from interpreter.methods.programs import Input, Labels, Program, labels_program
from interpreter.segmentation import Segmentation


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """`tiny_run` with one draw and one iteration of the image stage, which is traced in a fifth of the time."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("export") / "run")
    config = json.loads((run / "config.json").read_text())
    config["stages"]["image"]["model"] |= {"restarts": 1, "inference_iterations": 1}
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder with the image stage of that run in the formats torch and onnx."""
    out = tmp_path_factory.mktemp("exported") / "out"
    assert main([str(run), "--out", str(out), "--stage", "image", "--format", "torch", "onnx"]) == 0
    return out


def test_list_of_programs_names_files_and_shapes(exported):
    listed = json.loads((exported / "programs.json").read_text())
    assert (listed["method"], listed["stage"], listed["frame_size"], listed["grid"]) == (
        "interpreter",
        "image",
        [64, 96],
        [4, 6],
    )
    assert [program["name"] for program in listed["programs"]] == ["backbone", "image_stage", "labels"]
    image = listed["programs"][1]
    assert image["inputs"][0] == {
        "name": "features",
        "dtype": "float32",
        "shape": ["T", 24, 192],
        "dims": "T M C",
        "about": "of the program backbone",
    }
    assert image["inputs"][1]["shape"] == [1, "T", "N", 16]
    assert [output["name"] for output in image["outputs"]] == ["slots", "attention", "means"]
    files = {name for program in listed["programs"] for name in program["files"].values()}
    assert files | {"programs.json"} == {path.name for path in exported.iterdir()} - {".lock"}


@pytest.mark.parametrize("frames", [1, 4])
def test_torch_and_onnx_agree_for_any_number_of_frames(exported, frames):
    generator = torch.Generator().manual_seed(frames)
    pixels = torch.randint(256, (frames, 64, 96, 3), generator=generator).byte()
    noise = torch.randn(1, frames, 7, 16, generator=generator)

    def in_torch(name, *inputs):
        found = torch.export.load(exported / f"{name}.pt2").module()(*inputs)
        return found if isinstance(found, tuple) else (found,)

    def in_onnx(name, *inputs):
        session = onnxruntime.InferenceSession(exported / f"{name}.onnx", providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        return [torch.from_numpy(o) for o in session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))]

    (features,) = in_torch("backbone", pixels)
    torch.testing.assert_close(in_onnx("backbone", pixels)[0], features, atol=1e-4, rtol=1e-4)
    slots, masks, means = in_torch("image_stage", features, noise)
    assert slots.shape == (frames, 7, 16)
    for ours, theirs in zip((slots, masks, means), in_onnx("image_stage", features, noise), strict=True):
        torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-3)
    (labels,) = in_torch("labels", masks)
    assert torch.equal(in_onnx("labels", masks)[0], labels)
    expected = Segmentation((4, 6), masks).labels(size=(64, 96))
    assert np.array_equal(labels.numpy(), expected)


def test_compiled_program_runs_and_tells_its_shapes(tmp_path):
    program = labels_program((2, 3), (8, 12), torch.device("cpu"))
    path = tmp_path / "labels.aoti.pt2"
    compiled = formats.write("aoti", trace(program), program, path)
    assert largest_difference(program, compiled) == 0
    assert torch._inductor.aoti_load_package(str(path)).get_metadata()["masks"] == "T 6 S"


class _Wrong(Labels):
    def forward(self, masks):
        return super().forward(masks) + 1


def test_a_file_that_differs_from_the_run_is_not_kept(run, tmp_path, monkeypatch):
    former = {"programs": [{"files": {"torch": "labels.pt2"}}]}
    (tmp_path / "programs.json").write_text(json.dumps(former))
    (tmp_path / "labels.pt2").write_bytes(b"of an earlier export")
    wrong = _Wrong((4, 6), (64, 96))
    monkeypatch.setattr(
        command, "trace", lambda p: trace(dataclasses.replace(p, module=wrong) if p.name == "labels" else p)
    )
    with pytest.raises(ValueError, match=r"labels.pt2 differs from the run by 1.0e\+00"):
        export(ExportOptions(run=run, out=tmp_path, stage="image"))
    assert (tmp_path / "labels.pt2").read_bytes() == b"of an earlier export"
    assert not (tmp_path / "backbone.pt2").exists()


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        (torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0]), 17**-0.5),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan]), torch.inf),
        (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5]), 0.25),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0]), torch.inf),
    ],
)
def test_difference(ours, theirs, difference):
    class Returns(torch.nn.Module):
        def forward(self, x):
            return ours

    program = Program("p", "", Returns(), {"x": Input(torch.zeros(3), "T", "")}, {"y": "T: "})
    assert largest_difference(program, lambda x: [theirs]) == pytest.approx(difference)


def test_the_check_uses_other_sizes_than_the_trace():
    program = labels_program((2, 3), (8, 12), torch.device("cpu"))
    assert [tuple(each.shape) for each in other_inputs(program)] == [(2, 6, 4)]


def test_an_operation_without_counterpart_is_named_and_the_rest_written(run, tmp_path, monkeypatch, capsys):
    write = formats.write

    def without_labels(kind, traced, program, path):
        if program.name == "labels" and kind == "onnx":
            raise formats.NoCounterpartError("aten.made_up has no counterpart")
        return write("torch", traced, program, path)

    monkeypatch.setattr(command, "write", without_labels)
    monkeypatch.setenv("COLUMNS", "200")
    assert main([str(run), "--out", str(tmp_path), "--stage", "image", "--format", "onnx"]) == 0
    assert "onnx cannot express it: aten.made_up" in capsys.readouterr().out
    assert not (tmp_path / "labels.onnx").exists()
    files = {p["name"]: p["files"] for p in json.loads((tmp_path / "programs.json").read_text())["programs"]}
    assert files == {
        "backbone": {"onnx": "backbone.onnx"},
        "image_stage": {"onnx": "image_stage.onnx"},
        "labels": {},
    }


def test_another_export_replaces_the_files_of_the_first_and_no_others(exported, run, tmp_path):
    out = shutil.copytree(exported, tmp_path / "out")
    (out / "video_stage.onnx").write_bytes(b"of another program")
    main([str(run), "--out", str(out), "--stage", "image", "--frame-size", "32", "64"])
    assert sorted(path.name for path in out.glob("*.*") if path.name != ".lock") == [
        "backbone.pt2",
        "image_stage.pt2",
        "labels.pt2",
        "programs.json",
        "video_stage.onnx",
    ]
    assert json.loads((out / "programs.json").read_text())["grid"] == [2, 4]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--frame-size", "60", "96"], "is not a multiple of this backbone's patch"),
        (["--stage", "videos"], "has no stage 'videos'"),
        (["--stage", "video-3"], "holds no trained video-3 stage"),
        (["--device", "cuda"], "sees no GPU"),
    ],
)
def test_options_that_do_not_fit(run, tmp_path, options, error, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, OSError), match=error):
        main([str(run), "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_trained_stage(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="has no trained stage"):
        main([str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="no run directory"):
        main([str(tmp_path / "absent"), "--out", str(tmp_path / "out")])


def test_files_of_others_are_not_replaced(run, tmp_path):
    (tmp_path / "labels.pt2").write_bytes(b"of another program")
    with pytest.raises(ValueError, match=r"labels.pt2 is not from an earlier export"):
        main([str(run), "--out", str(tmp_path), "--stage", "image"])
    (tmp_path / "labels.pt2").unlink()
    (tmp_path / "programs.json").write_text("[]")
    with pytest.raises(ValueError, match=r"programs.json is not from an export"):
        main([str(run), "--out", str(tmp_path), "--stage", "image"])
    assert [path.name for path in tmp_path.iterdir()] == ["programs.json"]


def test_a_compiler_that_does_not_work_is_one_line(tmp_path, monkeypatch):
    program = labels_program((2, 3), (8, 12), torch.device("cpu"))
    traced, compile_ = trace(program), torch._inductor.aoti_compile_and_package

    def without_compiler(*arguments, **options):
        with torch._inductor.config.patch({"cpp.cxx": ("/bin/false",), "force_disable_caches": True}):
            return compile_(*arguments, **options)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", without_compiler)
    with pytest.raises(ValueError, match=r"cannot compile labels: .*C\+\+ compiler"):
        formats.write("aoti", traced, program, tmp_path / "labels.aoti.pt2")
    assert not any(tmp_path.iterdir())


def test_no_format_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="at least one of torch, onnx, aoti"):
        export(ExportOptions(run=run, out=tmp_path / "out", format=()))


def test_out_is_a_file(run, tmp_path):
    (tmp_path / "out").write_text("notes")
    with pytest.raises(ValueError, match="is a file; give a directory"):
        main([str(run), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out").read_text() == "notes"


def test_absent_onnx_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx, onnxscript, onnxruntime: pip install"):
        main([str(run), "--out", str(tmp_path / "out"), "--format", "onnx"])


def test_a_full_disk_leaves_nothing(run, small_disk):
    out = small_disk("1m")
    with pytest.raises(OSError, match="disk is full"):
        main([str(run), "--out", str(out), "--stage", "image"])
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == []
