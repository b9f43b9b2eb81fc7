"""Count the work of a training step on a GPU, without a GPU.

    python -m profiling.accounting            # count and compare with profiling/results/accounting.json
    python -m profiling.accounting --update   # write that file
    python -m profiling.accounting --top 20   # also the operators that move the most bytes

Both stages of Interpreter take a step at the sizes of --preset on tensors without data, so nothing is computed. The
code takes the branches of a GPU: the launch code of the Triton kernels runs, and its launches are recorded. PyTorch's
operators are counted unless they only make a view or allocate; most are one kernel on a GPU. Bytes are the sizes of
all tensors that an operator or launch reads or writes (in-place ones count twice), which is the traffic without any
cache. Unless you give --no-compiled, each stage is also compiled, at small sizes on the CPU, to count graphs, breaks,
recompilations and generated kernels.

For SOLV (preset ytvis19) and SMTC (preset ytvos), the operations, bytes and launches of each part of a step are
counted, and the time of the part on an H100 is predicted as in ``profiling.cost``.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch

from interpreter.commands import cli, run_command
from interpreter.methods.interpreter.config import Preset
from profiling.accounting import smtc, solv
from profiling.accounting.counts import count, count_compiled, differences
from profiling.common.machine import machine, save
from profiling.common.paths import RESULTS
from profiling.common.setups import STAGES, setup

PINNED = RESULTS / "accounting.json"


@dataclass(frozen=True)
class Options:
    """Count what training steps launch, move and wait for, and compare with the pinned counts."""

    preset: Preset = "ytvis19"
    """Preset that supplies the sizes; the pinned counts belong to ytvis19."""
    update: bool = False
    """Write the counts to profiling/results/accounting.json instead of comparing."""
    compiled: bool = True
    """Also compile each stage, on the CPU at small sizes. This takes minutes."""
    top: int = 0
    """Number of operators and kernels to list; those that move the most bytes come first."""


def stages(options: Options) -> dict[str, Any]:
    """The counts of both stages."""
    counts: dict[str, Any] = {}
    for stage in STAGES:
        counts[stage] = count(setup(stage, options.preset, torch.device("cpu")).task)
        if options.compiled:
            counts[stage]["compiled on a CPU"] = count_compiled(stage)
    return counts


def show(stage: str, counts: dict[str, Any], top: int) -> None:
    """Print one stage."""
    own, waits = counts["own launches"], counts["host waits"]
    launches = ", ".join(f"{n} {kernel}" for kernel, n in own.items())
    print(f"{stage} stage: {counts['operators']} operators and {sum(own.values())} launches of its own ({launches})")
    print(f"  {counts['bytes'] / 1e9:.1f} GB; waits of the host: {', '.join(waits) or 'none'}")
    if "compiled on a CPU" in counts:
        print("  compiled: " + ", ".join(f"{n} {name}" for name, n in counts["compiled on a CPU"].items()))
    for name, size in list(counts["bytes of"].items())[:top]:
        print(f"  {size / 1e9:8.2f} GB  {counts['calls of'].get(name, own.get(name)):4} x {name}")


def show_parts(method: str, content: dict[str, Any]) -> None:
    """Print the parts of a method's step."""
    waits = ", ".join(content["host waits"]) or "none"
    print(f"{method}, {content['preset']}, predicted for {content['device']}; waits of the host: {waits}")
    for name, row in content["parts"].items():
        work = f"{row['flops'] / 1e12:7.3f} TFLOP {row['bytes'] / 1e9:6.2f} GB {row['launches']:5} launches"
        print(f"  {work} {row['milliseconds']:8.2f} ms  {name}")


def main() -> int:
    """The command; its exit status is 1 if counts differ from the pinned ones."""
    options = cli(Options, prog="python -m profiling.accounting", description=__doc__)
    counts_by_stage = stages(options)
    for stage in counts_by_stage:
        show(stage, counts_by_stage[stage], options.top)
    of_methods = {"solv": solv.predicted(), "smtc": smtc.predicted()}
    for method, content in of_methods.items():
        show_parts(method.upper(), content)
    if options.update:
        if options.preset != "ytvis19" or not options.compiled:
            raise ValueError("--update writes the whole file: leave out --preset and --no-compiled")
        results = {
            "torch": torch.__version__,
            "commit": machine("cpu")["commit"],
            "stages": counts_by_stage,
            **of_methods,
        }
        what = "operators, launches, bytes and waits of a training step of each stage; where steps of SOLV and SMTC go"
        save(PINNED, {"what": what, "command": "python -m profiling.accounting --update", **results})
        return 0
    if options.preset != "ytvis19":
        return 0
    pinned = json.loads(PINNED.read_text())
    if pinned["torch"] != torch.__version__:
        print(f"not compared: {PINNED.name} was made with torch {pinned['torch']}, this is {torch.__version__}")
        return 0
    if not options.compiled:
        for counts in pinned["stages"].values():
            del counts["compiled on a CPU"]
    lines = differences(pinned["stages"], counts_by_stage)
    for method, content in of_methods.items():
        lines += differences(pinned[method], content, f"{method}: ")
    print("\n".join(lines) or f"as in {PINNED.name}")
    return 1 if lines else 0


if __name__ == "__main__":
    run_command(main)
