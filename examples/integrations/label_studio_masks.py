"""Write brush masks for Label Studio, and compare every mask that its SDK decodes, pixel by pixel.

    python examples/integrations/label_studio_masks.py clip.mp4 RUN OUT

To correct the masks by hand:

    LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=$PWD/OUT/label-studio \\
        label-studio start

Then create a project with config.xml as its labelling interface, add OUT/label-studio/images as a source storage of
local files (you need not sync it), and import tasks.json.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
from label_studio_sdk.converter.brush import decode_rle
from label_studio_sdk.label_interface import LabelInterface

import interpreter
from interpreter.data import open_video

clip, run, out = sys.argv[1:]

# Every mask is decoded in pure Python below, so only a few frames are segmented.
frames = itertools.islice(open_video(clip).frames(), 6)
result = interpreter.segment_video(frames, run, out, formats=["label-studio"])

folder = Path(out, "label-studio")
interface = LabelInterface((folder / "config.xml").read_text())
interface.validate()
tasks = json.loads((folder / "tasks.json").read_text())
count = 0
for task, labels in zip(tasks, result.labels(), strict=True):
    assert interface.validate_task({"data": task["data"]})
    assert (folder / task["data"]["image"].split("?d=")[1]).exists()
    painted = np.zeros_like(labels)
    (prediction,) = task["predictions"]
    assert interface.validate_prediction(prediction, return_errors=True) == []
    for mask in prediction["result"]:
        pixels = decode_rle(mask["value"]["rle"]).reshape(*labels.shape, 4)[..., 3]
        painted[pixels > 0] = int(mask["value"]["brushlabels"][0])
        count += 1
    assert (painted == labels + 1).all()
print(f"Label Studio: {count} masks in {len(tasks)} tasks valid for config.xml, equal pixel by pixel")
