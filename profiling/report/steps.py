"""docs/results/training_steps.md: measured steps on a GPU, and the predicted parts of the steps of SOLV and SMTC."""

import json
from pathlib import Path
from typing import Any

from profiling.report.markdown import bullet, capital, data, ms, paragraph, table

SAVINGS = "../develop/decisions/022-exact-savings-in-the-decoders.md"
INTRO = """# Where a training step spends its time

Times of whole training steps on a GPU at the sizes of the presets, and the predicted time of each part of a step of
SOLV and SMTC. To profile your own steps, see [profiling](../develop/profiling.md).
"""


def steps_page(folder: Path, runs: dict[str, dict[str, Any]]) -> str:
    """The page."""
    lines = [INTRO]
    for run in runs.values():
        lines += measured_steps(folder, run)
    lines += [*solv_step(folder, runs), *smtc_step(folder)]
    return "\n".join(lines).rstrip() + "\n"


def of_device(path: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """Content of a recording; None if there is none or it was made on another device than the run."""
    content = json.loads(path.read_text()) if path.exists() else {}
    return content if content.get("device") == run["device"] else None


def measured_steps(folder: Path, run: dict[str, Any]) -> list[str]:
    """The training steps that ``profiling.step`` measured on the device of a run."""
    path = folder / f"steps-{run['kind']}.json"
    content = of_device(path, run)
    if content is None:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    about = (
        f"{content['device']}; {versions}; commit {content['commit']}, {content['date']}; `{content['command']}`. "
        f"Data, with the kernels of each step: {data(path.name)}."
    )
    how = (
        "`image` and `video` are the two stages. A step is `eager` (PyTorch as it is), `compiled` (`torch.compile`), "
        "`captured` (replayed as one CUDA graph), or both; `not deterministic`: with `--no-deterministic`. `launches` "
        "counts the kernels of a step; `no kernel runs` is the time in which the GPU waits. Times are medians of ten "
        "steps on random data, with the least and the greatest in brackets. Each step ran in its own process. The loss "
        "is averaged over the first two batches, which are the same for all modes. Memory is what PyTorch's allocator "
        "reserves."
    )
    rows = []
    for name, step in content["steps"].items():
        t = step["milliseconds"]
        cells = [name, f"{ms(t['median'])} ({ms(t['least'])}–{ms(t['greatest'])})", step["launches"]]
        cells += [f"{step['idle_ms']:.1f}", f"{step['reserved_mib'] / 1024:.1f}", f"{step['loss_of_first_steps']:.4f}"]
        rows.append(cells)
    heads = ("step", "ms", "launches", "no kernel runs, ms", "memory, GiB", "loss")
    lines = ["## Steps of Interpreter at the paper's sizes", "", *paragraph(about), "", *paragraph(how), ""]
    return [*lines, *table(heads, rows), "", *other_steps(folder)]


def other_steps(folder: Path) -> list[str]:
    """The other files of ``profiling.step``, and how their video stage's step differs from that of the table."""
    differences = {
        "steps-video-96-cuda.json": "all 96 videos of a batch at once; the table computes two halves of 48",
        "steps-decoder-cuda.json": f"with the [savings in the decoders]({SAVINGS}); the table was measured before them",
        "steps-before-cuda.json": "without these savings, on the same machine as the file above",
    }
    lines = []
    for name, difference in differences.items():
        path = folder / name
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        steps = (f"{name} {ms(step['milliseconds']['median'])} ms" for name, step in content["steps"].items())
        about = f"{content['device']}, commit {content['commit']}, {content['date']}"
        lines += bullet(f"{capital(difference)}: {', '.join(steps)} ({data(name)}; {about}).")
    return ["Other files have the steps under other conditions:", "", *lines, ""] if lines else []


def where_a_step_goes(folder: Path, method: str, shapes: str, without: str, note: str) -> list[str]:
    """The parts of a method's step, counted and predicted; ``without`` a backbone, in the words of the file's keys."""
    path = folder / "accounting.json"
    content = parts_of(folder, method)
    if content is None:
        return []
    assumed, of = content["assumed"], ("share", f"share {without}")
    about = (
        f"**Predicted, not measured**, for one {content['device']} with the preset `{content['preset']}`: {shapes}. "
        f"`python -m profiling.accounting` makes these figures ({data(path.name)})."
    )
    how = (
        "Formulas give the operations and bytes of each part; they agree with what PyTorch counts. Launches are "
        "counted in an eager step. The time of a part is the longest of three times: its operations at "
        f"{assumed['mfu']:.0%} of the device's rate, its bytes at {assumed['bandwidth_use']:.0%} of its bandwidth, and "
        f"{assumed['kernel_us']:g} µs for each launch. {note}"
    )
    rows = []
    for name, row in content["parts"].items():
        work = [f"{row['flops'] / 1e12:.3g}", f"{row['bytes'] / 1e9:.3g}", row["launches"], ms(row["milliseconds"])]
        rows.append([name, *work, *(f"{row[share]:.1%}" if row[share] else "–" for share in of)])
    heads = ("part", "TFLOP", "GB", "launches", "ms", "of a step", f"of a step {without}")
    whole, rest = content["milliseconds"], content[f"milliseconds {without}"]
    lines = [f"## Predicted parts of a step of {method.upper()}", "", *paragraph(about), "", *paragraph(how), ""]
    return [*lines, *table(heads, rows), "", f"A step takes {ms(whole)} ms, and {ms(rest)} ms {without}.", ""]


def parts_of(folder: Path, method: str) -> dict[str, Any] | None:
    """What ``profiling.accounting`` recorded of a method's step; None if it recorded nothing."""
    path = folder / "accounting.json"
    return json.loads(path.read_text()).get(method) if path.exists() else None


def smtc_step(folder: Path) -> list[str]:
    """The parts of a training step of SMTC."""
    content = parts_of(folder, "smtc")
    if content is None:
        return []
    size = content["sizes"]
    shapes = (
        f"B {size['batch']} clips of T {size['frames']} frames, M {size['tokens']}, N {size['semantics']}, "
        f"P {size['instances']}, C {size['features']}, D {size['dim']}"
    )
    note = (
        "With a frozen backbone and no augmentation, features come from the cache and a step does not run the "
        "backbone. Loading and augmentation are left out."
    )
    return where_a_step_goes(folder, "smtc", shapes, "from features on", note)


def solv_step(folder: Path, runs: dict[str, dict[str, Any]]) -> list[str]:
    """The parts of a training step of SOLV, and how far the prediction is from what was measured on an H200."""
    content = parts_of(folder, "solv")
    if content is None:
        return []
    size = content["sizes"]
    shapes = (
        f"B {size['batch']} windows of F {size['frames']} frames, {size['kept']} of M {size['tokens']} tokens kept, "
        f"N {size['slots']}, C {size['features']}, D {size['dim']}, decoder {size['hidden']}"
    )
    note = (
        "With `--token-drop-at features`, features come from the cache and a step does not run the "
        "backbone. Loading is left out, because it runs at the same time."
    )
    lines = where_a_step_goes(folder, "solv", shapes, "on cached features", note)
    benchmarks = runs.get("h200", {}).get("benchmarks", {})
    if content["h200"].keys() <= benchmarks.keys():
        lines += ["Predictions with the same assumptions for an H200, where these parts were measured:", ""]
        for name, expected in content["h200"].items():
            case = benchmarks[name]["cases"][0]
            measured = case["variants"]["slotkernels compiled"]["ms"]["median"]
            lines += bullet(
                f"[`{name}`](benchmarks/{name}.md) ({capital(benchmarks[name]['what'])}): {ms(expected)} ms predicted, "
                f"{ms(measured)} ms measured with the compiled step."
            )
        lines.append("")
    return lines
