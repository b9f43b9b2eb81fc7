"""The text of docs/results/benchmarks.md and of README's figures."""

from pathlib import Path
from typing import Any

from profiling.bench.case import OURS
from profiling.common.paths import RESULTS
from profiling.report.predicted import beside_predictions
from profiling.report.recordings import busy_machine, ms, predictions, smtc_step, solv_step, steps, times
from profiling.report.results import Recorded, Row, read_recorded, read_runs, read_table, rows_of, slug

HEAD = """# Benchmarks

`python -m profiling.report` makes this page from the files in [profiling/results](../../profiling/results), which
`python -m profiling.bench` measures: every op, and the training step of each stage. A test fails if page and files
disagree.

- The values of all variants are compared with float64 before any is timed; a wrong variant gets no time.
- Variants take turns. A ratio compares two times of the same turn; the tables show its median over all turns, with
  quartiles in brackets. **Above 1×, slotkernels is faster; below, the baseline is.** Where the quartiles lie on both
  sides of 1×, the two count as equal. On a GPU each variant of a training step runs in a process of its own, and the
  ratio compares its times with our median.
- The floor is the least time for the work that no implementation can avoid: `bytes_moved()` at the rate of a large
  copy, or `flops()` at the rate of a large matrix product of the same dtype, whichever takes longer. Both rates are
  measured in the same run. For a module or a training step, the floor counts the matrix products of our form of it.
- Inputs rotate, so that they come from memory and not from a cache. Memory is the peak of newly allocated tensors. It
  does not include what libraries allocate for themselves, nor what a CUDA graph reserved when it was captured.
"""
NOT_RUN = "Not run. `profiling/gpu_check.sh` measures it on a machine with a GPU ([how](../develop/profiling.md))."
NOT_YET = """## What no GPU has run so far

- GeomLoss under `torch.compile`: run 7 of the GPU check ended before it was measured.
- `sinkhorn_plan` by Triton as it is now: its plans were wrong on an H200 (run 12). The cause was found in the compiled
  code and mended, and a test looks for it in every kernel; the mended kernel has not run.
- `inverted_attention` with 64 columns on GPUs before sm_90: its number of pipeline stages changed after the run.
- `inverted_attention` as it is now: after the last run, four warps became its rule for few slots, as a trial had
  measured ([inverted-attention-tiles-cuda.json](../../profiling/results/inverted-attention-tiles-cuda.json)), and
  gradients of tokens use a sum that is formed before the kernel again. Merged weights of slot attention.
- `--no-deterministic`; in the transformers, the fused norms outside `--compile` and, with or without it, logits of
  absorbed attention with the queries as the last dimension.
- GeomLoss and KeOps on large sets: KeOps crashes on the H200 (pykeops 2.3 with CUDA 13.0). A trial in a child process
  detects that, and `auto` uses `blocks`.
- DALI's GPU decoders, and DDP over NCCL.
- Points of weight 0, and derivatives other than the gradient: their tests run on a CPU only. The kernels are unchanged.
- Times of the steps of DINOSAUR, Slot Contrast and VideoSAUR, of the mask decoders of both stages of Interpreter and of
  its levels above the video stage: run 11 trained all of them with `--compile`, without a figure. Their decoder,
  `mix_slots` and recurrent slot attention are measured.
- A gate and padded clips with `--compile`: the step could not be captured in run 11, and was mended after it. Without
  `--compile` they have not run either.
- Several attention maps in one call, attention of long videos in memory of the host, and slots gathered over NCCL.
- SOLV's backbone with dropped patches. Its step from features on is measured; captured and
  eager steps agree bit for bit.
- SMTC: its training step with a trained ViT, the teacher and augmented views, and the times of its step, of
  `transport_targets` at 864 tokens and of slot attention in groups that share prepared tokens. The tests of its ops
  passed in run 10.

Hardware counters of the H200: [ncu-image-cuda.csv](../../profiling/results/ncu-image-cuda.csv) for slot attention's
forward kernel, [ncu-video-cuda.csv](../../profiling/results/ncu-video-cuda.csv) for the Sinkhorn kernel. The table of
training steps above computes the video stage's 96 videos in two halves of 48;
[steps-video-96-cuda.json](../../profiling/results/steps-video-96-cuda.json) has the step with all 96 at once. Both were
measured before the decoders' savings; [steps-decoder-cuda.json](../../profiling/results/steps-decoder-cuda.json) has
the steps with them, and [steps-before-cuda.json](../../profiling/results/steps-before-cuda.json) those without on the same
machine.

Reports of the GPU check: [gpu-figures-cuda.md](../../profiling/results/gpu-figures-cuda.md), and for its proof
[gpu-proof-cuda.md](../../profiling/results/gpu-proof-cuda.md) (run 1) and `gpu-proof-N-cuda.md` (runs 2 to 9 and
11; run 12 has [gpu-proof-12-cuda.json](../../profiling/results/gpu-proof-12-cuda.json)). Runs 7 and 8 used an H100, all
others an H200.

- Run 3: all GPU tests passed (765, and 57 skipped). Resuming on a GPU failed, because the optimiser's step counter was
  restored on the CPU.
- Run 4: a resumed run equalled an uninterrupted one bit for bit.
- Run 5: 766 tests passed, 57 were skipped, two failed. Those called an op with wrong arguments, and passed in run 6.
- Run 8: the present ops and training, after every op was rewritten around the same kernels. A resumed run equalled an
  uninterrupted one; the tests reached the time limit at 97 %. One of them failed, that of a step's memory, because its
  batch had more rows than attention's grid allows. The test now takes the demo's sizes.
- Run 9: 921 of 922 tests passed, 57 were skipped. The other one judged the gradient of `mix_slots`' weight where it is
  0 but for rounding; it now allows for that, and passed in a later run that kept no report.
- Run 10: SMTC's ops and inverted attention with the new reading of masks. 757 tests passed, 56 were skipped, two failed
  and were mended: one compared sums in another order too closely, one met a version of transformers that reads other
  attributes. It kept no report.
- Run 11: levels, streams and the training of all methods are new. 1,124 tests passed, 57 were skipped, none failed, and
  one did not end in time. Resumed runs equalled uninterrupted ones. Every method trained with `--compile` and segmented
  a clip, but for the gate (above).
- Run 12: unbalanced transport by Triton is new. Of the GPU tests of Sinkhorn, transport plans, slot attention and
  training steps 558 passed and 32 failed: 31 of the Triton kernel of `sinkhorn_plan`, and one of its reference, whose
  tolerance is too narrow for 60 iterations in float32 on a GPU. Steps with a gate are captured now.
"""
MARKERS = ("<!-- figures -->", "<!-- /figures -->")
# What README shows of a device; of several names the first one that was measured.
HEADLINES = (
    ("sinkhorn_divergence",),
    ("slot_attention", "inverted_attention"),
    ("propagate_labels",),
    ("train_image",),
    ("train_video",),
)


def heading(name: str, device: str) -> str:
    """Heading of a benchmark's section; with the device on GPUs, so that each section has its own anchor."""
    return name if device == "cpu" else f"{name}, {device.upper()}"


def untimed(row: Row) -> str:
    """Which baselines may be stronger than the strongest one that was timed."""
    missing = [name for name in row.left_out if not name.startswith(OURS)]
    return f"; not timed: {', '.join(missing)}" if missing and row.strongest else ""


def summary(rows: list[Row], device: str) -> list[str]:
    """One line per case: against the usual and the strongest baseline, and the floor."""
    lines = [
        "| | size | usual baseline | strongest baseline | ms | floor, ms | of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        anchor = heading(row.name, device).lower().replace(", ", "-")
        cells = [f"[{row.name}](#{anchor})", f"{row.size}, {row.case['dtype']}"]
        cells += [f"{one[0]} {times(one[1])}" if one else "not timed" for one in (row.usual, row.strongest)]
        cells[-1] += untimed(row)
        floor = f"{ms(row.case['floor_ms'])} ({row.case['bound']})"
        cells += [ms(row.ours["ms"]["median"]), floor, f"{100 * row.case['of_floor']:.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def losses(rows: list[Row]) -> str:
    """Every baseline that is faster."""
    slower = [f"{row.name} ({row.size}): {name} {times(r)}" for row in rows for name, r in row.faster.items()]
    if slower:
        return f"**Slower than a baseline:** {'; '.join(slower)}."
    timed = any(row.baselines for row in rows)
    return "No baseline that was timed is faster in any case." if timed else "**No baseline was timed in this run.**"


def failures(run: dict[str, Any]) -> list[str]:
    """Benchmarks that have no figures, or not all, and why."""
    lines = [f"**Not timed:** {name} ({reason})." for name, reason in run["failed"].items()]
    unfinished = [name for name, one in run["benchmarks"].items() if not one.get("finished", True)]
    return lines + [f"**Some cases only:** {name}." for name in unfinished if name not in run["failed"]]


def case_table(row: Row) -> list[str]:
    """All variants of one case."""
    case = row.case
    lines = [
        f"**{row.size}, {case['dtype']}**",
        "",
        f"| | ms | relative to {OURS} | MiB | error |",
        "|---|---|---|---|---|",
    ]
    for name, timings in case["variants"].items():
        t, ratio = timings["ms"], timings["times_ours"]
        compared = "1" if name == OURS else f"{times(ratio['median'])} ({ratio['lower']:.3g}–{ratio['upper']:.3g})"
        cells = [name, f"{ms(t['median'])} ({ms(t['lower'])}–{ms(t['upper'])})", compared, f"{timings['peak_mib']:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {max(timings['errors'].values()):.0e} |")
    backends = ", ".join(f"{op} by `{backend}`" for op, backend in case["backends"].items()) or "no op of slotkernels"
    reached = f"{case['gflops']:.3g} GFLOP/s ({100 * case['of_product']:.0f} % of a large product)"
    if case["bytes"]:
        reached += f", {case['gbytes']:.3g} GB/s ({100 * case['of_copy']:.0f} % of a copy)"
    lines += ["", f"{backends}. {reached}; floor {ms(case['floor_ms'])} ms, {case['bound']}. {case['rounds']} turns."]
    lines += [f"Left out: {name} ({reason})." for name, reason in row.left_out.items()]
    return [*lines, ""]


def sections(run: dict[str, Any]) -> list[str]:
    """One section per op."""
    lines = []
    for name, benchmark in run["benchmarks"].items():
        measured = {variant for case in benchmark["cases"] for variant in case["variants"]}
        lines += [
            f"### {heading(name, slug(run))}",
            "",
            f"{benchmark['what'][0].upper()}{benchmark['what'][1:]}. Compared with:",
            "",
        ]
        lines += [f"- {variant}: {what}" for variant, what in benchmark["against"].items() if variant in measured]
        lines.append("")
        for case in benchmark["cases"]:
            lines += case_table(Row(name, case))
    return lines


def about(run: dict[str, Any]) -> list[str]:
    """Versions, commit and command of each file of a run, and the rates that were measured with it."""
    lines = []
    for name, file in run["files"].items():
        versions = ", ".join(f"{library} {version}" for library, version in file["versions"].items())
        rates = "; ".join(
            f"{dtype} {t['gflops']:.0f} GFLOP/s, copy {t['gbytes']:.0f} GB/s" for dtype, t in file["limits"].items()
        )
        lines.append(
            f"- [{name}](../../profiling/results/{name}): {versions}; commit {file['commit']}; {file['date']}; "
            f"`{file['command']}`, {file['seconds'] / 60:.0f} minutes, load {file['load_average'][0]:.1f} at the start."
            + (f" A large product and a copy reach: {rates}." if rates else "")
        )
    return lines


def run_section(run: dict[str, Any], title: str, folder: Path) -> list[str]:
    """A device's part of the page."""
    rows, device = rows_of(run), slug(run)
    lines = [
        f"## {title}: {run['device']}",
        "",
        "Data:",
        "",
        *about(run),
        "",
        f"![Ratios and shares of the floor](../pictures/benchmarks-{device}.png)",
        "",
    ]
    lines += [*summary(rows, device), "", losses(rows), "", *failures(run), "", *sections(run)]
    return [*lines, *steps(folder, run), *predictions(folder, run), *beside_predictions(folder, run)]


def resources(stamp: str, rows: list[dict[str, str]], title: str) -> list[str]:
    """Greatest resources of each kernel on each architecture."""
    lines = [
        f"{title} ({stamp.split(' sources')[0]}):",
        "",
        "| kernel | launches | registers | spilled | shared, KiB | occupancy |",
    ]
    lines.append("|---|---|---|---|---|---|")
    kernels: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        kernels.setdefault(row["kernel"], []).append(row)
    for kernel, launches in kernels.items():
        shared = max(int(row["shared_bytes"]) for row in launches) / 1024
        numbers = [max(int(row[key]) for row in launches) for key in ("registers", "spill_bytes")]
        occupancy = [float(row["occupancy"]) for row in launches]
        cells = [f"`{kernel}`", len(launches), *numbers, f"{shared:.0f}", f"{min(occupancy):.0%}–{max(occupancy):.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def recorded(files: list[Recorded]) -> list[str]:
    """The other result files."""
    lines = ["| file | what | made by | date |", "|---|---|---|---|"]
    for entry in files:
        content = entry.content
        what, command, date = (str(content.get(key, "")).replace("|", "\\|") for key in ("what", "command", "date"))
        link = f"[{entry.file}](../../profiling/results/{entry.file})"
        cells = [link, what, command and f"`{command}`", date]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def page(folder: Path = RESULTS) -> str:
    """docs/results/benchmarks.md."""
    runs = read_runs(folder)
    lines = [HEAD]
    lines += run_section(runs["cpu"], "On a CPU", folder) if "cpu" in runs else ["## On a CPU", "", "Not run."]
    lines += busy_machine(folder)
    gpus = [run for run in runs.values() if run["kind"] == "cuda"]
    for run in gpus:
        lines += run_section(run, "On a GPU", folder)
    lines += [NOT_YET] if gpus else ["## On a GPU", "", NOT_RUN, ""]
    lines += solv_step(folder, runs)
    lines += smtc_step(folder)
    lines += ["## What compilers say", ""]
    lines += [
        "Greatest values over all launches and architectures (sm_80, sm_90, sm_100); a test fails if one grows.",
        "",
    ]
    for name, title in (("resources.csv", "Triton"), ("resources-cuda.csv", "CUDA C++")):
        link = f"{title}, [{name}](../../profiling/results/{name})"
        lines += resources(*read_table(folder / name), link)
    lines += [
        "## Other recordings",
        "",
        "The pages of the parts quote these files.",
        "",
        *recorded(read_recorded(folder)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def readme_block(folder: Path = RESULTS) -> str:
    """README's figures: the first case of a few ops and of each training step, on every device that was measured."""
    runs = read_runs(folder)
    lines = ["| | size | usual baseline | strongest baseline | of the floor |", "|---|---|---|---|---|"]
    for run in runs.values():
        lines.append(f"| *{run['device']}* | | | | |")
        for names in HEADLINES:
            name = next((name for name in names if name in run["benchmarks"]), None)
            if name is None:
                continue
            row = Row(name, run["benchmarks"][name]["cases"][0])
            ratios = [f"{times(one[1])} {one[0]}" if one else "not timed" for one in (row.usual, row.strongest)]
            ratios[-1] += untimed(row)
            lines.append(f"| {' | '.join([f'`{name}`', row.size, *ratios, format(row.case['of_floor'], '.0%')])} |")
    compared = [row for run in runs.values() for row in rows_of(run) if row.baselines]
    lost = sum(bool(row.faster) for row in compared)
    missing = "" if any(run["kind"] == "cuda" for run in runs.values()) else " **No GPU has run it so far.**"
    lines += [
        "",
        f"A selection: of all {len(compared)} cases with a baseline, {lost} are slower than one. "
        f"[All of them](docs/results/benchmarks.md).{missing}",
    ]
    return "\n".join(lines)


def with_figures(text: str, folder: Path = RESULTS) -> str:
    """README with its block made anew; as it is where it has no markers."""
    begin, end = MARKERS
    if begin not in text:
        return text
    before, rest = text.split(begin, 1)
    if end not in rest:
        raise ValueError(f"README.md: {begin} without {end}")
    return f"{before}{begin}\n{readme_block(folder)}\n{end}{rest.split(end, 1)[1]}"
