"""Run exported programs without this package, in C++ (AOTInductor), ONNX Runtime and PyTorch: equal label maps.

    python examples/integrations/exported_run.py clip.mp4 RUN OUT

RUN is a trained run (make integrations trains a small one), and OUT a folder for the results.
Needs a C++ compiler.
"""

import itertools
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

from interpreter.data import open_video
from interpreter.export.__main__ import main as export

SLOTS, FRAMES, SOURCES = 22, 20, Path(__file__).parents[1] / "cpp"
CMAKE = [sys.executable, "-m", "cmake"] if find_spec("cmake") else ["cmake"]
clip, run, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
programs, build, maps = out / "programs", out / "build", out / "maps"

export([run, "--out", str(programs), "--format", "torch", "onnx", "aoti"])
listed = json.loads((programs / "programs.json").read_text())
frames = np.stack(list(itertools.islice(open_video(clip).frames(tuple(listed["frame_size"])), FRAMES)))
shapes = {p["name"]: {i["name"]: i["shape"] for i in p["inputs"]} for p in listed["programs"]}
torch.manual_seed(0)  # as segment.cpp does
sizes = {"T": FRAMES, "N": SLOTS}
noise = [torch.randn([sizes.get(s, s) for s in shapes[p]["noise"]]) for p in ("image_stage", "video_stage")]
noise = [draws.numpy() for draws in noise]


def segment(load):
    """Label maps [T, H, W]. ``load`` returns a program by its name; a program maps arrays to a list of arrays."""
    (features,) = load("backbone")(frames)
    slots, attention, means = load("image_stage")(features, noise[0])
    inputs = slots if "slots" in shapes["video_stage"] else means
    *_, masks = load("video_stage")(inputs, attention, noise[1])
    return load("labels")(masks)[0]


def in_pytorch(name):
    """A program of torch.export."""
    module = torch.export.load(programs / f"{name}.pt2").module()

    def call(*arrays):
        with torch.no_grad():
            found = module(*map(torch.from_numpy, arrays))
        return [tensor.numpy() for tensor in (found if isinstance(found, tuple) else (found,))]

    return call


def in_onnx_runtime(name):
    """A program of ONNX."""
    session = onnxruntime.InferenceSession(programs / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return lambda *arrays: session.run(None, dict(zip(shapes[name], arrays, strict=True)))


def in_cpp():
    """What examples/cpp/segment.cpp writes."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for arguments in (["-S", SOURCES, "-B", build, prefix, "-Wno-dev"], ["--build", build]):
        subprocess.run([*CMAKE, *arguments], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(maps, ignore_errors=True)
    command = [build / "segment", programs, str(SLOTS), maps]
    subprocess.run(command, input=frames.tobytes(), check=True, stdout=subprocess.DEVNULL)
    return np.stack([np.asarray(Image.open(maps / f"{number:05d}.pgm")) for number in range(FRAMES)])


labels = segment(in_pytorch)
agree = {"ONNX Runtime": (segment(in_onnx_runtime) == labels).mean(), "C++": (in_cpp() == labels).mean()}
assert labels.max() > 0
assert min(agree.values()) > 0.99, agree
print(f"export: {FRAMES} frames; labels as in PyTorch: {', '.join(f'{n} {share:.2%}' for n, share in agree.items())}")
