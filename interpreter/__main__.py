"""All commands in one: ``interpreter train …`` is ``python -m interpreter.train …``."""

import argparse
import runpy
import sys
from collections.abc import Sequence

import interpreter

COMMANDS = {
    "train": "train a stage of a method, such as the image stage and then the video stage",
    "segment": "segment a video with a trained run: masks, an overlay and the slots",
    "app": "serve a page for the browser: drop a video in, see its segments, correct them",
    "propagate": "find the objects of a first frame's mask in all later frames, and score this on data sets",
    "evaluate": "score a trained run, or masks of any other method, with named protocols",
    "cache": "compute features or slots before training, in one or several processes",
    "data": "check a data set, or convert it",
    "hub": "upload a run to the Hugging Face hub, or download one; other commands take --run hub:OWNER/NAME",
    "export": "write a trained run as programs for PyTorch, ONNX Runtime or C++",
    "convert_checkpoint": "convert a published checkpoint of Slot Contrast or VideoSAUR to a run",
}
EXAMPLES = """\
examples:
  interpreter train --stage image --run runs/mine --data folder --root VIDEOS
  interpreter segment clip.mp4 --run runs/mine --out out

'interpreter COMMAND --help' explains every option of a command. 'python -m interpreter.COMMAND' is the same command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first word names, as ``python -m interpreter.COMMAND`` would; it exits the process."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="interpreter",
        usage="interpreter COMMAND [OPTIONS]",
        description="\n".join(["Object-centric learning for videos.", "", "commands:", *lines]),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"interpreter {interpreter.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    command = parser.parse_args(words[:1]).command
    sys.argv[1:] = words[1:]
    runpy.run_module(f"interpreter.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
