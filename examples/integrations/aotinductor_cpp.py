"""AOTInductor and C++: a run is exported and compiled, a C++ program segments a clip with it, and the label maps are
those of the run in Python.

    python examples/integrations/aotinductor_cpp.py clip.mp4 RUN OUT

RUN is a trained run (make integrations trains a small one), OUT a folder for the results.
"""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from interpreter.data import open_video
from interpreter.export.__main__ import main as export

SLOTS, SOURCES = 22, Path(__file__).parents[1] / "cpp"
clip, run, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
programs, build, maps = out / "programs", out / "build", out / "maps"

export([run, "--out", str(programs), "--format", "torch", "aoti"])
prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
subprocess.run(["cmake", "-S", SOURCES, "-B", build, prefix], check=True, stdout=subprocess.DEVNULL)
subprocess.run(["cmake", "--build", build], check=True, stdout=subprocess.DEVNULL)

listed = json.loads((programs / "programs.json").read_text())
shapes = {p["name"]: {i["name"]: i["shape"] for i in p["inputs"]} for p in listed["programs"]}
frames = np.stack(list(itertools.islice(open_video(clip).frames(tuple(listed["frame_size"])), 20)))
shutil.rmtree(maps, ignore_errors=True)
subprocess.run([build / "segment", programs, str(SLOTS), maps], input=frames.tobytes(), check=True)


def load(name):
    """A program as a function of tensors."""
    return torch.export.load(programs / f"{name}.pt2").module()


with torch.inference_mode():
    features = load("backbone")(torch.from_numpy(frames))
    torch.manual_seed(0)  # the same draws as in C++
    noise = torch.randn([{"T": len(frames), "N": SLOTS}.get(size, size) for size in shapes["image_stage"]["noise"]])
    slots, attention, means = load("image_stage")(features, noise)
    inputs = slots if "slots" in shapes["video_stage"] else means
    masks = load("video_stage")(inputs, attention, torch.randn(shapes["video_stage"]["noise"]))[3]
    labels = load("labels")(masks).numpy()
in_cpp = np.stack([np.asarray(Image.open(maps / f"{number:05d}.pgm")) for number in range(len(frames))])
agree = (in_cpp == labels).mean()
assert agree > 0.999, agree
print(f"AOTInductor: {len(frames)} frames segmented in C++, {agree:.2%} of the labels are those of Python")
