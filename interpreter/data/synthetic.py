"""Generate scenes as a data set: ``python -m interpreter.data.synthetic --help``."""

import tyro

from interpreter.commands import RESUME, run_command
from interpreter.data.scenes import generate_scenes


def main() -> int:
    """The command line."""
    tyro.cli(generate_scenes, prog="python -m interpreter.data.synthetic")
    return 0


if __name__ == "__main__":
    run_command(main, stopped=RESUME)
