"""Write a trained run as programs for other environments: ``python -m interpreter.export --help``."""

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.export import ExportedProgram

from interpreter.commands import cli, run_command
from interpreter.console import progress_bar
from interpreter.engine.checkpoint import newest_step
from interpreter.engine.run import RunConfig, require_finished, require_run
from interpreter.evaluation.provenance import code_version
from interpreter.export.formats import FORMATS, SUFFIXES, Format, NoCounterpartError, require_packages, write
from interpreter.export.trace import LARGEST_DIFFERENCE, largest_difference, trace
from interpreter.files import read_text, write_text
from interpreter.hub.fetching import local_run
from interpreter.hub.names import title_name
from interpreter.method_options import choose_method
from interpreter.methods.base import Method, Segmenter
from interpreter.methods.programs import Input, Program
from interpreter.methods.runs import load_trained, needed_stages
from interpreter.output_folder import make_output_folder, written_together

PROG = "python -m interpreter.export"
LIST = "programs.json"


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write the parts of a trained run as programs that do not need this package, for PyTorch, C++ or ONNX Runtime.

    For the method interpreter, the programs are backbone, image_stage, video_stage and labels: frames go in, label maps
    come out. OUT/programs.json lists the inputs and outputs of each program. Each file is loaded again and compared
    with the run.

    Examples:
      python -m interpreter.export runs/demo --out programs
      python -m interpreter.export runs/demo --out programs --format torch onnx --frame-size 256 384
      python -m interpreter.export runs/demo --out programs --format aoti
    """

    run: tyro.conf.Positional[Path]
    """Directory of a trained run, or hub:OWNER/NAME."""
    out: Path
    """Directory to write to."""
    format: tuple[Format, ...] = ("torch",)
    """torch: torch.export, for PyTorch in Python (NAME.pt2).
    onnx: ONNX, for ONNX Runtime and others (NAME.onnx). Programs that ONNX cannot express are left out and listed.
    aoti: compiled by AOTInductor for this machine, for C++ without Python (NAME.aoti.pt2). Needs a C++ compiler."""
    stage: str | None = None
    """Last stage to export, such as image. Default: the last trained stage, without levels above 2."""
    frame_size: tuple[int, int] | None = None
    """Height and width of the input frames. Default: as in training."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device on which the programs run. aoti compiles for it."""


def open_last_stage(options: ExportOptions) -> tuple[Method, str, Segmenter]:
    """The method of the run, and the key and a segmenter of its last stage that can be exported, in fp32.

    Raises:
        ValueError: if the stage does not exist, or files of the run are damaged.
        OSError: if the run does not exist.
    """
    method, stored = choose_method(None, options.run)
    trained = [stage.name for stage in method.stages if newest_step(options.run / stage.name)]
    key = options.stage or (trained[-1] if trained else None)
    if key is None:
        raise ValueError(f"{options.run} has no trained stage of the method {method.name}; train it first")
    stage = method.stage(key)
    stored, config = _in_fp32(stored), stored.options(key, stage.config)
    for used in (*(needed_stages(method, stage, config, stored) if config else ()), key):
        require_finished(options.run, used, stored, allow_unfinished=True)
    context, model = load_trained(method, options.run, key, torch.device(options.device), stored)
    return method, key, stage.segmenter(model.config, model.model, context, None, options.frame_size)


def _in_fp32(stored: RunConfig) -> RunConfig:
    """The run's configuration with precision fp32 in each stage: programs have no autocast."""
    stages = {key: {**each, "optim": {**each["optim"], "precision": "fp32"}} for key, each in stored.stages.items()}
    return replace(stored, stages=stages)


def export(options: ExportOptions) -> tuple[dict[str, Any], Table]:
    """Write all programs of a run. Returns the contents of programs.json, and a table of the files.

    Raises:
        ValueError: if the run cannot be exported, or a written program gives different results than the run.
        OSError: if the run does not exist, or OUT cannot be written.
    """
    formats = tuple(kind for kind in FORMATS if kind in options.format)
    require_packages(formats)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU on this machine; leave --device out")
    if options.out.is_file():
        raise ValueError(f"--out {options.out} is a file; give a directory")
    method, key, segmenter = open_last_stage(options)
    height, width = segmenter.frame_size
    segmenter.backbone.grid(segmenter.frame_size)  # raises an error for an invalid size
    programs = segmenter.programs()
    entries = [describe(program) for program in programs]
    listed: dict[str, Any] = {
        "format": 1,
        "run": title_name(options.run),
        "method": method.name,
        "stage": key,
        "code": code_version(),
        "torch": torch.__version__,
        "device": options.device,
        "frame_size": [height, width],
        "grid": [*segmenter.grid],
        "programs": entries,
    }
    table = Table("program", "file", "size", "difference from the run")
    former = files_of_former_export(options.out)
    names = [f"{program.name}{SUFFIXES[kind]}" for program in programs for kind in formats]
    for name in sorted({*names, LIST} - {*former, LIST}):
        if (options.out / name).exists():
            raise ValueError(f"{options.out / name} is not from an earlier export; give another --out, or move it away")
    make_output_folder(options.out)
    written, stale = list[str](), list[str]()
    with progress_bar("files") as progress, written_together(options.out, written, stale) as folder:
        bar = progress.add_task("export", total=len(names), status="")
        for program, entry in zip(programs, entries, strict=True):
            progress.update(bar, status=f"tracing {program.name}")
            traced = trace(program)
            for kind in formats:
                progress.update(bar, status=f"writing {program.name} ({kind})")
                try:
                    file, difference = write_checked(kind, traced, program, folder)
                except NoCounterpartError as error:
                    table.add_row(program.name, "", "", f"{kind} cannot express it: {error}")
                else:
                    entry["files"][kind] = file.name
                    written.append(file.name)
                    size = f"{file.stat().st_size / 1e6:.1f} MB"
                    table.add_row(program.name, file.name, size, f"{difference:.0e}")
                progress.advance(bar)
        write_text(folder / LIST, json.dumps(listed, indent=2) + "\n")
        stale += [name for name in former if name not in written]
        written.append(LIST)
    return listed, table


def write_checked(kind: Format, traced: ExportedProgram, program: Program, folder: Path) -> tuple[Path, float]:
    """Write a program to a file in ``folder``. Returns the file, and its difference from the run.

    Raises:
        NoCounterpartError: if the format cannot express it.
        ValueError: if its results differ from those of the run.
        OSError: if it cannot be written.
    """
    file = folder / f"{program.name}{SUFFIXES[kind]}"
    difference = largest_difference(program, write(kind, traced, program, file))
    if difference > LARGEST_DIFFERENCE:
        raise ValueError(
            f"{file.name} differs from the run by {difference:.1e} (relative), so nothing was written; "
            f"leave --format {kind} out, or report it with the versions of your packages"
        )
    return file, difference


def files_of_former_export(out: Path) -> list[str]:
    """Names of the programs of an earlier export in a directory; empty without one.

    Raises:
        ValueError: if its programs.json is not of this command.
    """
    if not (out / LIST).exists():
        return []
    try:
        programs = json.loads(read_text(out / LIST))["programs"]
        names = [str(name) for program in programs for name in program["files"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{out / LIST} is not from an export; give another --out, or move it away") from error
    return [name for name in names if Path(name).name == name and name.endswith(tuple(SUFFIXES.values()))]


def describe(program: Program) -> dict[str, Any]:
    """The entry of a program in programs.json. Its files are added when they are written."""

    def type_of(each: Input) -> str:
        return str(each.example.dtype).removeprefix("torch.")

    inputs = [
        {"name": name, "dtype": type_of(each), "shape": program.shape(name), "dims": each.dims, "about": each.about}
        for name, each in program.inputs.items()
    ]
    outputs = [
        {"name": name, "dims": text.split(": ")[0], "about": text.split(": ", 1)[1]}
        for name, text in program.outputs.items()
    ]
    return {"name": program.name, "about": program.about, "inputs": inputs, "outputs": outputs, "files": {}}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    words = sys.argv[1:] if arguments is None else arguments
    options = cli(ExportOptions, words, prog=PROG, description=inspect.getdoc(ExportOptions))
    options = replace(options, run=local_run(options.run))
    require_run(options.run)
    _, table = export(options)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(f"{options.out} contains these files; {LIST} lists inputs and outputs", markup=False)
    return 0


if __name__ == "__main__":
    run_command(main)
