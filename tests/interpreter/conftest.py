"""Fixtures of the training, evaluation and segmentation tests."""

import os

# Set before anything imports huggingface_hub: no test needs the network, so none may wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"

import shutil
import subprocess

import pytest
import torch

IMAGE_OPTIONS = (
    "--num-videos 3 --frame-size 64 96 --dim 16 --num-slots 4 --heads 2 --decoder-layers 1 --batch-size 4 "
    "--steps 3 --warmup-steps 2 --log-every 1 --precision fp32"
)
VIDEO_OPTIONS = (
    "--stage video --dim 16 --num-slots 3 --heads 2 --encoder-layers 1 --decoder-layers 1 --batch-size 2 "
    "--num-frames 5 --steps 3 --warmup-steps 2 --log-every 1 --precision fp32 --inputs slots --decoder transformer "
    "--merge-threshold 0.05 --inference-iterations 6 --inference-sharpness 1 --restarts 8 --peak-lr 4e-4"
)


@pytest.fixture(scope="session", autouse=True)
def _repeatable():
    """Two processes agree bit for bit only if they split sums in the same way; on a GPU this has to be switched on."""
    from interpreter.engine.randomness import repeatable

    torch.set_num_threads(1)
    repeatable(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Root of generated scenes, 128x192 pixels and 24 frames: 3 in train, 2 in val."""
    from interpreter.data.scenes.generate import generate_scenes

    root = tmp_path_factory.mktemp("scenes")
    generate_scenes(root, 3, workers=1, split="train")
    generate_scenes(root, 2, workers=1, split="val")
    return root


@pytest.fixture(scope="session")
def image_options(scenes):
    """Options of a tiny image stage, all but --run."""
    return [*IMAGE_OPTIONS.split(), "--root", str(scenes)]


@pytest.fixture(scope="session")
def video_options():
    """Options of a tiny video stage, all but --run."""
    return VIDEO_OPTIONS.split()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, image_options, video_options):
    """A run directory with both stages trained for 3 steps on 3 tiny scenes. Read only: copy it to change it."""
    from interpreter.train import main

    run = tmp_path_factory.mktemp("tiny") / "run"
    main(["--run", str(run), *image_options])
    main(["--run", str(run), *video_options])
    config = (run / "config.json").read_bytes()
    yield run
    assert (run / "config.json").read_bytes() == config, "a test changed tiny_run: it has to copy it first"


@pytest.fixture
def image_run(tiny_run, tmp_path):
    """image_run(name) -> a new run with the image stage of `tiny_run`, and without a video stage."""

    def make(name="run"):
        return shutil.copytree(
            tiny_run, tmp_path / name, ignore=shutil.ignore_patterns("video", "evaluation", "tensorboard", "samples")
        )

    return make


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(size) -> folder on a file system of its own with that many bytes."""
    mounted = []

    def mount(size):
        folder = tmp_path / "small-disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a small disk needs root and the right to mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)
