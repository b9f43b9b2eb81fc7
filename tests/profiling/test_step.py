"""Training steps for profilers, and the scripts that trace them, run without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from profiling.common.setups import FEATURES, random_backbone, setup
from profiling.step import Options, run

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("stage", ["image", "video"])
def test_a_streamed_step_is_timed_and_broken_down(stage, recorded_ranges):
    results = run(Options(stage=stage, device="cpu", batch_size=1, steps=2, streamed=True, breakdown=True))
    assert results["frames"] == (1 if stage == "image" else 24)
    times = results["milliseconds"]
    assert 0 < times["least"] <= times["median"] <= times["greatest"]
    shares = [row["share"] for row in results["breakdown"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1 + 1e-9
    assert any("mm" in row["name"] for row in results["breakdown"])
    ranges = recorded_ranges[0]
    assert ranges.count((0, "loader")) == ranges.count((0, "step")) == 2 + 2 + 1  # first ones, timed ones, breakdown
    assert ranges.count((1, "backbone")) == 5


@pytest.mark.parametrize("preset", ["demo", "davis", "ytvis19"])
def test_inputs_are_as_large_as_what_the_backbone_gives(preset):
    stage_setup = setup("image", preset, CPU, batch_size=1)
    backbone = random_backbone(stage_setup.image.backbone, CPU)
    assert (backbone.dim, backbone.patch) == FEATURES[stage_setup.image.backbone.backbone]
    assert stage_setup.grid == backbone.grid(stage_setup.image.data.frame_size)
    assert stage_setup.shapes[0] == (1, stage_setup.grid[0] * stage_setup.grid[1], backbone.dim)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "captured"}, "--mode captured"),
        ({"cuda_profiler": True}, "--cuda-profiler need --device cuda"),
        ({"steps": 0}, "--steps must be at least 1"),
        pytest.param(
            {"device": "cuda"},
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_options_that_the_device_lacks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(Options(**{"device": "cpu", **options}))


@pytest.mark.parametrize(
    ("script", "tool", "arguments"), [("nsys_step.sh", "nsys", []), ("ncu_kernel.sh", "ncu", ["forward_kernel"])]
)
def test_without_its_tool_a_script_says_so_and_takes_a_step(script, tool, arguments, tmp_path):
    if shutil.which(tool) and torch.cuda.is_available():
        pytest.skip(f"{tool} is here")
    command = [ROOT / "profiling" / "gpu" / script, *arguments, "--stage", "video", "--mode", "captured"]
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "missing: " in done.stderr
    head, results = done.stdout.split("\n", 1)
    assert head.startswith("dry run")
    assert json.loads(results)["stage"] == "video"
    assert not list(tmp_path.iterdir())


def test_traces_are_kept_out_of_git_and_summaries_are_not():
    command = ["git", "check-ignore", "--no-index"]
    names = ["step.nsys-rep", "step.sqlite", "kernel.ncu-rep", "nsys_nvtx_sum.csv", "ncu-raw.csv"]
    paths = [f"profiling/results/{name}" for name in names]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert ignored == paths[:3]
