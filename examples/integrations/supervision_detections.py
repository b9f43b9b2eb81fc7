"""Convert segments to supervision.Detections; filter, measure and paint them with the tools of that package.

    python examples/integrations/supervision_detections.py clip.mp4 RUN OUT

RUN is a trained run (make integrations trains a small one), and OUT a folder for the results.
"""

import sys
from pathlib import Path

import numpy as np
import supervision as sv

import interpreter

clip, run, out = sys.argv[1:]

result = interpreter.segment_video(clip, run)

# One colour for each segment, the same in all frames.
masks = sv.MaskAnnotator(color_lookup=sv.ColorLookup.TRACK)
boxes = sv.BoxAnnotator(color_lookup=sv.ColorLookup.TRACK)
info = sv.VideoInfo(result.video.width, result.video.height, fps=round(result.video.fps))
Path(out).mkdir(parents=True, exist_ok=True)

count = 0
with sv.VideoSink(str(Path(out, "painted.mp4")), info) as sink:
    frames = result.video.frames()
    for frame, labels, detections in zip(frames, result.labels(), result.detections(), strict=True):
        painted = np.zeros_like(labels)
        for mask, number in zip(detections.mask, detections.tracker_id, strict=True):
            painted[mask] = number
        assert (painted == labels + 1).all()  # every pixel has one segment, counted from 1
        assert (detections.area == [(labels + 1 == number).sum() for number in detections.tracker_id]).all()
        small = detections[detections.area < 0.2 * labels.size]
        scene = boxes.annotate(masks.annotate(frame[..., ::-1].copy(), small), small)  # supervision writes BGR
        sink.write_frame(scene)
        count += len(detections)
assert sv.VideoInfo.from_video_path(str(Path(out, "painted.mp4"))).total_frames == len(result.segmentation)
print(f"supervision: {count} detections in {len(result.segmentation)} frames, equal to the label maps pixel by pixel")
