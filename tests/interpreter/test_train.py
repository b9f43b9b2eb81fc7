"""Training commands: the files of a run, refused options, and starting from another run."""

import json
import re
import shutil

import psutil
import pytest
import torch
from safetensors.torch import load_file

from interpreter.engine.checkpoint import checkpoints, load_checkpoint
from interpreter.engine.run import read_config, weights_hash
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter.config import ImageTraining, VideoTraining
from interpreter.methods.runs import open_segmenter
from interpreter.train import main

from .runs import STREAMED, curve, start


def test_run_holds_what_it_promises(tiny_run):
    for stage in ("image", "video"):
        assert [path.name for path in checkpoints(tiny_run / stage)] == ["checkpoint-00000003.safetensors"]
        assert [record["step"] for record in curve(tiny_run, stage)] == [1, 2, 3]
        assert {"loss", "grad_norm", "lr", "effective_slots", "dead_slots", "attention_entropy"} <= curve(
            tiny_run, stage
        )[0].keys()
        assert (tiny_run / "samples" / f"{stage}-000003.png").exists()
        assert list((tiny_run / "tensorboard" / stage).glob("events*"))
    assert "merged_slots" in curve(tiny_run, "video")[0]
    config = read_config(tiny_run)
    assert config.method == "interpreter"
    assert config.options("image", ImageTraining).data.frame_size == (64, 96)
    assert config.options("video", VideoTraining).num_frames == 5
    assert config.trained_on == {"video": weights_hash(load_checkpoint(tiny_run / "image"))}
    content = json.loads((tiny_run / "config.json").read_text())
    assert content["format"] == 2
    assert content["stages"]["image"]["model"]["num_slots"] == 4


def test_streamed_features_train_the_same_way(image_run, image_options):
    run = image_run()
    stored = curve(run, "image")
    shutil.rmtree(run / "image")
    shutil.rmtree(run / "cache")
    main(["--run", str(run), *image_options, "--features", "streamed"])
    assert not (run / "cache").exists()
    for one, other in zip(stored, curve(run, "image"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)  # stored in fp16


@pytest.mark.parametrize("loader", ["pyav", "torch", "dali"])
def test_loaders_train_the_same_way(loader, image_run, image_options):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="needs nvidia-dali-cuda120 or -cuda130")
    run = image_run()
    stored = curve(run, "image")
    shutil.rmtree(run / "image")
    others = psutil.Process().children()  # such as the workers of torch.compile, if an earlier test compiled
    main(["--run", str(run), *image_options, "--features", "streamed", "--loader", loader, "--workers", "1"])
    for one, other in zip(stored, curve(run, "image"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2 if loader == "dali" else 1e-3)
    assert set(psutil.Process().children()) <= set(others)


def test_the_video_stage_streams_through_a_loader(tmp_path, tiny_run, image_options, video_options):
    run = tmp_path / "run"
    main(["--run", str(run), *image_options, *STREAMED])
    main(["--run", str(run), *video_options, "--loader", "pyav", "--workers", "1"])
    assert not (run / "features").exists()
    assert [record["step"] for record in curve(run, "video")] == [1, 2, 3]
    for one, other in zip(curve(tiny_run, "video"), curve(run, "video"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-2)  # on features that fp16 has not rounded


def test_loader_may_change_between_two_calls(image_run, image_options, tmp_path):
    run = image_run()
    longer = ["--run", str(run), *image_options, "--features", "streamed", "--steps", "4"]
    main([*longer, "--loader", "torch", "--prefetch", "1"])
    assert load_checkpoint(run / "image").step == 4
    with pytest.raises(ValueError, match="--prefetch must be at least 1"):
        main([*longer, "--prefetch", "0"])


def test_video_stage_flips_on_an_image_stage_that_does_not(tmp_path, image_options, video_options):
    run = tmp_path / "run"
    main(["--run", str(run), *image_options, "--no-flip"])
    main(["--run", str(run), *video_options, "--flip", "--steps", "8", "--batch-size", "4"])
    assert load_checkpoint(run / "video").step == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dim", "32"], "--dim was 16, now 32"),
        (["--peak-lr", "1e-3"], "--peak-lr was 0.0004, now 0.001"),
        (["--seed", "1"], "--seed was 0, now 1"),
        (["--frame-size", "64", "64"], r"--frame-size was \(64, 96\), now \(64, 64\)"),
        (["--dim", "32", "--no-flip"], "--flip was True, now False; --dim was 16, now 32"),
        (["--features", "streamed", "--num-slots", "5", "--log-every", "2"], "settings: --num-slots was 4, now 5. Use"),
    ],
)
def test_other_settings_on_a_started_run_are_refused_by_name(change, message, tiny_run, image_options):
    before = (tiny_run / "config.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        main(["--run", str(tiny_run), *image_options, *change])
    assert (tiny_run / "config.json").read_bytes() == before


def test_other_settings_of_the_video_stage_are_refused_by_name(tiny_run, video_options):
    with pytest.raises(ValueError, match=r"--num-frames was 5, now 6; --merge-threshold was 0\.05, now 0\.2"):
        main(["--run", str(tiny_run), *video_options, "--num-frames", "6", "--merge-threshold", "0.2"])


@pytest.mark.parametrize("stage", ["image", "video"])
def test_init_starts_from_the_weights_of_another_run(
    stage, tiny_run, image_run, image_options, video_options, monkeypatch
):
    run = image_run()
    if stage == "image":
        shutil.rmtree(run / "image")
    options = image_options if stage == "image" else video_options
    monkeypatch.chdir(tiny_run.parent)
    # Learning rate 0 leaves the loaded weights unchanged. A relative path works from any directory.
    still = ["--peak-lr", "0", "--start-lr", "0", "--final-lr", "0", "--steps", "1"]
    main(["--run", str(run), *options, *still, "--init", tiny_run.name])
    monkeypatch.chdir("/")
    main(["--run", str(run), *options, *still, "--init", str(tiny_run)])
    started, source = load_checkpoint(run / stage), load_checkpoint(tiny_run / stage)
    assert started.step == 1
    assert started.weights.keys() == source.weights.keys()
    assert all(torch.equal(started.weights[key], source.weights[key]) for key in source.weights)


def test_init_that_does_not_fit_is_refused(tiny_run, tmp_path, image_options):
    with pytest.raises(ValueError, match=re.escape(str(tiny_run / "image"))):
        main(["--run", str(tmp_path / "run"), *image_options, "--dim", "8", "--init", str(tiny_run)])
    with pytest.raises(FileNotFoundError, match="no run directory at"):
        main(["--run", str(tmp_path / "run"), *image_options, "--init", str(tmp_path / "absent")])
    assert not (tmp_path / "run").exists()


def test_file_given_as_run_is_told_apart(tiny_run, video_options):
    with pytest.raises(NotADirectoryError, match="is a file; --run expects a directory"):
        main(["--run", str(tiny_run / "config.json"), *video_options])


def test_deleted_stage_starts_anew_with_other_settings(image_run, image_options, video_options):
    run = image_run()
    shutil.rmtree(run / "image")
    main(["--run", str(run), *image_options, "--dim", "8"])
    assert read_config(run).stages["image"]["model"]["dim"] == 8
    main(["--run", str(run), *video_options, "--num-frames", "7"])
    assert read_config(run).stages["video"]["num_frames"] == 7


def test_video_stage_without_image_stage_names_the_command(tmp_path, video_options):
    run = tmp_path / "empty"
    with pytest.raises(FileNotFoundError, match=f"interpreter.train .*--run {run}"):
        main(["--run", str(run), *video_options])
    assert not run.exists()  # a mistyped name creates no file
    run.mkdir()
    with pytest.raises(
        FileNotFoundError, match=f"no trained image stage; .*interpreter.train --stage image --run {run}"
    ):
        main(["--run", str(run), *video_options])


def test_video_stage_of_another_image_stage_is_refused(tiny_run, tmp_path, image_options, video_options):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    main(["--run", str(run), *image_options, "--steps", "4"])
    with pytest.raises(ValueError, match=f"another image stage than the one there now; delete {run}/video"):
        main(["--run", str(run), *video_options])
    with pytest.raises(ValueError, match=f"another image stage .* --stage video --run {run}"):
        open_segmenter(INTERPRETER, run, INTERPRETER.settings(association="learned"))
    shutil.rmtree(run / "video")
    main(["--run", str(run), *video_options])
    open_segmenter(INTERPRETER, run, INTERPRETER.settings(association="learned"))


DAMAGED = [
    "{",
    "[]",
    '{"image": 3}',
    '{"unknown": null}',
    '{"image": {"run": "r", "gone": 1}}',
    '{"format": 2}',
    '{"format": 2, "method": "interpreter", "stages": 3}',
    '{"format": 2, "method": "interpreter", "stages": {"image": 3}}',
    '{"format": 2, "method": "interpreter", "stages": {"image": {}}}',
    '{"format": 2, "method": "interpreter", "stages": {"image": {"optim": {"steps": 3}, "gone": 1}}}',
    '{"format": 2, "method": "interpreter", "stages": {"image": {"run": "r", "optim": []}}}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_config_is_a_value_error(text, image_run, image_options, video_options):
    run = image_run()
    (run / "config.json").write_text(text)
    for options in (image_options, video_options):
        with pytest.raises(ValueError, match=f"^{run / 'config.json'} is not the configuration of a run"):
            main(["--run", str(run), *options])


def test_diverged_run_ends_with_one_line_and_its_checkpoint(image_run, image_options):
    run = image_run()
    newest = run / "image" / "checkpoint-00000003.safetensors"
    content = newest.read_bytes()
    config = json.loads((run / "config.json").read_text())
    config["stages"]["image"]["optim"]["peak_lr"] = 1e30
    (run / "config.json").write_text(json.dumps(config))
    process = start(["--run", str(run), *image_options, "--peak-lr", "1e30", "--steps", "20"])
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in errors
    (message,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "--peak-lr" in message
    (diverged,) = (run / "image").glob("diverged-*.safetensors")
    assert str(diverged) in message
    assert checkpoints(run / "image") == [newest]
    assert newest.read_bytes() == content


def test_full_disk_keeps_the_earlier_checkpoint(small_disk, tiny_run, image_options):
    disk = small_disk("4m")
    run = shutil.copytree(
        tiny_run, disk / "run", ignore=shutil.ignore_patterns("cache", "tensorboard", "samples", "video")
    )
    options = [*image_options, "--features", "streamed", "--checkpoint-every", "1", "--sample-every", "100"]
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(free - 40_000))
    with pytest.raises(OSError, match=r"disk is full|No space left"):
        main(["--run", str(run), *options, "--steps", "6"])
    assert load_checkpoint(run / "image").step == 3
    (disk / "filler").unlink()
    main(["--run", str(run), *options, "--steps", "6"])
    assert load_checkpoint(run / "image").step == 6
    assert [record["step"] for record in curve(run, "image")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("stage", "name"), [("image", "features"), ("video", "image slots")])
def test_cache_without_room_names_the_options(stage, name, image_run, image_options, video_options, monkeypatch):
    run = image_run()
    options = image_options if stage == "image" else video_options
    shutil.rmtree(run / "cache")
    shutil.rmtree(run / stage, ignore_errors=True)
    monkeypatch.setattr("interpreter.store.fill.Cache.free_bytes", lambda self: 10_000)
    message = rf"the {name} need .* MB, but {run}/cache has 0\.01 MB free; use --features streamed, or --cache DIR"
    with pytest.raises(OSError, match=message):
        main(["--run", str(run), *options, "--features", "stored"])
    main(["--run", str(run), *options])  # auto streams them
    assert not (run / "cache").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--log-every", "0"], "--log-every must be at least 1"),
        (["--checkpoint-every", "-1"], "--checkpoint-every must be at least 1, got -1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--num-slots", "0"], "--num-slots must be at least 1"),
        (["--frame-size", "64", "90"], "--frame-size 64 96"),
        (["--frame-size", "0", "96"], "--frame-size must be at least 1"),
        (["--dim", "18"], "--dim must be a multiple of 4"),
        (["--heads", "3"], "heads 3"),
        (["--data", "davis", "--root", "/nowhere"], "/nowhere"),
        (["--backbone", "/nowhere"], "--backbone DIR"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_computed(change, message, tmp_path, image_options, monkeypatch):
    monkeypatch.setattr("interpreter.store.fill.Cache.fill", lambda *_: pytest.fail("features were encoded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(["--run", str(tmp_path / "run"), *image_options, *change])


def test_data_without_root_names_the_option(tmp_path):
    with pytest.raises(ValueError, match="--data folder needs --root DIR"):
        main(["--run", str(tmp_path / "run"), "--data", "folder"])


def test_scenes_are_made_when_there_are_none(tmp_path, image_options):
    options = image_options[: image_options.index("--root")]
    main(["--run", str(tmp_path / "run"), *options, "--num-videos", "1", "--steps", "1"])
    assert len(list((tmp_path / "run" / "scenes" / "JPEGImages" / "480p").iterdir())) == 1


def test_same_command_gives_the_same_run(tiny_run, image_run, image_options):
    run = image_run()
    shutil.rmtree(run / "image")
    main(["--run", str(run), *image_options])
    name = "image/checkpoint-00000003.safetensors"
    first, second = load_file(run / name), load_file(tiny_run / name)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert curve(run, "image") == curve(tiny_run, "image")


def test_finished_stage_names_the_commands_that_follow(image_run, image_options, capsys):
    """The image stage alone can segment. If a finished stage is trained again, this is printed again."""
    run = image_run()
    main(["--run", str(run), *image_options])
    said = "".join("".join(capsys.readouterr()).split())
    for command in (
        f"python -m interpreter.segment CLIP.mp4 --run {run} --out DIR",
        f"python -m interpreter.train --stage video --run {run} (with the same --preset",
    ):
        assert "".join(command.split()) in said


def test_the_video_stage_names_the_option_that_uses_it(tiny_run, video_options, capsys):
    main(["--run", str(tiny_run), *video_options])
    said = "".join("".join(capsys.readouterr()).split())
    assert f"interpreter.segmentCLIP.mp4--run{tiny_run}--outDIR--associationlearned" in said
