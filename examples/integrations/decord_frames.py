"""Segment what decord decodes: pass the reader itself, a batch, or frame by frame, also with its bridge to PyTorch.

    python examples/integrations/decord_frames.py clip.mp4 RUN OUT

RUN is a trained run (make integrations trains a small one), and OUT a folder for the results.
"""

import sys

import decord
import numpy as np

import interpreter

clip, run, out = sys.argv[1:]

reader = decord.VideoReader(clip)
result = interpreter.segment_video(reader, run, out)  # has a frame rate
labels = np.stack(list(result.labels()))

everything = range(len(reader))
ways = {
    "NDArray [T, H, W, 3]": reader.get_batch(everything),
    "list of NDArray": [reader[number] for number in everything],
    "array [T, H, W, 3]": reader.get_batch(everything).asnumpy(),
}
decord.bridge.set_bridge("torch")  # from here on the reader returns tensors
ways |= {"tensor [T, H, W, 3]": reader.get_batch(everything), "reader of tensors": reader}
for name, frames in ways.items():
    same = np.stack(list(interpreter.segment_video(frames, run).labels()))
    assert (same == labels).all(), name
assert abs(float(result.video.fps) - reader.get_avg_fps()) < 0.01
print(f"decord: {len(labels)} frames at {result.video.fps} fps, the same labels in {len(ways)} other ways")
