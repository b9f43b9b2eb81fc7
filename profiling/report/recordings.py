"""Parts of docs/results/benchmarks.md made of recordings that are no run of ``profiling.bench``."""

import json
from pathlib import Path
from typing import Any

from interpreter.openmp import SETTINGS


def times(value: float) -> str:
    """A ratio; in bold if below 1."""
    text = f"{value:.3g}×" if value < 100 else f"{value:.0f}×"
    return text if value >= 1 else f"**{text}**"


def ms(value: float) -> str:
    """Milliseconds with three figures."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def of_device(path: Path, run: dict[str, Any]) -> dict[str, Any] | None:
    """Content of a recording; None if there is none or it was made on another device than the run."""
    content = json.loads(path.read_text()) if path.exists() else {}
    return content if content.get("device") == run["device"] else None


def steps(folder: Path, run: dict[str, Any]) -> list[str]:
    """The training steps of ``profiling.step`` on the device of a run, each in a process of its own."""
    path = folder / f"steps-{run['kind']}.json"
    content = of_device(path, run)
    if content is None:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    link = f"[{path.name}](../../profiling/results/{path.name})"
    lines = [
        "### Training steps at the paper's sizes",
        "",
        f"{content['device']}; {versions}; commit {content['commit']}; {content['date']}; `{content['command']}`.",
        "Median of ten steps on random data, with least and greatest; each step in a process of its own. The loss is",
        "that of the first two batches, the same ones for all modes. Memory is what PyTorch's allocator reserves.",
        f"{link} has the kernels of each step.",
        "",
        "| step | ms | launches | no kernel runs, ms | memory, GiB | loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, step in content["steps"].items():
        t, reserved = step["milliseconds"], step["reserved_mib"] / 1024
        cells = [name, f"{ms(t['median'])} ({ms(t['least'])}–{ms(t['greatest'])})", str(step["launches"])]
        cells += [f"{step['idle_ms']:.1f}", f"{reserved:.1f}", f"{step['loss_of_first_steps']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def busy_machine(folder: Path) -> list[str]:
    """A training step on a busy machine, by the settings of OpenMP, of ``profiling.spin``."""
    path = folder / "spin-cpu.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    loads = list(content["settings"][0]["milliseconds"])
    lines = [
        "### A machine that also does other things",
        "",
        f"{content['what'][0].upper()}{content['what'][1:]}, milliseconds: median (least–greatest).",
        f"Bold is what the commands set ([training](../use/training.md)). {content['device']}; commit "
        f"{content['commit']}; {content['date']}; data: [{path.name}](../../profiling/results/{path.name}).",
        "",
        f"| OpenMP | | {' | '.join('idle' if n == '0' else f'{n} busy' for n in loads)} |",
        f"|{'---|' * (2 + len(loads))}",
    ]
    for entry in content["settings"]:
        timings = [entry["milliseconds"][n] for n in loads]
        words = " ".join(f"{name}={value}" for name, value in entry["environment"].items()) or "as it comes"
        chosen = bool(entry["environment"].items() & SETTINGS.items())
        cells = [entry["openmp"] + (", compiled step" if entry["compiled"] else ""), f"**{words}**" * chosen or words]
        cells += [f"{ms(t['median'])} ({ms(t['least'])}–{ms(t['greatest'])})" for t in timings]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def predictions(folder: Path, run: dict[str, Any]) -> list[str]:
    """The predictions for a run's device, made before the first run, and the reasons for differences."""
    content = of_device(folder / f"predictions-{run['kind']}.json", run)
    if content is None:
        return []
    lines = [
        "### Predictions",
        "",
        "Each range was written before the first run. The ratio is that of the measurement to the middle of the range.",
        "",
        "| figure | predicted because | predicted | measured | ratio | why it differs |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        low, high = row["predicted"]
        value = "not measured" if row["measured"] is None else f"{row['measured']:.3g} {row['unit']}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = [row["figure"], row["reason"], f"{low:g} to {high:g} {row['unit']}", value, ratio, row["difference"]]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _where_a_step_goes(
    path: Path, method: str, content: dict[str, Any], shapes: str, without: str, note: str
) -> list[str]:
    """A table of the parts of a method's step, counted and predicted; ``without`` a backbone, as its keys say it."""
    assumed, of = content["assumed"], ("share", f"share {without}")
    lines = [
        f"## Where a training step of {method} goes",
        "",
        f"**Predicted, not measured**, for one {content['device']} by `python -m profiling.accounting`",
        f"([{path.name}](../../profiling/results/{path.name})); preset `{content['preset']}`: {shapes}.",
        "Operations and bytes come from formulas that agree with what PyTorch counts; launches are counted in an eager",
        "step. A part takes the longest of its operations and its bytes, at the shares of the device's rates that",
        f"`profiling.cost` assumes ({assumed['mfu']:.0%} and {assumed['bandwidth_use']:.0%}), and of its launches,",
    ]
    head = f"| part | TFLOP | GB | launches | ms | of a step | of a step {without} |"
    table = [head, "|---|---|---|---|---|---|---|"]
    for name, row in content["parts"].items():
        work = [f"{row['flops'] / 1e12:.3g}", f"{row['bytes'] / 1e9:.3g}", row["launches"], ms(row["milliseconds"])]
        shares = [f"{row[share]:.1%}" if row[share] else "–" for share in of]
        table.append(f"| {' | '.join(map(str, [name, *work, *shares]))} |")
    whole, rest = content["milliseconds"], content[f"milliseconds {without}"]
    return [
        *lines,
        f"{assumed['kernel_us']:g} µs each. {note}",
        "",
        *table,
        "",
        f"A step takes {ms(whole)} ms, and {ms(rest)} ms {without}.",
    ]


def _parts_of(path: Path, method: str) -> dict[str, Any] | None:
    """What is recorded of a method's step."""
    return json.loads(path.read_text()).get(method) if path.exists() else None


def smtc_step(folder: Path) -> list[str]:
    """Where a training step of SMTC goes: counted and predicted."""
    path = folder / "accounting.json"
    content = _parts_of(path, "smtc")
    if content is None:
        return []
    size = content["sizes"]
    shapes = (
        f"B {size['batch']} clips of T {size['frames']} frames, M {size['tokens']}, N {size['semantics']}, "
        f"P {size['instances']}, C {size['features']}, D {size['dim']}"
    )
    note = (
        "With a frozen backbone and no augmentation features come\n"
        "from the cache, and a step has no backbone. Loading and augmentation are left out."
    )
    return [*_where_a_step_goes(path, "SMTC", content, shapes, "from features on", note), ""]


def solv_step(folder: Path, runs: dict[str, dict[str, Any]]) -> list[str]:
    """Where a training step of SOLV goes: counted and predicted, and how far that is from what was measured."""
    path = folder / "accounting.json"
    content = _parts_of(path, "solv")
    if content is None:
        return []
    size = content["sizes"]
    shapes = (
        f"B {size['batch']} windows of F {size['frames']} frames, {size['kept']} of M {size['tokens']} tokens kept, "
        f"N {size['slots']}, C {size['features']}, D {size['dim']}, decoder {size['hidden']}"
    )
    note = (
        "With `--token-drop-at features` features come from the cache, and a\n"
        "step has no backbone. Loading is left out, as it happens meanwhile."
    )
    lines = _where_a_step_goes(path, "SOLV", content, shapes, "on cached features", note)
    benchmarks = runs.get("h200", {}).get("benchmarks", {})
    if content["h200"].keys() <= benchmarks.keys():
        lines.append("For an H200, on which these parts were measured, the same assumptions predict:")
        lines.append("")
        for name, expected in content["h200"].items():
            case = benchmarks[name]["cases"][0]
            measured = case["variants"]["slotkernels compiled"]["ms"]["median"]
            lines.append(
                f"- {benchmarks[name]['what']} (`{name}`): {ms(expected)} ms, measured {ms(measured)} compiled"
            )
    return [*lines, ""]
