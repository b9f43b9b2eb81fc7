"""Segment what TorchCodec decodes: pass the decoder itself, a batch, or frame by frame, without a copy on disk.

    python examples/integrations/torchcodec_frames.py clip.mp4 RUN OUT

RUN is a trained run (make integrations trains a small one), and OUT a folder for the results.
"""

import sys

import numpy as np
from torchcodec.decoders import VideoDecoder

import interpreter

clip, run, out = sys.argv[1:]

result = interpreter.segment_video(VideoDecoder(clip), run, out)  # has a frame rate
labels = np.stack(list(result.labels()))

# Everything that TorchCodec returns, and a plain array of its pixels, give the same label maps.
batch = VideoDecoder(clip).get_all_frames()  # FrameBatch, [T, 3, H, W]
pixels = VideoDecoder(clip, dimension_order="NHWC").get_all_frames().data.numpy()
ways = {
    "FrameBatch": batch,
    "tensor [T, 3, H, W]": batch.data,
    "iterator of tensors": iter(VideoDecoder(clip)),
    "list of Frame": [VideoDecoder(clip).get_frame_at(number) for number in range(len(batch))],
    "array [T, H, W, 3]": pixels,
}
for name, frames in ways.items():
    same = np.stack(list(interpreter.segment_video(frames, run).labels()))
    assert (same == labels).all(), name
assert abs(float(result.video.fps) - VideoDecoder(clip).metadata.average_fps) < 0.01
print(f"TorchCodec: {len(labels)} frames at {result.video.fps} fps, the same labels in {len(ways)} other ways")
