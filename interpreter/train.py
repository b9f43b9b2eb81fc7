"""Train a stage of a method: ``python -m interpreter.train --help``."""

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from interpreter.commands import RESUME, cli, parse_first, rename_options, run_command
from interpreter.configs import StageConfig
from interpreter.console import console
from interpreter.data.loaders import LoaderError
from interpreter.engine.distributed import ProcessLostError
from interpreter.engine.randomness import NotRepeatableError
from interpreter.engine.run import DEFAULT_METHOD, train_command
from interpreter.engine.trainer import DivergedError
from interpreter.methods import METHODS
from interpreter.methods.base import Method, Stage
from interpreter.training import train

PROG = "python -m interpreter.train"


def parse_stage(arguments: Sequence[str]) -> tuple[Method, Stage[Any], StageConfig]:
    """Parse the command line: first method, stage and preset, because all other defaults depend on them."""
    arguments = rename_options(arguments, {"--samples": "--draws"})
    chosen, rest = parse_first(arguments, PROG, method={"choices": METHODS, "default": DEFAULT_METHOD})
    method = METHODS[chosen.method]
    if not method.stages:
        raise ValueError(f"the method {method.name} has nothing to train; use it with python -m interpreter.segment")
    names = [stage.name for stage in method.stages]
    chosen, rest = parse_first(rest, PROG, stage={"choices": names, "default": names[0]})
    stage = method.stage(chosen.stage)
    chosen, rest = parse_first(rest, PROG, preset={"choices": list(stage.presets), "default": "demo"})
    defaults, last = stage.presets[chosen.preset], list(stage.presets.values())[-1]
    description = (
        f"{inspect.cleandoc(stage.config.__doc__ or '')}\n\n"
        f"The other options and their defaults depend on the three options below. To see those of another choice, put "
        f"it before --help, as in --method solv --help.\n"
        f"  --method {{{','.join(METHODS)}}} (here: {method.name})\n"
        f"  --stage {{{','.join(names)}}} (here: {stage.name})\n"
        f"  --preset {{{','.join(stage.presets)}}} (here: {chosen.preset})\n\n"
        f"Examples:\n"
        f"  {train_command(method.name, stage.name, defaults.run)}\n"
        f"  {train_command(method.name, stage.name, last.run)} --preset {list(stage.presets)[-1]} --compile"
    )
    return method, stage, cli(stage.config, rest, default=defaults, prog=PROG, description=description)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    method, stage, config = parse_stage(sys.argv[1:] if arguments is None else arguments)
    train(method, stage, config)
    console.print(f"{stage.key(config)} stage done. Next: {_next_commands(method, stage, config)}")
    return 0


def _next_commands(method: Method, stage: Stage[Any], config: StageConfig) -> str:
    """The commands to use next, after this stage."""
    run, use = config.run, stage.to_segment(config)
    names = [s.name for s in method.stages]
    trained, following = names[: names.index(stage.name) + 1], names[names.index(stage.name) + 1 :]
    commands = []
    if use or method.segmenting_stage(method.settings()) in trained:
        options = f" {use}" if use else ""
        commands.append(f"python -m interpreter.segment CLIP.mp4 --run {run} --out DIR{options}")
        commands.append(f"python -m interpreter.evaluate --run {run}{options}")
    if following:
        command = train_command(method.name, following[0], run)
        commands.append(f"{command} (with the same --preset, if you gave one)")
    return ", or ".join(commands)


if __name__ == "__main__":
    run_command(main, (DivergedError, LoaderError, NotRepeatableError, ProcessLostError), RESUME)
