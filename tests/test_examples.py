"""Every program in examples/ runs, at small sizes, and prints what its docstring promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .interpreter.hub.small_hub import TOKEN, SmallHub, serving

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments, settings=None):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(settings or {})}
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


def test_every_example_is_short_and_has_a_test():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    lines = {name: [line for line in (EXAMPLES / name).read_text().splitlines() if line] for name in names}
    assert {name: len(code) for name, code in lines.items() if len(code) >= 60} == {}


@pytest.mark.slow
def test_a_run_trained_on_a_folder_segments_one_of_its_clips(tmp_path):
    from interpreter.data.scenes.generate import generate_scenes

    generate_scenes(tmp_path / "scenes", 2, size=(64, 96), num_frames=8, workers=1)
    videos, made = tmp_path / "scenes" / "JPEGImages" / "480p", tmp_path / "run"
    sizes = ("--image-steps", 4, "--video-steps", 3, "--frame-size", 64, 96)
    run("train_on_a_folder.py", videos, made, *sizes)
    clip = min(folder for folder in videos.iterdir() if folder.is_dir())
    printed = run("segment_a_clip.py", clip, made, tmp_path / "out")
    assert sum(numbers(r"segment \d+: ([\d.]+)%", printed)) == pytest.approx(100, abs=0.5)
    assert {path.name for path in (tmp_path / "out" / "Annotations" / clip.name).iterdir()} >= {"00000.png"}
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    hub = SmallHub()
    with serving(hub) as address:
        home = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        settings = home | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        printed = run("share_a_run.py", made, "owner/example", clip, tmp_path / "shared", settings=settings)
    assert re.search(rf"hub:owner/example@[0-9a-f]{{40}} finds \d+ segments in {clip.name}", printed)
    first = Path("Annotations") / clip.name / "00000.png"
    assert (tmp_path / "shared" / first).read_bytes() == (tmp_path / "out" / first).read_bytes()


def test_slot_attention_learns_in_a_model_of_ones_own():
    printed = run("slot_attention_in_your_model.py", "--steps", 200)
    first, last = numbers(r"error ([\d.]+)", printed)
    assert last < first < 0.2


def test_replaced_geomloss_gives_the_same_numbers():
    pytest.importorskip("geomloss", reason="geomloss is not installed")
    printed = run("replace_geomloss.py", "--steps", 5)
    before, after = numbers(r"step \d+: divergence ([\d.]+)", printed)
    assert after < before / 10
    (values,) = numbers(r"difference of the values: ([\d.e+-]+)", printed)
    (gradients,) = numbers(r"difference of the gradients: ([\d.e+-]+)", printed)
    assert values < 1e-4
    assert gradients < 1e-3
