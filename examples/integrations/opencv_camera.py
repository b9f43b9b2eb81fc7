"""Segment a camera that OpenCV reads: a number of frames at once, or window by window as they arrive.

    python examples/integrations/opencv_camera.py 0 RUN OUT           # the first camera
    python examples/integrations/opencv_camera.py clip.mp4 RUN OUT    # a file instead of a camera

RUN is a trained run (make integrations trains a small one), and OUT a folder for the results.
"""

import itertools
import json
import sys
from pathlib import Path

import cv2
import numpy as np

import interpreter

clip, run, out = sys.argv[1:]
source = int(clip) if clip.isdigit() else clip

# 24 frames at once. read_frames converts OpenCV's BGR to RGB. An islice has no frame rate, so pass it as fps.
camera = cv2.VideoCapture(source)
frames = itertools.islice(interpreter.read_frames(camera), 24)
result = interpreter.segment_video(frames, run, Path(out, "clip"), fps=camera.get(cv2.CAP_PROP_FPS) or 30)
assert len(result.segmentation) == 24
camera.release()

# An array that you converted yourself gives the same labels.
if not clip.isdigit():
    camera = cv2.VideoCapture(source)
    pixels = np.stack([cv2.cvtColor(camera.read()[1], cv2.COLOR_BGR2RGB) for _ in range(24)])
    labels = np.stack(list(interpreter.segment_video(pixels, run).labels()))
    assert (labels == np.stack(list(result.labels()))).all()
    camera.release()

# A stream without an end: labels are written as frames arrive, until the camera stops or you press Ctrl-C.
camera = cv2.VideoCapture(source)
stream = interpreter.segment_stream(camera, run, Path(out, "stream"), window=12, masks_from="slots")
camera.release()
about = json.loads(Path(out, "stream/stream.json").read_text())
assert stream.frames == about["frames"] == len(list(Path(out, "stream/Annotations/stream").iterdir()))
print(f"OpenCV: 24 frames at once, then {stream.frames} in windows of {stream.window} as they came")
