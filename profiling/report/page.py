"""All generated pages of docs/results, as texts, and the page of benchmarks."""

from pathlib import Path
from typing import Any

from profiling.common.paths import RESULTS
from profiling.report.lists import busy_page, files_page, resources_page
from profiling.report.markdown import paragraph, table, times
from profiling.report.ops import FOLDER, heading, op_page
from profiling.report.predicted import predictions_page
from profiling.report.results import Row, read_runs, rows_of
from profiling.report.steps import steps_page

PAGE = "docs/results/benchmarks.md"
INTRO = """# Benchmarks

How fast the ops and training steps of this project are, compared with the usual alternatives on the same device. Each
op has its own page with all sizes and all alternatives; the table below links them.

To measure an op on your machine, run these commands in a clone, in the environment that `make test` creates:

```bash
python -m profiling.bench --list                    # all benchmarks and what they compare
python -m profiling.bench --only propagate_labels   # one of them
```

Figures come from files in [profiling/results](../../profiling/results) that `python -m profiling.bench --out FILE`
wrote. `python -m profiling.report` makes these pages from the files.

## How to read the figures

- **Ratio.** The time of a baseline over the time of `slotkernels`. Above 1×, `slotkernels` is faster; below 1× (bold),
  the baseline is faster, unless the quartiles lie on both sides of 1×; then the two count as equal. Variants are timed
  in turns: each turn runs every variant. A ratio compares two times of one turn; the pages show the median over all
  turns, with quartiles in brackets. On a GPU, each variant of a training step runs in its own process, and a ratio
  compares its times with our median.
- **Correct values.** Values and gradients of each variant are compared with float64 first. A wrong variant is not
  timed.
- **Floor.** The least time that any implementation needs on this device: `bytes_moved()` at the rate of a large copy,
  or `flops()` at the rate of a large matrix product of the same dtype, whichever takes longer. The same run measures
  both rates. For a module or a training step, the floor counts the matrix products of our form of it.
- **Inputs** alternate between several copies, so that they come from memory and not from a cache.
- **Memory** is the peak of newly allocated tensors. It does not include what libraries allocate for themselves, nor
  what a CUDA graph reserved when it was captured.

## All benchmarks

Ratio of the usual baseline, then of the fastest baseline if that is another one, at the first size of each page.
`textbook` is the equations of the paper in plain PyTorch, `published` is written as in the published code, and
`compiled` is the same under `torch.compile`. Each page describes its own baselines.
"""
NOT_RUN = """## GPU

No GPU has run these benchmarks. `profiling/gpu_check.sh` runs them on a machine with a GPU
([how](../develop/check_on_a_gpu.md))."""
SEE = """## More figures

- [Where a training step spends its time](training_steps.md): whole steps on a GPU, and their predicted parts.
- [What no GPU has run](not_run_on_gpus.md), and the [runs on GPUs](gpu_runs.md): which tests and trainings have run.
- [Predicted and measured times on a GPU](predictions.md).
- [Registers and shared memory of the kernels](kernel_resources.md).
- [Training on a busy CPU](busy_cpu.md).
- [All files of results](files.md)."""


def pages(folder: Path = RESULTS) -> dict[str, str]:
    """Path below the root and text of every page.

    Raises:
        ValueError: if two files of results disagree about a device or a benchmark, see ``read_runs``.
    """
    runs = read_runs(folder)
    return {
        PAGE: benchmarks_page(runs),
        **{f"{FOLDER}/{name}.md": op_page(name, runs) for name in benchmark_names(runs)},
        "docs/results/training_steps.md": steps_page(folder, runs),
        "docs/results/predictions.md": predictions_page(folder, runs),
        "docs/results/kernel_resources.md": resources_page(folder),
        "docs/results/busy_cpu.md": busy_page(folder),
        "docs/results/files.md": files_page(folder),
    }


def benchmark_names(runs: dict[str, dict[str, Any]]) -> list[str]:
    """All benchmarks with a figure, in the order of the runs."""
    return list(dict.fromkeys(name for run in runs.values() for name in run["benchmarks"]))


def benchmarks_page(runs: dict[str, dict[str, Any]]) -> str:
    """docs/results/benchmarks.md."""
    rows = ([_link(name), *(_ratios(run, name) for run in runs.values())] for name in benchmark_names(runs))
    lines = [INTRO, *table(["", *map(heading, runs)], rows), ""]
    for device, run in runs.items():
        lines += device_section(device, run, benchmark_names(runs))
    if all(run["kind"] == "cpu" for run in runs.values()):
        lines += [NOT_RUN, ""]
    return "\n".join([*lines, SEE]) + "\n"


def _link(name: str) -> str:
    return f"[`{name}`](benchmarks/{name}.md)"


def _ratios(run: dict[str, Any], name: str) -> str:
    """The usual and the fastest baseline of a benchmark's first case on a device."""
    if name not in run["benchmarks"]:
        return "–"
    row = Row(name, run["benchmarks"][name]["cases"][0])
    if row.usual is None or row.strongest is None:
        return "no baseline timed"
    ratios = (f"{times(ratio)} {baseline}" for baseline, ratio in dict.fromkeys((row.usual, row.strongest)))
    return "; ".join(ratios) + row.untimed


def device_section(device: str, run: dict[str, Any], names: list[str]) -> list[str]:
    """Device and versions, in which cases a baseline is faster, what was not timed, a picture; ``names`` have pages."""
    versions = dict.fromkeys(
        ", ".join(f"{library} {version}" for library, version in file["versions"].items())
        for file in run["files"].values()
    )
    lines = [f"## {heading(device)}", ""]
    lines += paragraph(f"{run['device']}; {'; or '.join(versions)}; measured on {run['date']}. {losses(run)}")
    if incomplete := _incomplete(run, names):
        lines += ["", *paragraph(f"Not timed, or not at all sizes: {', '.join(incomplete)}.")]
    return [*lines, "", f"![Ratios and shares of the floor](../pictures/benchmarks-{device}.png)", ""]


def losses(run: dict[str, Any]) -> str:
    """In how many cases a baseline is faster, and of which benchmarks."""
    rows = rows_of(run)
    if not any(row.baselines for row in rows):
        return "**No baseline was timed in this run.**"
    slower: dict[str, list[bool]] = {}
    for row in rows:
        slower.setdefault(row.name, []).append(bool(row.faster))
    lost = {name: cases for name, cases in slower.items() if any(cases)}
    if not lost:
        return (
            "At no size is a baseline faster beyond the spread: where a ratio is below 1×, its quartiles lie on both "
            "sides of 1×."
        )
    parts = (f"{_link(name)} ({sum(cases)} of {len(cases)})" for name, cases in lost.items())
    return f"**Slower than a baseline**, with the number of sizes: {', '.join(parts)}."


def _incomplete(run: dict[str, Any], names: list[str]) -> list[str]:
    """Benchmarks that failed on a device, or whose run was stopped before its end; those in ``names`` are linked."""
    incomplete = [*run["failed"], *(name for name, one in run["benchmarks"].items() if not one.get("finished", True))]
    return [_link(name) if name in names else f"`{name}`" for name in dict.fromkeys(incomplete)]
