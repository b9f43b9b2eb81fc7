"""Segment a camera that PyAV opens, such as av.open("/dev/video0", format="v4l2").

Here FFmpeg's test picture, which never ends, replaces the camera.

    python examples/integrations/pyav_camera.py clip.mp4 RUN OUT

RUN is a trained run (make integrations trains a small one), and OUT a folder for the results.
"""

import itertools
import sys
from pathlib import Path

import av
import numpy as np

import interpreter

clip, run, out = sys.argv[1:]

# 12 frames of a source without an end. An islice has no frame rate, so pass it as fps.
with av.open("testsrc=size=192x128:rate=25", format="lavfi") as camera:
    frames = itertools.islice(interpreter.read_frames(camera), 12)
    result = interpreter.segment_video(frames, run, Path(out, "clip"), fps=25)
assert (len(result.segmentation), result.video.height, result.video.fps) == (12, 128, 25)

# Window by window as they arrive.
with av.open("testsrc=size=192x128:rate=25", format="lavfi") as camera:
    frames = itertools.islice(interpreter.read_frames(camera), 40)
    stream = interpreter.segment_stream(frames, run, Path(out, "stream"), fps=25, window=12, masks_from="slots")
assert (stream.frames, stream.cut) == (40, "")

# The container of a file gives the same labels as the path of the file, bit for bit.
with av.open(clip) as container:
    opened = np.stack(list(interpreter.segment_video(container, run).labels()))
assert (opened == np.stack(list(interpreter.segment_video(clip, run).labels()))).all()
print(f"PyAV: 12 frames at once, {stream.frames} in windows as they came, {len(opened)} of a file as by its path")
