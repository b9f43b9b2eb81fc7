"""The cache of features and slots: the same values as without it, and nothing computed twice."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from interpreter import locks
from interpreter.cache import main, parse, stage_options
from interpreter.data import FrameFolder, Video, open_dataset
from interpreter.data.frame_index import FrameIndex
from interpreter.data.loaders import open_loader
from interpreter.engine.checkpoint import load_checkpoint
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter.image_slots import SlotMaker, StoredSlots, StreamedSlots, draw_noise, encode_slots
from interpreter.methods.runs import load_trained
from interpreter.store.features import FeatureMaker, StreamedFeatures
from interpreter.store.files import read_content
from interpreter.store.fill import Cache
from interpreter.train import main as train

CPU = torch.device("cpu")
FRAMES = 24


def files(root):
    """Features and slots below ``root``."""
    paths = [path for path in root.glob("*/*.safetensors") if not path.parent.name.startswith("pictures")]
    return {path.relative_to(root): path.read_bytes() for path in paths}


def slot_cache(run, root, draws=4, flip=True):
    """The slot cache of a run, and its uncached counterpart."""
    context, image = load_trained(INTERPRETER, run, "image", CPU)
    videos, size = open_dataset("synthetic", context.data.root, "train").videos, context.data.frame_size
    features = FeatureMaker(root, context.backbone, context.backbone_config, size, "fp32", "fp16", flip)
    cache = Cache(SlotMaker(root, features, image.model, image.weights, draws), videos, [*map(read_content, videos)])
    streamed = StreamedFeatures(context.backbone, open_loader("torch", videos, size, CPU), "fp32")
    digests = [content.digest for content in cache.contents]
    return cache, StreamedSlots(image.model, streamed, digests, FrameIndex.of(videos), "fp32")


def batch(source, *request):
    """The features or slots of one request."""
    return next(source.batches([request]))


@pytest.fixture(scope="module")
def cached(tmp_path_factory, tiny_run):
    """A copy of the tiny run with an image stage alone, and a cache of its slots that was made from pixels."""
    run = tmp_path_factory.mktemp("cached") / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("video", "cache"))
    main(["--run", str(run)])
    return run


@pytest.fixture
def no_pixels(monkeypatch):
    """Nothing may be decoded."""

    def fail(*_):
        raise AssertionError("a frame was decoded")

    for owner, name in [(Video, "read"), (Video, "frames"), (FrameFolder, "_decode"), (FrameFolder, "_stream")]:
        monkeypatch.setattr(owner, name, fail)


def test_cached_slots_equal_uncached_ones(cached):
    cache, uncached = slot_cache(cached, cached / "cache")
    assert cache.missing() == {}
    stored = StoredSlots(cache.table(), CPU)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(3 * FRAMES, (50,), generator=generator)
    flips, draws = torch.rand(50, generator=generator) < 0.5, torch.randint(4, (50,), generator=generator)
    actual, expected = batch(stored, frames, flips, draws), batch(uncached, frames, flips, draws)
    assert actual.dtype == expected.dtype == torch.float32
    # Features and slots keep 11 bits each, and iterations of slot attention increase the difference.
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)
    for other in (batch(stored, frames, ~flips, draws), batch(stored, frames, flips, (draws + 1) % 4)):
        assert ((other - actual).abs().amax((1, 2)) > 0.1).all()


def test_cached_attention_is_that_of_the_slots(cached):
    cache, uncached = slot_cache(cached, cached / "cache")
    frames, flips = torch.arange(FRAMES, 2 * FRAMES), torch.zeros(FRAMES, dtype=torch.bool)
    attention = cache.table().rows("attention", frames, flips)
    assert attention.shape == (FRAMES, 4, 24, 4)
    torch.testing.assert_close(attention.float().sum(-1), torch.ones(FRAMES, 4, 24), atol=2e-3, rtol=0)
    noise = [draw_noise(uncached.image_stage, uncached.digests[1], t, False, 2) for t in range(FRAMES)]
    features = batch(uncached.features, frames, flips)
    expected = encode_slots(uncached.image_stage, features, noise, "fp32").attention
    torch.testing.assert_close(attention[:, 2].float(), expected, atol=1e-2, rtol=1e-2)


def test_slots_from_stored_features_equal_those_from_pixels(cached, tmp_path):
    run = shutil.copytree(cached, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    main(["--run", str(run), "--stage", "image"])
    main(["--run", str(run), "--stage", "video", "--workers", "1"])
    slots = {path: data for path, data in files(run / "cache").items() if path.parts[0].startswith("slots")}
    assert slots == files(cached / "cache")
    assert len(files(run / "cache")) == 2 * len(slots) == 12


def test_video_stage_trains_on_the_cache_without_decoding(
    cached, tmp_path, video_options, no_pixels, monkeypatch, capsys
):
    run = shutil.copytree(cached, tmp_path / "run")
    monkeypatch.setattr(FeatureMaker, "make", lambda *_: pytest.fail("features were made"))
    before = files(run / "cache")
    train(["--run", str(run), *video_options])
    assert load_checkpoint(run / "video").step == 3
    assert files(run / "cache") == before
    assert re.search(r"image slots of 3 videos.*3 videos are there, 0 to make", capsys.readouterr().err)


def test_cached_and_uncached_training_agree(cached, tmp_path, video_options):
    curves = []
    for choice in ("stored", "streamed"):
        run = shutil.copytree(cached, tmp_path / choice)
        train(["--run", str(run), *video_options, "--features", choice, "--steps", "6"])
        curves.append([json.loads(line) for line in (run / "video" / "metrics.jsonl").read_text().splitlines()])
    for one, other in zip(*curves, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)
    losses = [record["loss"] for record in curves[0]]
    assert max(losses) - min(losses) > 0.03 * losses[0]  # the draw of another step would differ


@pytest.mark.parametrize("change", ["image stage", "draws", "dtype", "video"])
def test_what_changed_is_made_anew_and_what_did_not_is_kept(
    change, cached, tmp_path, image_options, scenes, monkeypatch
):
    run, root = shutil.copytree(cached, tmp_path / "run"), shutil.copytree(scenes, tmp_path / "scenes")
    options, made, make = ["--root", str(root)], [], SlotMaker.make
    monkeypatch.setattr(
        SlotMaker, "make", lambda self, video, *rest: made.append(video.name) or make(self, video, *rest)
    )
    main(["--run", str(run), *options])
    assert made == []  # the same videos in another folder
    before = files(run / "cache")
    if change == "image stage":
        train(["--run", str(run), *image_options, "--steps", "4"])
    elif change == "video":
        first = sorted((root / "JPEGImages" / "480p" / "train-00001").iterdir())[0]
        shutil.copy(first.with_name(sorted(p.name for p in first.parent.iterdir())[5]), first)
    else:
        options += ["--draws", "2"] if change == "draws" else ["--dtype", "bf16"]
    main(["--run", str(run), *options])
    assert sorted(made) == (["train-00001"] if change == "video" else [f"train-0000{n}" for n in range(3)])
    after = {path: data for path, data in files(run / "cache").items() if path.parts[0].startswith("slots")}
    assert before.items() < after.items()


def test_prune_deletes_other_recipes_alone(cached, tmp_path):
    run = shutil.copytree(cached, tmp_path / "run")
    main(["--run", str(run), "--stage", "image", "--no-flip"])
    main(["--run", str(run), "--draws", "1"])
    assert len(list((run / "cache").iterdir())) == 6
    main(["--run", str(run), "--prune"])
    remaining = files(run / "cache")
    assert {path.parts[0] for path in files(cached / "cache")} < {path.parts[0] for path in remaining}
    assert len(list((run / "cache").iterdir())) == 4


def test_features_are_cached_before_the_first_training(tmp_path, scenes, image_options, monkeypatch):
    run, same = tmp_path / "run", ["--frame-size", "64", "96", "--num-videos", "3", "--precision", "fp32"]
    main(["--run", str(run), "--stage", "image", "--root", str(scenes), *same])
    monkeypatch.setattr(FeatureMaker, "make", lambda *_: pytest.fail("features were made again"))
    train(["--run", str(run), *image_options])


def start(run, *options, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "interpreter.cache", "--run", str(run), *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", **environment},
    )


def test_killed_command_resumes_with_the_same_files(cached, tmp_path):
    run = shutil.copytree(cached, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    for _ in range(2):
        process = start(run, "--workers", "1")
        moment = time.monotonic() + 60
        known = len(list(run.glob("cache/slots-*/*")))
        while len(list(run.glob("cache/slots-*/*"))) <= known and process.poll() is None and time.monotonic() < moment:
            time.sleep(0.001)
        time.sleep(random.random() / 20)  # another moment in each run of the test: it must not matter
        process.kill()
        process.wait()
        process.stderr.close()
    assert set(files(run / "cache")) <= set(files(cached / "cache"))
    main(["--run", str(run)])
    assert files(run / "cache") == files(cached / "cache")
    # A kill may leave a temporary file of recipe.json, which no program reads: another process may be writing it.
    assert not [path for path in run.glob("cache/*/.*") if not path.name.startswith(".recipe.json.")]


def test_complete_cache_that_may_not_be_written_is_used(cached, tmp_path, monkeypatch):
    """Its folder belongs to another user, whose command was killed."""
    run = shutil.copytree(cached, tmp_path / "run")
    file = next(run.glob("cache/slots-*/*.safetensors"))
    left = file.with_name(f".{file.name}.0.tmp")
    left.touch()

    def refuse_in(folder, function):
        def refuse(path, *arguments, **options):
            if path.is_relative_to(folder):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *arguments, **options)

        return refuse

    for owner, name in (locks, "_open"), (Path, "unlink"):
        monkeypatch.setattr(owner, name, refuse_in(run / "cache", getattr(owner, name)))
        main(["--run", str(run)])
        monkeypatch.undo()
    assert left.exists()
    main(["--run", str(run)])
    assert not left.exists()


def test_two_ranks_make_together_what_one_makes(cached, tmp_path):
    run = shutil.copytree(cached, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    processes = [start(run, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    texts = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert "share 1 of 2 is done" in texts[0]
    # Both read the scenes, one at a time: the second may print that it waits. It prints nothing else.
    assert [line for line in texts[1].splitlines() if not line.startswith("waiting for ")] == []
    assert files(run / "cache") == files(cached / "cache")


def test_signal_keeps_what_is_finished_and_says_so(cached, tmp_path):
    run = shutil.copytree(cached, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    process = start(run, "--workers", "1")
    text = ""
    for line in process.stderr:
        text += line
        if "to make" in line:
            break
    process.send_signal(signal.SIGINT)
    text += process.communicate()[1]
    assert process.returncode == 130
    assert "stopped by SIGINT. What is finished is saved. Rerun the same command to continue." in text
    main(["--run", str(run)])
    assert files(run / "cache") == files(cached / "cache")


def test_disk_too_small_is_one_line_and_loses_nothing(cached, small_disk):
    disk = small_disk("64k")
    (disk / "kept").write_bytes(b"kept")
    process = start(cached, "--cache", str(disk / "cache"))
    text = process.communicate()[1]
    assert process.returncode == 1
    assert re.search(r"error: the image slots need .* MB, but \S+/cache has 0\.06\d* MB free; give --cache DIR", text)
    assert "Traceback" not in text
    assert [path.name for path in disk.iterdir()] == ["kept"]


def test_video_stage_trains_from_a_cache_of_its_own(cached, tmp_path, video_options):
    run = shutil.copytree(cached, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    train(["--run", str(run), *video_options, "--features", "stored", "--cache", str(tmp_path / "own")])
    assert files(tmp_path / "own") == files(cached / "cache")
    assert not (run / "cache").exists()


def test_old_name_of_draws_works_with_a_warning(cached):
    with pytest.warns(FutureWarning, match="^--samples is now --draws$"):
        assert parse(["--run", str(cached), "--samples", "3"])[1].draws == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draws", "0"], "--draws must be at least 1, got 0"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--frame-size", "32", "32"], r"was trained on .* at frame size \(64, 96\); leave .* --frame-size out"),
        (["--stage", "image", "--frame-size", "64", "90"], "--frame-size 64 96"),
        (["--data", "folder", "--root", "/nowhere"], "/nowhere"),
        (["--crop", "random", "--frame-size", "64", "64"], r"random squares .*cannot be stored; use --crop central"),
        (["--stage", "image", "--output", "keys"], "--output keys: efficientnet-lite0 has no self-attention"),
    ],
)
def test_wrong_options_are_refused(options, message, cached):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(["--run", str(cached), *options])


@pytest.mark.parametrize("preset", ["demo", "davis", "ytvis19", "movi-e"])
def test_cache_of_a_stage_that_has_not_begun_is_that_of_its_preset(preset, tmp_path):
    chosen, config = parse(["--run", str(tmp_path / "run"), "--stage", "video", "--preset", preset])
    stage, options = stage_options(config, config.run, chosen)
    assert options.model == stage.presets[preset].model


def test_run_without_image_stage_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"interpreter.train --run"):
        main(["--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_cache_that_is_a_file_is_refused(cached, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; --cache takes a directory"):
        main(["--run", str(cached), "--cache", str(tmp_path / "file")])


def test_other_tools_can_read_the_files(cached):
    path = next((cached / "cache").glob("slots-*/*.safetensors"))
    tensors = load_file(path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "slots": (FRAMES, 4, 4, 16),
        "attention": (FRAMES, 4, 24, 4),
    }
    recipe = json.loads((path.parent / "recipe.json").read_text())
    assert recipe["samples"] == 4
    assert recipe["frame_size"] == [64, 96]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--preset", "ytvis19", "--help"])
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "(here: ytvis19)" in text
    assert "torchrun --nproc-per-node 8 -m -- interpreter.cache" in text
    assert "--frame-size INT INT Height and width" in text
    assert "(default: 336 504)" in text
    assert re.findall(r"--[\w-]+(?: [A-Z{|]\S*)* \(default: ", text) == []  # a default without a word before it


@pytest.mark.slow
def test_ray_makes_the_same_files_and_names_damaged_videos(cached, scenes, tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]' fsspec")
    videos, out = tmp_path / "videos", tmp_path / "out"
    for number in range(3):
        shutil.copytree(scenes / "JPEGImages" / "480p" / f"train-0000{number}", videos / str(number))
    (videos / "broken.mp4").write_bytes(b"nothing")
    urls = ["--source", f"file://{videos}", "--out", f"file://{out}"]
    for made in (6, 0):
        process = start(cached, "--engine", "ray", *urls)
        text = process.communicate()[1]
        assert process.returncode == 1
        assert f"{made} files made, 4 videos looked at" in text
        assert made == 0 or "workers: 2" in text
        assert re.search(r"error: 1 of 4 videos were left out: broken\.mp4", text)
        assert files(out) == files(cached / "cache")
        assert not list(out.glob("*/*.tmp"))


@pytest.mark.parametrize("options", [["--crop", "central", "--frame-size", "64", "64"], ["--crop-borders"]])
def test_ray_refuses_to_crop(options, cached):
    with pytest.raises(ValueError, match="--engine ray encodes whole frames"):
        main(["--run", str(cached), "--engine", "ray", "--source", "a", "--out", "b", *options])


def test_ray_without_urls_names_the_options(cached):
    with pytest.raises(ValueError, match=r"--engine ray needs --source URL .* and --out URL"):
        main(["--run", str(cached), "--engine", "ray"])
