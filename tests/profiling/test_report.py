"""The generated pages of docs/results, their plots and README's figures agree with profiling/results."""

import json
import shutil

import pytest

from profiling.report.__main__ import ROOT, stale
from profiling.report.markdown import paragraph
from profiling.report.page import pages
from profiling.report.plans import PAGE, row, with_table
from profiling.report.plot import digest, draw, read_digest
from profiling.report.predicted import beside_predictions
from profiling.report.readme import MARKERS, readme_block, with_figures
from profiling.report.results import RESULTS, read_runs

REMEDY = "run `python -m profiling.report`, look at the difference and commit it"


def variant(ratio, error=1e-6):
    spread = {"median": ratio, "lower": ratio * 0.9, "upper": ratio * 1.1, "least": ratio, "greatest": ratio}
    return {"ms": spread, "times_ours": spread, "peak_mib": 1.5, "errors": {"value": error}, "first_call_s": 0.1}


def run_of(kind, name, device=None, **variants):
    case = {"shape": {"B": 8, "grid": [24, 36]}, "dtype": "float32", "backends": {name: "cpp"}, "rounds": 5}
    case |= {"floor_ms": 0.25, "bound": "memory", "of_floor": 0.25, "bytes": 10, "flops": 10}
    case |= {"gbytes": 5.0, "gflops": 7.0, "of_copy": 0.25, "of_product": 0.05, "left_out": {"absent": "not installed"}}
    case["variants"] = {**{key: variant(ratio) for key, ratio in variants.items()}, "slotkernels": variant(1.0, 0.0)}
    benchmark = {"what": "an op", "against": {key: f"what {key} is" for key in variants}, "cases": [case]}
    about = {
        "device": device or f"a {kind}",
        "versions": {"torch": "2"},
        "commit": "abc",
        "command": "bench",
        "date": "today",
    }
    about |= {"kind": kind, "load_average": [0.5, 0, 0], "seconds": 60.0, "failed": {}}
    return {**about, "limits": {"float32": {"gbytes": 20.0, "gflops": 140.0}}, "benchmarks": {name: benchmark}}


@pytest.fixture
def folder(tmp_path):
    """A copy of the tables and recordings, without runs."""
    where = tmp_path / "results"
    shutil.copytree(RESULTS, where, ignore=shutil.ignore_patterns("bench-*.json", "steps-*", "predictions-*"))
    return where


def save(folder, name, run):
    (folder / name).write_text(json.dumps(run))


def overview(folder):
    """The page of all benchmarks, in one line."""
    return pages(folder)["docs/results/benchmarks.md"].replace("\n", " ")


def page_of(name, folder):
    """The page of a benchmark."""
    return pages(folder)[f"docs/results/benchmarks/{name}.md"]


def test_pages_plots_and_readme_agree_with_the_results():
    assert stale() == [], REMEDY


@pytest.mark.parametrize(("name", "text"), pages().items(), ids=pages())
def test_pages_are_short(name, text):
    lines = text.splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120 and line[0] != "|"] == []


def test_a_changed_number_makes_pages_readme_and_plot_stale(folder, tmp_path):
    (tmp_path / "docs/pictures").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    save(folder, "bench-cpu.json", run_of("cpu", "propagate_labels", eager=7.5))
    op = "docs/results/benchmarks/propagate_labels.md"
    everything = ["docs/results/benchmarks.md", op, "README.md", "docs/pictures/benchmarks-cpu.png"]
    assert set(everything) < set(stale(tmp_path, folder))
    stale(tmp_path, folder, write=True)
    assert stale(tmp_path, folder) == []
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith(f"before\n{MARKERS[0]}\n| | size")
    assert readme.endswith(f"{MARKERS[1]}\nafter\n")
    assert "`propagate_labels` | B 8, grid 24×36 | 7.5× eager | 7.5× eager; not timed: absent | 25% |" in readme

    save(folder, "bench-cpu.json", run_of("cpu", "propagate_labels", eager=7.6))
    assert stale(tmp_path, folder) == everything
    (folder / "resources-cuda.csv").write_text((folder / "resources-cuda.csv").read_text().replace(",127,", ",128,"))
    save(folder, "bench-cpu.json", run_of("cpu", "propagate_labels", eager=7.5))
    assert stale(tmp_path, folder) == ["docs/results/kernel_resources.md"]


def test_a_page_without_a_benchmark_is_stale_and_deleted(folder, tmp_path):
    (tmp_path / "docs/pictures").mkdir(parents=True)
    (tmp_path / "README.md").write_text("")
    save(folder, "bench-cpu.json", run_of("cpu", "op", eager=7.5))
    stale(tmp_path, folder, write=True)
    save(folder, "bench-cpu.json", run_of("cpu", "other", eager=7.5))
    assert "docs/results/benchmarks/op.md" in stale(tmp_path, folder)
    stale(tmp_path, folder, write=True)
    assert stale(tmp_path, folder) == []
    assert [path.name for path in tmp_path.glob("docs/results/benchmarks/*")] == ["other.md"]


def test_losses_are_listed_and_the_strongest_is_the_fastest(folder):
    save(folder, "bench-cpu.json", run_of("cpu", "op", eager=3.0, compiled=0.5))
    assert "**Slower than a baseline**, with the number of sizes: [`op`](benchmarks/op.md) (1 of 1)." in overview(
        folder
    )
    assert "| 3× eager; **0.5×** compiled; not timed: absent |" in overview(folder)
    text = page_of("op", folder)
    assert "\n| B 8, grid 24×36, float32 | eager | 3 (2.7–3.3) | 3× (2.7–3.3) | 1.5 | 1e-06 |\n| | compiled |" in text
    assert "| | compiled | 0.5 (0.45–0.55) | **0.5×** (0.45–0.55) | 1.5 | 1e-06 |" in text
    assert "| | `slotkernels` | 1 (0.9–1.1) | 1 | 1.5 | 0e+00 |\n| | floor (memory) | 0.25 | 0.25× | | |" in text

    assert "- Backends: op by `cpp`.\n- Not timed: absent (not installed).\n" in text
    assert "copy reach 140 GFLOP/s and 20 GB/s in float32." in text.replace("\n", " ")
    save(folder, "bench-cpu.json", run_of("cpu", "op", eager=3.0))
    assert "At no size is a baseline faster beyond the spread" in overview(folder)


def test_remarks_about_some_sizes_name_them(folder):
    run = run_of("cpu", "op", eager=3.0)
    (case,) = run["benchmarks"]["op"]["cases"]
    cases = [{**case, "shape": {"B": 1}}, {**case, "shape": {"B": 2}}, {**case, "shape": {"B": 3}}]
    cases[1] |= {"backends": {"op": "reference"}, "left_out": {"absent": "too large"}}
    run["benchmarks"]["op"]["cases"] = cases
    save(folder, "bench-cpu.json", run)
    remarks = page_of("op", folder).split("| | floor (memory) | 0.25 | 0.25× | | |\n")[-1].strip().splitlines()
    assert remarks == [
        "- Backends at B 2, float32: op by `reference`.",
        "- Backends at all other sizes: op by `cpp`.",
        "- Not timed: absent at B 1, float32; B 3, float32 (not installed).",
        "- Not timed: absent at B 2, float32 (too large).",
    ]


def test_lines_break_outside_of_code():
    assert paragraph("a" * 110 + " `one two` three", "- ", "  ") == ["- " + "a" * 110, "  `one two` three"]


def test_a_baseline_whose_quartiles_lie_on_both_sides_of_ours_is_no_loss(folder):
    save(folder, "bench-cpu.json", run_of("cpu", "op", eager=0.95))  # 0.855 to 1.045
    assert "At no size is a baseline faster beyond the spread" in overview(folder)
    assert "1 cases have a baseline, and in 0 of them a baseline is faster." in readme_block(folder)


def test_the_page_says_so_until_a_gpu_has_results(folder):
    save(folder, "bench-cpu.json", run_of("cpu", "op", eager=3.0))
    assert "## GPU  No GPU has run these benchmarks." in overview(folder)
    readme = f"{MARKERS[0]}{MARKERS[1]}"
    assert "**No GPU has run it so far.**" in with_figures(readme, folder)
    save(folder, "bench-cuda.json", run_of("cuda", "op", eager=9.0))
    assert "No GPU" not in overview(folder)
    section = page_of("op", folder).split("\n## CUDA\n\n")[1].replace("\n", " ")
    assert section.startswith(
        "a cuda; torch 2; commit abc, today, load 0.5 at the start. Data: [bench-cuda.json](../../.."
    )
    assert "`python -m profiling.bench --device cuda --only op`" in section
    assert "No GPU" not in with_figures(readme, folder)


def test_files_of_one_device_join_and_conflicts_fail(folder):
    save(folder, "bench-cpu-1.json", run_of("cpu", "op", eager=3.0))
    save(folder, "bench-cpu-2.json", run_of("cpu", "other", eager=4.0))
    assert list(read_runs(folder)["cpu"]["benchmarks"]) == ["op", "other"]
    save(folder, "bench-cpu-2.json", run_of("cpu", "op"))
    assert "eager" in read_runs(folder)["cpu"]["benchmarks"]["op"]["cases"][0]["variants"]
    save(folder, "bench-cpu-2.json", run_of("cpu", "op", eager=4.0))
    with pytest.raises(ValueError, match=r"bench-cpu-2\.json: op are in bench-cpu-1\.json too"):
        pages(folder)


def test_two_gpus_have_sections_and_plots_of_their_own(folder, tmp_path):
    h100, h200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
    save(folder, "bench-cuda.json", run_of("cuda", "propagate_labels", h200, eager=9.0))
    save(folder, "bench-h100-cuda.json", run_of("cuda", "propagate_labels", h100, eager=8.0))
    save(folder, "bench-more-cuda.json", run_of("cuda", "other", h200, eager=7.0) | {"commit": "def", "limits": {}})
    save(folder, "steps-cuda.json", json.loads((RESULTS / "steps-cuda.json").read_text()) | {"device": h100})
    runs = read_runs(folder)
    assert {device: list(run["benchmarks"]) for device, run in runs.items()} == {
        "h200": ["propagate_labels", "other"],
        "h100": ["propagate_labels"],
    }

    assert (
        "| [`propagate_labels`](benchmarks/propagate_labels.md) | 9× eager; not timed: absent | 8× eager"
        in overview(folder)
    )
    assert "| [`other`](benchmarks/other.md) | 7× eager; not timed: absent | – |" in overview(folder)
    first, second = page_of("propagate_labels", folder).split("\n## H200\n\n")[1].split("\n## H100\n\n")
    assert first.startswith(f"{h200};")
    assert second.startswith(f"{h100};")
    assert "| 9× (" in first
    assert "| 9× (" not in second
    assert "commit abc, today" in first
    assert "A large" in first
    other = page_of("other", folder)
    assert "commit def, today" in other
    assert "A large" not in other
    assert "## H100" not in other
    steps = pages(folder)["docs/results/training_steps.md"]
    assert steps.count(f"{h100}; torch") == 1
    assert f"{h200}; torch" not in steps
    readme = with_figures("".join(MARKERS), folder)
    assert readme.index(h200) < readme.index("9× eager") < readme.index(h100) < readme.index("8× eager")

    (tmp_path / "docs/pictures").mkdir(parents=True)
    (tmp_path / "README.md").write_text("")
    assert stale(tmp_path, folder)[-2:] == ["docs/pictures/benchmarks-h200.png", "docs/pictures/benchmarks-h100.png"]


def test_devices_of_one_short_name_are_refused(folder):
    save(folder, "bench-1.json", run_of("cuda", "op", "NVIDIA A100-SXM4-40GB", eager=9.0))
    save(folder, "bench-2.json", run_of("cuda", "other", "NVIDIA A100-PCIE-80GB", eager=9.0))
    with pytest.raises(ValueError, match="A100-PCIE-80GB and NVIDIA A100-SXM4-40GB are both called a100"):
        read_runs(folder)


def test_predictions_quote_files_and_explain_their_own_run():
    run = read_runs()["h100"]
    text = " ".join(" ".join(beside_predictions(RESULTS, run)).split())
    assert "captured, 175 to 215 ms predicted, 198 measured, ratio 1.02" in text
    assert "650 to 1100 µs predicted, 1228 measured" in text
    assert "With a number for `diameter` it takes 811 µs (600 to 850 predicted)" in text
    run["benchmarks"]["train_video"]["cases"][0]["variants"]["slotkernels captured"]["ms"]["median"] = 390.0
    text = " ".join(" ".join(beside_predictions(RESULTS, run | {"date": "2027-01-01"})).split())
    assert "390 measured, ratio 2.00" in text
    assert "flash attention" not in text
    assert beside_predictions(RESULTS, read_runs()["h200"]) == []


def test_a_variant_that_was_measured_is_not_left_out(folder):
    run = run_of("cpu", "op", eager=3.0)
    run["benchmarks"]["op"]["cases"][0]["left_out"] = {"eager": "not asked for", "other": "not asked for"}
    save(folder, "bench-cpu.json", run)
    lines = page_of("op", folder).splitlines()
    assert [line for line in lines if "Not timed" in line] == ["- Not timed: other (not asked for)."]


def test_failed_and_unfinished_benchmarks_are_listed(folder):
    run = run_of("cpu", "op", eager=3.0) | {"failed": {"third": "its values are wrong"}}
    run["benchmarks"]["op"]["finished"] = False
    save(folder, "bench-cpu.json", run)
    assert "Not timed, or not at all sizes: `third`, [`op`](benchmarks/op.md)." in overview(folder)
    assert "- The run was stopped before all sizes were timed.\n" in page_of("op", folder)
    save(folder, "bench-cuda.json", run_of("cuda", "third", eager=3.0))  # another device gives it a page
    assert "sizes: [`third`](benchmarks/third.md), [`op`](benchmarks/op.md)." in overview(folder).replace("\n", " ")
    run["failed"]["op"] = "OutOfMemoryError: no memory. Tried to allocate 3 GiB."
    save(folder, "bench-cpu.json", run)
    assert "- The run ended with an error: OutOfMemoryError: no memory.\n" in page_of("op", folder)
    gpu = run_of("cuda", "other", eager=3.0) | {"failed": {"op": "its values are wrong"}}
    save(folder, "bench-cuda.json", gpu)
    assert "\n## CUDA\n\na cuda. Not timed: its values are wrong.\n" in page_of("op", folder)


def test_a_run_without_baselines_claims_no_ratios(folder, tmp_path):
    run = run_of("cuda", "propagate_labels")
    save(folder, "bench-cuda.json", run)
    assert "| no baseline timed |" in overview(folder)
    assert "**No baseline was timed in this run.**" in overview(folder)
    row = "| `propagate_labels` | B 8, grid 24×36 | not timed | not timed | 25% |"
    assert row in with_figures("".join(MARKERS), folder)
    draw(run, tmp_path / "plot.png")
    assert read_digest(tmp_path / "plot.png") == digest(run)


def test_plot_carries_the_hash_of_what_it_shows(tmp_path):
    runs = {ratio: run_of("cpu", "op", eager=ratio) for ratio in (0.5, 2.0)}
    draw(runs[2.0], tmp_path / "plot.png")
    assert read_digest(tmp_path / "plot.png") == digest(runs[2.0]) != digest(runs[0.5])
    assert read_digest(tmp_path / "nothing.png") is None


def test_readme_needs_both_markers_or_none(folder):
    assert with_figures("text", folder) == "text"
    with pytest.raises(ValueError, match=r"README\.md: <!-- figures --> without"):
        with_figures(MARKERS[0], folder)


def test_every_recording_says_what_it_is():
    for path in ROOT.glob("profiling/results/*.json"):
        content = json.loads(path.read_text())
        assert path.name.startswith("bench-") or content.get("what"), f"{path.name} has no 'what'"
        assert content.get("command"), path.name


def test_the_table_of_transport_plans_is_made_of_the_results():
    text = (ROOT / PAGE).read_text()
    assert with_table(text) == text, "run `python -m profiling.report.plans`, look at the difference and commit it"


def test_a_baseline_that_is_faster_than_the_plan_is_bold():
    ratios = {"POT": 2.5, "textbook": 0.814, "slotkernels": 1.0}
    variants = {name: {"ms": {"median": 7.81 * r}, "times_ours": {"median": r}} for name, r in ratios.items()}
    case = {"shape": {"B": 1, "N": 8, "M": 9, "with": "gradient"}, "dtype": "float32", "variants": variants}
    assert row(case) == ["1 × (8 × 9), with gradient", "float32", "7.81", "2.5", "", "", "**0.814**", ""]
