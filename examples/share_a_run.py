"""Share a trained run on the Hugging Face hub, and use it by its name.

    hf auth login
    python examples/share_a_run.py runs/example OWNER/NAME clip.mp4 out

The run comes from examples/train_on_a_folder.py or python -m interpreter.train. If the repository does not exist, this
program creates a private one. It uploads the weights, the options without the paths of this computer, and a model card.
Check them, then make the repository public in its settings on the hub. See docs/use/hub.md.
"""

import argparse

import interpreter
from interpreter.hub.pushing import push_run

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", help="directory of a trained run")
parser.add_argument("name", help="repository, OWNER/NAME")
parser.add_argument("clip", help="video file, or folder of numbered frames")
parser.add_argument("out", help="directory for the results")
parser.add_argument("--license", default="apache-2.0", help="licence of the weights, by the hub's identifier")
options = parser.parse_args()

pushed = push_run(options.run, options.name, license=options.license, private=True)
print(f"shared: {pushed.url}")

# pushed.name contains the commit, so it always selects these weights. hub:OWNER/NAME alone selects the newest ones.
result = interpreter.segment_video(options.clip, run=str(pushed.name), out=options.out)
print(f"{pushed.name} finds {result.segmentation.num_segments} segments in {result.video.name}")
