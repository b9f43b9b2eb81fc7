"""Train both stages on a folder of videos, without labels.

    python examples/train_on_a_folder.py VIDEOS runs/example

VIDEOS is a folder with video files, folders of numbered frames, or both, at any depth. The defaults take about a minute
on two cores and only show that everything works. Real training takes thousands of steps (docs/use/training.md). If you
interrupt it, rerun the same command to resume. Next, run examples/segment_a_clip.py.
"""

import argparse

from interpreter.train import main as train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("videos", help="folder of videos")
parser.add_argument("run", help="directory for the weights, curves and pictures of the run")
parser.add_argument("--image-steps", default="60", help="optimiser steps of the image stage (default: 60)")
parser.add_argument("--video-steps", default="30", help="optimiser steps of the video stage (default: 30)")
parser.add_argument("--frame-size", nargs=2, default=["96", "144"], metavar=("HEIGHT", "WIDTH"))
options = parser.parse_args()

# The image stage compresses the frozen features of single frames into image slots.
data = ["--data", "folder", "--root", options.videos, "--frame-size", *options.frame_size]
schedule = ["--steps", options.image_steps, "--warmup-steps", "10"]
train(["--stage", "image", "--run", options.run, *data, "--num-slots", "6", *schedule])

# The video stage compresses the image slots of all frames of a video into video slots: one per object.
clips = ["--num-frames", "12", "--batch-size", "4"]
schedule = ["--steps", options.video_steps, "--warmup-steps", "10"]
train(["--stage", "video", "--run", options.run, "--num-slots", "5", *clips, *schedule])
