"""Kill a training at random moments, resume it, and compare its final weights with those of an uninterrupted one.

    python -m profiling.kills --out profiling/results/kills-cpu.json
    python -m profiling.kills --kills 2 --steps 400 --longest 6    # a short run

It trains both stages of a tiny run on generated scenes, with cached features and slots. Kills can happen in every
phase: start, encoding, steps, pictures and checkpoints.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load_file

from interpreter.data.scenes.generate import generate_scenes
from interpreter.engine.checkpoint import checkpoints, load_checkpoint
from profiling.common.machine import machine, save

SIZES = "--dim 16 --num-slots 4 --heads 2 --decoder-layers 1 --batch-size 4 --precision fp32 --checkpoint-every 50"
IMAGE = f"--stage image --num-videos 12 --frame-size 64 96 {SIZES}"
VIDEO = f"--stage video --num-frames 5 --encoder-layers 1 {SIZES}"


def start(run: Path, options: str, steps: int) -> subprocess.Popen:
    """The training command as a process."""
    arguments = ["--run", str(run), *options.split(), "--steps", str(steps)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "interpreter.train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def finish(run: Path, options: str, steps: int) -> None:
    """Train to the end without a kill."""
    process = start(run, options, steps)
    _, text = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{options}: {text}")


def killed(run: Path, options: str, steps: int, kills: int, longest: float, progress: Progress) -> list[int]:
    """Start the command and kill it after random times; returns the step of the newest checkpoint after each kill."""
    stage, resumed_from = options.split()[1], list[int]()
    bar = progress.add_task(f"{stage} stage", total=kills)
    while len(resumed_from) < kills:
        process = start(run, options, steps)
        try:
            process.communicate(timeout=random.uniform(0, longest))
            raise RuntimeError(f"the {stage} stage ended after {len(resumed_from)} kills; give it more --steps")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        newest = load_checkpoint(run / stage)  # raises if it is damaged
        resumed_from.append(newest.step if newest else 0)
        progress.advance(bar)
    return resumed_from


def equal(one: Path, other: Path, stage: str) -> bool:
    """Whether the last checkpoints hold the same numbers, bit for bit."""
    first, second = (load_file(checkpoints(run / stage)[-1]) for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills of each stage (default: 50)")
    parser.add_argument("--steps", type=int, default=4000, help="steps of each stage (default: 4000)")
    parser.add_argument("--longest", type=float, default=12.0, help="seconds until the latest kill (default: 12)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    what = "training killed at random moments, its end compared with an undisturbed run"
    results: dict[str, object] = {"what": what, **machine("cpu"), "steps": options.steps}
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        home = Path(folder)
        generate_scenes(home / "scenes", 12, workers=1)
        whole, broken = home / "whole", home / "broken"
        for stage, arguments in (("image", f"{IMAGE} --root {home / 'scenes'}"), ("video", VIDEO)):
            finish(whole, arguments, options.steps)
            begun = time.perf_counter()
            steps = killed(broken, arguments, options.steps, options.kills, options.longest, progress)
            finish(broken, arguments, options.steps)
            same = equal(whole, broken, stage)
            results[stage] = {"kills": len(steps), "checkpoint after each": steps, "equal bit for bit": same}
            print(f"{stage} stage: {len(steps)} kills in {time.perf_counter() - begun:.0f} s, equal: {same}")
    if options.out:
        save(options.out, results)
    if not all(results[stage]["equal bit for bit"] for stage in ("image", "video")):  # type: ignore[index]
        sys.exit("a killed run ended with other weights")


if __name__ == "__main__":
    main()
