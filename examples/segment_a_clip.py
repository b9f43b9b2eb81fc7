"""Segment a clip with a trained run, and use the label maps and the slots in Python.

    python examples/segment_a_clip.py clip.mp4 runs/example out

The run comes from examples/train_on_a_folder.py, `make demo` (demo/scenes, demo/clip) or python -m interpreter.train.
The folder out gets an overlay video, palette PNGs, masks as run-length codes, and the slots (docs/use/segment.md).
"""

import argparse

import numpy as np

import interpreter

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("clip", help="video file, or folder of numbered frames")
parser.add_argument("run", help="directory of a trained run")
parser.add_argument("out", help="directory for the results")
options = parser.parse_args()

result = interpreter.segment_video(options.clip, run=options.run, out=options.out)

# labels() yields one label map per frame: uint8 [H, W]. Each pixel is the number of its segment, counted from 0.
count = result.segmentation.num_segments
areas, sizes = np.zeros(count, dtype=np.int64), []
for labels in result.labels():
    present = np.bincount(labels.ravel(), minlength=count)
    areas += present
    sizes.append(np.count_nonzero(present))
for segment, share in enumerate(areas / areas.sum()):
    print(f"segment {segment}: {share:.1%} of all pixels")
print(f"segments in a frame: {min(sizes)} to {max(sizes)}")

# An image slot [D] describes one part of one frame. Each frame has N image slots.
slots = result.segmentation.tensors["image_slots"]
print(f"image slots: {slots.shape[0]} frames of {slots.shape[1]} slots of width {slots.shape[2]}")
