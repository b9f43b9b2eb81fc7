"""In every command that reads runs, a run on the hub gives the same results as a local one."""

import doctest
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interpreter import cache, evaluate, propagate, segment_stream, segment_video, train
from interpreter.app.sources import Sources
from interpreter.commands import one_line
from interpreter.configs import BackboneConfig
from interpreter.data import open_dataset
from interpreter.engine import run as engine_run
from interpreter.engine.checkpoint import load_checkpoint
from interpreter.engine.run import read_config
from interpreter.hub import contents as contents_of_hub
from interpreter.hub import names
from interpreter.hub.__main__ import main
from interpreter.hub.fetching import local_run
from interpreter.hub.names import folder_to_write, parse_name, run_name
from interpreter.models.backbones import load
from interpreter.render import write_palette_png
from interpreter.segment import main as main_of_segment

from ..clips import make_clip
from ..models.official_dinov2 import official_weights
from ..models.small_vits import save_vit
from .conftest import NAME
from .small_hub import Repository

RUN = f"hub:{NAME}"


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=5)


@pytest.fixture
def pinned(pushed):
    return f"{RUN}@{pushed.repositories[NAME].branches['main']}"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(env, *arguments):
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_another_user_segments_as_with_the_local_run(pushed, pinned, as_another_user, tiny_run, clip, tmp_path):
    segment = ("interpreter.segment", clip, "--association", "learned", "--run")
    main_of_segment([*map(str, segment[1:]), str(tiny_run), "--out", str(tmp_path / "local")])
    done = command(as_another_user, *segment, RUN, "--out", tmp_path / "hub")
    assert f"run: {pinned}" in done.stderr.splitlines()
    assert contents(tmp_path / "hub") == contents(tmp_path / "local")
    pushed.requests.clear()
    offline = as_another_user | {"HF_HUB_OFFLINE": "1"}
    done = command(offline, *segment, RUN, "--out", tmp_path / "offline")
    assert "HF_HUB_OFFLINE forbids requests" in done.stderr
    assert contents(tmp_path / "offline") == contents(tmp_path / "local")
    assert pushed.requests == []


def test_functions_of_python_take_the_name(pushed, tiny_run, clip, tmp_path, capsys):
    ours, theirs = segment_video(clip, tiny_run, stage="image"), segment_video(clip, RUN, stage="image")
    for name, tensor in ours.segmentation.tensors.items():
        assert torch.equal(tensor, theirs.segmentation.tensors[name]), name
    with make_clip(tmp_path / "clip.mkv", frames=5).open("rb") as stream:
        assert segment_stream(stream, RUN, tmp_path / "stream", window=5).frames == 5


def test_evaluation_writes_nothing_into_the_cache(pushed, pinned, tiny_run, scenes):
    folder = local_run(RUN)
    before = contents(pushed.cache)
    options = ("--num-videos", "2", "--seeds", "0", "--baselines", "one-segment", "--pictures", "0")
    evaluate.main(["--run", RUN, "--root", str(scenes), *options])
    home = Path("evaluation/owner-tiny/synthetic-val-video-features")
    record = json.loads((home / "scores.json").read_text())
    assert record["subject"] == record["config"]["run"] == pinned
    assert pinned in (home / "table.txt").read_text()
    assert pinned in (home / "report.html").read_text()
    assert contents(pushed.cache) == before
    assert run_name(folder) == pinned
    evaluate.main(["--run", str(tiny_run), "--root", str(scenes), *options, "--out", "local"])
    local = json.loads(Path("local/scores.json").read_text())
    assert [row["mean"] for row in record["results"]] == [row["mean"] for row in local["results"]]
    assert record["weights"] == local["weights"] != {}


def test_generated_scenes_go_to_the_folder_of_evaluations(pushed):
    scenes = ("--num-videos", "1", "--scene-frames", "3", "--scene-objects", "3", "3")
    evaluate.main(["--run", RUN, *scenes, "--seeds", "0", "--baselines", "one-segment", "--pictures", "0"])
    assert (folder_to_write(local_run(RUN)) / "scenes").is_dir()
    assert Path("evaluation/owner-tiny/scenes").is_dir()
    assert not list(pushed.cache.rglob("scenes"))


def test_propagation_records_the_commit(pushed, pinned, scenes, tmp_path):
    dataset = open_dataset("synthetic", scenes, "val")
    write_palette_png(dataset.mask(0, 0), tmp_path / "first.png")
    video = dataset.videos[0].path
    for run, out in ((RUN, "hub"), (local_run(RUN), "local")):
        propagate.main([str(video), "--mask", str(tmp_path / "first.png"), "--run", str(run), "--out", out])
    assert json.loads(Path("hub/propagation.json").read_text())["run"] == pinned
    assert contents(Path("hub/Annotations")) == contents(Path("local/Annotations"))


def test_training_starts_from_a_commit_and_keeps_it(pushed, pinned, image_options, tmp_path):
    run = tmp_path / "mine"
    still = ["--peak-lr", "0", "--start-lr", "0", "--final-lr", "0", "--steps", "1"]
    options = ["--run", str(run), *image_options, *still]
    train.main([*options, "--init", RUN])
    assert str(read_config(run).stages["image"]["init"]) == pinned
    source = load_checkpoint(local_run(RUN) / "image").weights
    started = load_checkpoint(run / "image").weights
    assert all(torch.equal(started[name], source[name]) for name in source)
    pushed.repositories[NAME].change({"notes.md": b"the branch moves on"})
    pushed.requests.clear()
    train.main([*options[:-1], "2", "--init", RUN])  # resumes
    assert str(read_config(run).stages["image"]["init"]) == pinned
    assert load_checkpoint(run / "image").step == 2
    assert pushed.requests == []
    for other in ("hub:owner/another", f"{RUN}@{'0' * 40}"):
        with pytest.raises(ValueError, match="was started with other settings: --init was hub:owner/tiny@"):
            train.main([*options[:-1], "3", "--init", other])


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            train.main,
            f"--run {RUN}: a run of the hub is not trained further; to start from its weights, give --run DIR ",
        ),
        (
            cache.main,
            f"--run {RUN}: a cache holds the inputs of a training, and a run of the hub is not trained further",
        ),
        (lambda words: main(["push", RUN, NAME]), f"push takes the directory of a run, not {RUN}, which is on the hub"),
    ],
)
def test_commands_that_write_into_a_run_refuse_one_of_the_hub(start, message, hub):
    with pytest.raises(ValueError, match=re.escape(message)):
        start(["--run", RUN])
    assert hub.requests == []
    assert list(Path().iterdir()) == []


def test_page_shows_the_name_of_the_run(pushed, pinned, tiny_run):
    sources = Sources((local_run(RUN), tiny_run), BackboneConfig())
    assert [source.label for source in sources.usable()][:2] == [pinned, str(tiny_run)]


def test_missing_client_is_named_with_its_extra(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"needs the package huggingface_hub: pip install 'huggingface_hub>=2.4'"):
        local_run(RUN)
    assert local_run(tiny_run) == tiny_run


def train_on(backbone, run, scenes, method):
    sizes = "--num-videos 3 --frame-size 56 84 --dim 16 --num-slots 4 --batch-size 4 --steps 1 --precision fp32"
    options = [*sizes.split(), "--sample-every", "9", "--root", str(scenes), "--backbone", str(backbone)]
    options += ["--heads", "2", "--decoder-layers", "1"] if method == "interpreter" else ["--decoder-dim", "16"]
    train.main(["--method", method, "--run", str(run), *options])


@pytest.mark.parametrize(("kind", "method"), [("folder", "interpreter"), ("checkpoint", "dinosaur")])
def test_backbone_of_this_computer_travels_with_the_run(kind, method, hub, scenes, clip, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = tmp_path / "secret" / ("vit" if kind == "folder" else "dinov2.pth")
    backbone.parent.mkdir()
    if kind == "folder":
        save_vit("Dinov2", backbone)
        config = json.loads((backbone / "config.json").read_text())
        named = config | {"_name_or_path": str(backbone), "auto_map": {"AutoModel": "evil.Model"}}
        nested = {"parts": [named], "vision_config": {"inner": dict(named), "kept": 1}}
        (backbone / "config.json").write_text(json.dumps(named | nested))
        pixels = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1] * 3, "image_std": [0.3] * 3}
        (backbone / "processor_config.json").write_text(json.dumps({"image_processor": pixels}))
    else:
        torch.save(official_weights(), backbone)
    train_on(backbone, tmp_path / "run", scenes, method)
    ours = segment_video(clip, tmp_path / "run").segmentation.tensors
    main(["push", str(tmp_path / "run"), NAME, "--license", "mit"])
    shutil.rmtree(backbone.parent)
    files = hub.repositories[NAME].files
    inside = {path for path in files if path.startswith("backbone/")}
    folder = {"backbone/config.json", "backbone/model.safetensors", "backbone/processor_config.json"}
    assert inside == (folder if kind == "folder" else {"backbone/weights.safetensors"})
    assert not any(b"secret" in content or b"auto_map" in content for content in files.values())
    if kind == "folder":
        assert json.loads(files["backbone/config.json"])["vision_config"]["kept"] == 1
    assert b"(its weights are in this repository)" in files["README.md"]
    theirs = segment_video(clip, RUN).segmentation.tensors
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    main(["push", str(local_run(RUN)), NAME])  # a fetched run can be pushed again
    assert hub.repositories[NAME].files.keys() == files.keys()


@pytest.mark.parametrize("name", ["private/vit", "private/vit.pth"])
def test_backbone_in_the_current_directory_is_found_from_any_other(name, hub, scenes, clip, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    Path("private").mkdir()
    save_vit("Dinov2", name) if name == "private/vit" else torch.save(official_weights(), name)
    train_on(name, tmp_path / "run", scenes, "interpreter")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["stages"]["image"]["backbone"]["backbone"] == str(Path(name).absolute())
    config["stages"]["image"]["backbone"]["backbone"] = name  # as earlier versions wrote it: it still resumes
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    train_on(name, tmp_path / "run", scenes, "interpreter")
    monkeypatch.chdir(tmp_path)
    ours = segment_video(clip, tmp_path / "run").segmentation.tensors
    main(["push", str(tmp_path / "run"), NAME, "--license", "mit"])
    assert not any(b"private" in content for content in hub.repositories[NAME].files.values())
    theirs = segment_video(clip, RUN).segmentation.tensors
    assert all(torch.equal(ours[part], theirs[part]) for part in ours)


def test_commit_of_a_backbone_on_the_hub_is_recorded(hub, tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "video")
    config = json.loads((run / "config.json").read_text())
    config["stages"]["image"]["backbone"]["backbone"] = "facebook/dinov2-small"
    (run / "config.json").write_text(json.dumps(config))
    main(["push", str(run), NAME, "--license", "mit"])
    assert "the backbone facebook/dinov2-small is not in the cache of this computer" in capsys.readouterr().out
    refs = hub.cache / "models--facebook--dinov2-small" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    main(["push", str(run), NAME])
    published = json.loads(hub.repositories[NAME].files["config.json"])["stages"]["image"]["backbone"]
    assert published["backbone"] == f"hub:facebook/dinov2-small@{'a' * 40}"
    card = hub.repositories[NAME].files["README.md"].decode()
    assert "base_model:\n- facebook/dinov2-small\n" in card
    assert f"- Backbone `facebook/dinov2-small@{'a' * 40}`: Apache-2.0" in card


def test_backbone_of_the_hub_is_never_taken_from_this_computer(hub, scenes, clip, tmp_path):
    """A folder of the same name in the current directory, pickles, code and adapters of the backbone are not used."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_vit("Dinov2", tmp_path / "vit")
    files = {path.name: path.read_bytes() for path in (tmp_path / "vit").iterdir()}
    hub.repositories["private/vit"] = Repository()
    evil = {"pytorch_model.bin": b"evil", "evil.py": b"1 / 0", "adapter_config.json": b"evil"}
    hub.repositories["private/vit"].change(files | evil)
    train_on("hub:private/vit", tmp_path / "run", scenes, "interpreter")
    ours = segment_video(clip, tmp_path / "run").segmentation.tensors
    main(["push", str(tmp_path / "run"), NAME, "--license", "mit"])
    commit = hub.repositories["private/vit"].branches["main"]
    published = json.loads(hub.repositories[NAME].files["config.json"])["stages"]["image"]["backbone"]
    assert published["backbone"] == f"hub:private/vit@{commit}"
    other = Path("private/vit")  # in the current directory; it has other weights
    save_vit("ViT", other)
    shutil.rmtree(hub.cache)
    theirs = segment_video(clip, RUN).segmentation.tensors
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not {path.name for path in hub.cache.rglob("*")} & evil.keys()
    hub.repositories["private/vit"].change({"model.safetensors": None})
    with pytest.raises(FileNotFoundError, match=r"backbone 'hub:private/vit' could not be loaded \("):
        load.load_backbone(BackboneConfig("hub:private/vit"))
    assert not {path.name for path in hub.cache.rglob("*")} & evil.keys()
    with pytest.raises(FileNotFoundError, match=r"backbone 'hub:private/none' could not be loaded \("):
        load.load_backbone(BackboneConfig("hub:private/none"))


def test_name_is_not_fetched_for_help(hub, capsys):
    with pytest.raises(SystemExit):
        main_of_segment(["--run", RUN, "--help"])
    assert "hub:OWNER/NAME" in capsys.readouterr().out
    assert hub.requests == []


def test_error_of_a_command_is_the_one_line_of_the_hub(hub, clip, tmp_path):

    with pytest.raises(OSError, match=r"^hub:owner/tiny: no such repository") as raised:
        main_of_segment([str(clip), "--run", RUN, "--out", str(tmp_path / "out")])
    assert "\n" not in one_line(raised.value)
    assert not (tmp_path / "out").exists()


def test_examples_of_docstrings_hold():

    for module in (names, contents_of_hub, engine_run, load):
        failed, tried = doctest.testmod(module)
        assert tried > 0
        assert failed == 0, module
    assert str(parse_name(RUN)) == f"{RUN}@main"
