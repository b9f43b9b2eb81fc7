"""The GPU check runs its parts in order, each in its own process, on a simulated machine with a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A stand-in for Python that runs the report's commands and only records all others.
PYTHON = """#!/usr/bin/env bash
if [ "$1 $2" = "-m profiling.common.parts" ]; then exec {real} "$@"; fi
echo "caching=${{PYTORCH_NO_CUDA_MEMORY_CACHING:-}} strict=${{SLOTKERNELS_STRICT:-}} $*" >>{calls}
case "$*" in
    *find_spec*) echo "xdist pytest_reportlog pytest_timeout" ;;
    *{failing}*) exit 1 ;;
    *nvidia.dali*) exit 1 ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
echo "compute-sanitizer $*" >>{calls}
while [ "$1" != {python} ]; do shift; done
exec "$@"
"""
NCU = """#!/usr/bin/env bash
echo "ncu $*" >>{calls}
while [ $# -gt 0 ]; do [ "$1" != --export ] || touch "$2.ncu-rep"; shift; done
"""


@pytest.fixture
def check(tmp_path):
    """check(half, ...) -> what `profiling/gpu_check.sh HALF --device cuda` runs on a machine that has the tools and no
    git: its report, its calls, and the files that it leaves."""
    tools = tmp_path / "tools"
    tools.mkdir()
    needed = "bash cat cp cut date dirname env find gzip ls mkdir mktemp mv printf rm sleep tail tar timeout touch wc"
    for name in needed.split():
        (tools / name).symlink_to(shutil.which(name))
    calls = tmp_path / "calls"

    def run(half, *options, failing="nothing", **variables):
        calls.write_text("")
        texts = {"python": PYTHON, "compute-sanitizer": SANITIZER, "ncu": NCU}
        for name, text in texts.items():
            path = tools / name
            path.write_text(text.format(real=sys.executable, calls=calls, failing=failing, python=tools / "python"))
            path.chmod(0o755)
        out = tmp_path / "out"
        environment = {"PATH": str(tools), "PYTHON": str(tools / "python"), "OUT": str(out), "HOME": str(tmp_path)}
        environment |= {"SCRATCH": str(tmp_path / "scratch"), "CARRY": str(tmp_path / "carry"), **variables}
        command = [ROOT / "profiling" / "gpu_check.sh", half, "--device", "cuda", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        report = json.loads((out / f"gpu-{half}-cuda.json").read_text())
        return done, report, calls.read_text().splitlines(), sorted(path.name for path in out.iterdir())

    return run


def names(half):
    command = [ROOT / "profiling" / "gpu_check.sh", half, "--list"]
    environment = {**os.environ, "CARRY": "/nowhere"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_most_valuable_parts_come_first():
    figures, proof = names("figures"), names("proof")
    assert figures[:5] == ["device", "unpack", "csrc", "compile the steps", "smoke test"]
    captured = [f"step, {stage}, captured" for stage in ("image", "video")]
    assert figures[5:7] == captured
    assert figures.index("benchmarks of our variants") < figures.index("step, image, eager")
    assert figures[-1] == "predictions"
    assert not [name for name in figures if name.startswith("tests")]
    order = ["exact resume", "tests", "sanitizer, memcheck", "values of the baselines", "benchmarks with baselines"]
    order.append("ncu, image")
    assert [name for name in proof if name in order] == order


@pytest.mark.parametrize("half", ["figures", "proof"])
def test_all_parts_run_without_git_and_leave_few_files(check, half):
    (done, report, _, files) = check(half, INTERPRETER_REVISION="carried-1")
    assert done.returncode == 0, done.stdout + done.stderr
    fates = {part["name"]: part["fate"] for part in report["parts"]}
    assert set(fates) == set(names(half))
    assert {name for name, fate in fates.items() if fate != "passed"} <= {"decoding with DALI"}
    assert report["commit"] == "carried-1"
    assert report["finished"]
    # Results of the commands, which are stood in for here: smoke, steps, bench, predictions; tests, bench, two of ncu.
    written = {"figures": 4, "proof": 2}[half]
    assert len(files) + written <= 8
    assert not [name for name in files if name.endswith((".ncu-rep", ".tmp"))]


def test_each_step_has_a_process_of_its_own(check):
    calls = check("figures", "--only", "step")[2]
    steps = [line.split("profiling.step ")[1] for line in calls if "-m profiling.step" in line]
    assert len(steps) == len(set(steps)) == 10
    assert all("--preset ytvis19" in step and "--breakdown" in step for step in steps)


def test_tests_steal_work_and_are_recorded_one_by_one(check):
    (call,) = (line for line in check("proof", "--only", "tests")[2] if "-m pytest" in line)
    assert "-n 12 --dist worksteal" in call
    assert "--report-log" in call
    assert "strict=1" in call


def test_sanitizers_see_each_tensor_and_clocks_are_left_alone(check):
    calls = check("proof")[2]
    tools = [line.split()[2] for line in calls if line.startswith("compute-sanitizer")]
    assert tools == ["memcheck", "racecheck"]
    exercised = [line for line in calls if "profiling.gpu.exercise" in line and not line.startswith("compute")]
    assert len(exercised) == 2
    assert all(line.startswith("caching=1") for line in exercised)
    counters = [line for line in calls if line.startswith("ncu") and "--export" in line]
    assert len(counters) == 2
    assert all("--clock-control none" in line for line in counters)


def test_a_part_that_fails_costs_only_itself(check):
    done, report, _, _ = check("figures", failing="profiling.gpu.smoke")
    assert done.returncode == 1
    failed = [part["name"] for part in report["parts"] if part["fate"] != "passed"]
    assert failed == ["smoke test"]
    assert "1 parts failed" in done.stdout


def test_the_budget_is_kept_by_its_own_clock(check):
    done, report, _, _ = check("figures", BUDGET="2")
    assert done.returncode == 1
    assert {part["fate"] for part in report["parts"]} == {"left out"}


def test_results_of_an_earlier_run_are_removed(check, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("steps-cuda.json", "bench-cuda.json", "tests-cuda.jsonl", "other.json"):
        (tmp_path / "out" / name).write_text("{}")
    assert {"bench-cuda.json", "steps-cuda.json"} <= set(check("figures", "--only", "device")[3])
    files = check("figures")[3]
    assert not {"bench-cuda.json", "steps-cuda.json"} & set(files)
    assert {"other.json", "tests-cuda.jsonl"} <= set(files)
    assert "tests-cuda.jsonl" not in check("proof")[3]


def test_a_name_that_no_part_has_is_an_error(check):
    assert check("figures", "--only", "unpack|nothing")[0].returncode == 0
    done = check("figures", "--only", "nothing")[0]
    assert done.returncode == 2
    assert "no part's name begins with 'nothing'; --list names them" in done.stderr


def test_a_dry_run_stays_away_from_the_committed_results(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/usr/bin/env bash\n[ "$1 $2" != "-m profiling.common.parts" ] || echo "$4" >>' + f"{tmp_path}/paths\n"
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "SCRATCH": str(tmp_path / "scratch")}
    environment.pop("OUT", None)
    command = [str(ROOT / "profiling" / "gpu_check.sh"), "figures", "--device", "cpu", "--only", "device"]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    paths = set((tmp_path / "paths").read_text().split())
    assert paths == {str(tmp_path / "scratch" / "dry-run" / "gpu-figures-cpu")}


def test_csrc_is_built_where_none_was_carried(check):
    calls = check("figures", "--only", "csrc", failing="profiling.gpu.native")[2]
    assert [line for line in calls if "setup.py -q build_ext --inplace" in line]
    assert [line for line in calls if "get_device_capability" in line]  # for this GPU alone


@pytest.mark.parametrize("options", [[], ["everything"], ["proof", "--device", "tpu"], ["figures", "--quick"]])
def test_unknown_options_print_the_usage(options):
    command = [ROOT / "profiling" / "gpu_check.sh", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OUT": "/dev/null"})
    assert done.returncode == 2
    assert "usage: profiling/gpu_check.sh figures|proof" in done.stderr
