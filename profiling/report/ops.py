"""Pages of docs/results/benchmarks: one for each op and training step, with its figures on all devices."""

from typing import Any

from profiling.bench.case import OURS
from profiling.report.markdown import bullet, capital, data, ms, paragraph, table, times
from profiling.report.results import Row

FOLDER = "docs/results/benchmarks"
LEGEND = (
    "[Benchmarks](../benchmarks.md) explains how this is measured, and how to measure it on your machine; the "
    "[glossary](../../glossary.md) explains the letters of the sizes. `ms` is the median time, and `relative` is that "
    "time over the time of `slotkernels`: above 1×, `slotkernels` is faster. Quartiles are in brackets. `MiB` is the "
    "peak of newly allocated memory, `error` the largest difference from float64. `floor` is the least time that the "
    "work needs on the device."
)
HEADS = ("size", "variant", "ms", "relative", "MiB", "error")


def heading(device: str) -> str:
    """Heading of a device's section, such as "CPU" or "H200"."""
    return device.upper()


def op_page(name: str, runs: dict[str, dict[str, Any]]) -> str:
    """The page of an op or training step."""
    having = {device: run["benchmarks"][name] for device, run in runs.items() if name in run["benchmarks"]}
    first = next(iter(having.values()))
    measured = {variant for one in having.values() for case in one["cases"] for variant in case["variants"]}
    against = {variant: what for one in having.values() for variant, what in one["against"].items()}
    lines = [f"# Speed of `{name}`", "", *paragraph(f"{capital(first['what'])}."), "", *paragraph(LEGEND), ""]
    lines += ["Variants:", "", *bullet(f"`{OURS}`: this project's op, module or step, as you call it")]
    lines += [line for variant, what in against.items() if variant in measured for line in bullet(f"{variant}: {what}")]
    for device, run in runs.items():
        if name in run["benchmarks"] or name in run["failed"]:
            lines += ["", f"## {heading(device)}", "", *on_device(name, run)]
    return "\n".join(lines) + "\n"


def on_device(name: str, run: dict[str, Any]) -> list[str]:
    """A device's section: where the figures come from, all variants of all sizes, and what was not timed."""
    benchmark, failed = run["benchmarks"].get(name), run["failed"].get(name)
    if benchmark is None:
        return paragraph(f"{run['device']}. Not timed: {shortened(failed)}.")
    rows = [Row(name, case) for case in benchmark["cases"]]
    lines = [*about(name, benchmark, run), "", *table(HEADS, (line for row in rows for line in case_rows(row)))]
    remarks = [*backends(rows), *left_out(rows)]
    if failed:
        remarks.append(f"The run ended with an error: {shortened(failed)}.")
    elif not benchmark.get("finished", True):
        remarks.append("The run was stopped before all sizes were timed.")
    return [*lines, "", *(line for remark in remarks for line in bullet(remark))]


def shortened(reason: str) -> str:
    """The first sentence of an error message."""
    return reason.split(". ")[0].rstrip(".")


def about(name: str, benchmark: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """Device, versions, commit, date, command and file of a benchmark, and the rates that were measured with it."""
    file = run["files"][benchmark["file"]]
    versions = ", ".join(f"{library} {version}" for library, version in file["versions"].items())
    rates = "; ".join(
        f"{t['gflops']:,.0f} GFLOP/s and {t['gbytes']:,.0f} GB/s in {dtype}" for dtype, t in file["limits"].items()
    )
    text = (
        f"{run['device']}; {versions}; commit {file['commit']}, {file['date']}, load {file['load_average'][0]:.1f} at "
        f"the start. Data: {data(benchmark['file'], 3)}; to measure again: `python -m profiling.bench --device "
        f"{run['kind']} --only {name}`."
    )
    return paragraph(text + (f" A large matrix product and a large copy reach {rates}." if rates else ""))


def case_rows(row: Row) -> list[list[str]]:
    """Rows of one size: its variants and the floor."""
    case, lines = row.case, []
    for name, timings in case["variants"].items():
        t, ratio = timings["ms"], timings["times_ours"]
        compared = "1" if name == OURS else f"{times(ratio['median'])} ({ratio['lower']:.3g}–{ratio['upper']:.3g})"
        cells = [f"`{name}`" if name == OURS else name, f"{ms(t['median'])} ({ms(t['lower'])}–{ms(t['upper'])})"]
        lines.append([*cells, compared, f"{timings['peak_mib']:.1f}", f"{max(timings['errors'].values()):.0e}"])
    lines.append([f"floor ({case['bound']})", ms(case["floor_ms"]), f"{case['of_floor']:.2g}×", "", ""])
    return [[f"{row.size}, {case['dtype']}" if index == 0 else "", *line] for index, line in enumerate(lines)]


def backends(rows: list[Row]) -> list[str]:
    """By which backends `slotkernels` computed; one sentence for all sizes with the same."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        text = ", ".join(f"{op} by `{backend}`" for op, backend in row.case["backends"].items())
        groups.setdefault(text or "none, since no op of slotkernels was called", []).append(_size(row))
    *others, most = sorted(groups, key=lambda text: len(groups[text]))
    lines = [f"Backends at {'; '.join(groups[text])}: {text}." for text in others]
    return [*lines, f"Backends{' at all other sizes' if others else ''}: {most}."]


def left_out(rows: list[Row]) -> list[str]:
    """Variants that were not timed and why; one sentence for all sizes with the same reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for variant, reason in row.left_out.items():
            groups.setdefault((variant, reason), []).append(_size(row))
    everywhere = {key for key, sizes in groups.items() if len(sizes) == len(rows)}
    return [
        f"Not timed: {variant}{'' if (variant, reason) in everywhere else ' at ' + '; '.join(sizes)} ({reason})."
        for (variant, reason), sizes in groups.items()
    ]


def _size(row: Row) -> str:
    return f"{row.size}, {row.case['dtype']}"
