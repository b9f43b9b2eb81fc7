"""Generate scenes as a data set: ``python -m interpreter.data.synthetic --help``."""

import inspect

import tyro

from interpreter.commands import RESUME, run_command
from interpreter.data.scenes import generate_scenes

EXAMPLES = """Examples:
  python -m interpreter.data.synthetic --root SCENES
  python -m interpreter.data.synthetic --root SCENES --num-videos 20 --split val"""


def main() -> int:
    """The command line."""
    about = (inspect.getdoc(generate_scenes) or "").partition("\n\n>>>")[0]
    tyro.cli(generate_scenes, prog="python -m interpreter.data.synthetic", description=f"{about}\n\n{EXAMPLES}")
    return 0


if __name__ == "__main__":
    run_command(main, stopped=RESUME)
