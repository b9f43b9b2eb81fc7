"""Pages that list one thing: a busy CPU's steps, what compilers report of kernels, and all files of results."""

import json
from pathlib import Path
from typing import Any

from interpreter.openmp import SETTINGS
from profiling.report.markdown import data, ms, paragraph, table
from profiling.report.results import Recorded, read_recorded, read_table

BUSY = """# Training on a busy CPU

How much slower a training step gets when other programs use the same cores, and what the settings of OpenMP change.
OpenMP is the library that runs PyTorch's CPU threads. Its threads wait for work in a loop ("spin") before they sleep;
on a busy machine, spinning takes time from the threads that have work. The commands of this project set a short wait,
which the table shows in bold ([busy machines](../use/speed_and_memory.md#busy-machines)).
"""
RESOURCES = """# Registers and shared memory of the kernels

What the compilers report for each GPU kernel. A kernel that needs many registers or much shared memory runs fewer
threads at once: that share is its occupancy. A spilled register is kept in slow memory. The tables show the greatest
values over all launches and architectures (sm_80, sm_90, sm_100); for occupancy, the smallest and the greatest. A test
fails if a value grows.
"""
FILES = """# All files of results

Every file of [profiling/results](../../profiling/results), except the runs of `profiling.bench`, which
[benchmarks](benchmarks.md) shows. The other pages quote these files. Each file has the device, the versions, the commit
and the command that made it, as far as they apply.
"""


def busy_page(folder: Path) -> str:
    """A training step on a busy machine, by the settings of OpenMP, of ``profiling.spin``."""
    path = folder / "spin-cpu.json"
    if not path.exists():
        return f"{BUSY}\nNot measured: run `python -m profiling.spin`.\n"
    content = json.loads(path.read_text())
    loads = list(content["settings"][0]["milliseconds"])
    about = (
        f"{content['what'][0].upper()}{content['what'][1:]}. Milliseconds: median (least–greatest). "
        f"{content['device']}; commit {content['commit']}, {content['date']}; `{content['command']}`. Data: "
        f"{data(path.name)}."
    )
    rows = []
    for entry in content["settings"]:
        timings = [entry["milliseconds"][n] for n in loads]
        words = " ".join(f"{name}={value}" for name, value in entry["environment"].items()) or "default"
        chosen = bool(entry["environment"].items() & SETTINGS.items())
        cells = [entry["openmp"] + (", compiled step" if entry["compiled"] else ""), f"**{words}**" * chosen or words]
        rows.append([*cells, *(f"{ms(t['median'])} ({ms(t['least'])}–{ms(t['greatest'])})" for t in timings)])
    heads = ["OpenMP", "setting", *("idle" if n == "0" else f"{n} busy" for n in loads)]
    return "\n".join([BUSY, *paragraph(about), "", *table(heads, rows)]) + "\n"


def resources_page(folder: Path) -> str:
    """Greatest resources of each kernel over all launches and architectures."""
    lines = [RESOURCES]
    for name, title in (("resources.csv", "Triton"), ("resources-cuda.csv", "CUDA C++")):
        stamp, rows = read_table(folder / name)
        kernels: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            kernels.setdefault(row["kernel"], []).append(row)
        heads = ("kernel", "launches", "registers", "spilled bytes", "shared memory, KiB", "occupancy")
        lines += [f"## {title}", "", f"Compiler: {stamp.split(' sources')[0]}. Data: {data(name)}.", ""]
        lines += [*table(heads, (_resources_of(*item) for item in kernels.items())), ""]
    return "\n".join(lines).rstrip() + "\n"


def _resources_of(kernel: str, launches: list[dict[str, str]]) -> list[Any]:
    shared = max(int(row["shared_bytes"]) for row in launches) / 1024
    numbers = [max(int(row[key]) for row in launches) for key in ("registers", "spill_bytes")]
    occupancy = [float(row["occupancy"]) for row in launches]
    return [f"`{kernel}`", len(launches), *numbers, f"{shared:.0f}", f"{min(occupancy):.0%}–{max(occupancy):.0%}"]


def files_page(folder: Path) -> str:
    """The other result files."""
    return "\n".join([FILES, *table(("file", "what", "date"), map(_about, read_recorded(folder)))]) + "\n"


def _about(entry: Recorded) -> list[str]:
    what, date = (str(entry.content.get(key, "")).replace("|", "\\|") for key in ("what", "date"))
    return [data(entry.file), what, date]
