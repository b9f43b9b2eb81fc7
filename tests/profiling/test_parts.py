"""If parts of a check fail, hang or are killed, the report of the other parts is complete."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = "set -uo pipefail; source profiling/common/parts.sh; begin_report {out}/report 'a check' cpu; "


@pytest.fixture
def script(tmp_path):
    """script(text) -> a process of bash that runs the text after the report was begun; its report is under tmp_path."""
    environment = {**os.environ, "PYTHON": sys.executable}

    def start(text):
        command = ["bash", "-c", HEAD.format(out=tmp_path) + text]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def fates(folder):
    report = json.loads((folder / "report.json").read_text())
    text = (folder / "report.md").read_text()
    for part in report["parts"]:
        assert f"| {part['name']} | {part['fate']} |" in text
        assert f"## {part['name']}: {part['fate']}" in text
    assert ("Not finished" in text) == (not report["finished"])
    return report, {part["name"]: part["fate"] for part in report["parts"]}


def test_a_part_that_fails_or_hangs_does_not_lose_the_others(script, tmp_path):
    process = script(
        "part good 9 echo fine; part bad 9 bash -c 'exit 3'; part missing 9 /no/such/program;"
        # Its child keeps the output open, and it ignores SIGTERM.
        "part hangs 1 bash -c 'trap \"\" TERM; sleep 60 & sleep 60; sleep 60';"
        "skip tool 'it is not installed'; part last 9 echo end; end_report"
    )
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    report, results = fates(tmp_path)
    assert report["finished"]
    assert results == {
        "good": "passed",
        "bad": "failed (3)",
        "missing": "failed (127)",
        "hangs": "out of time",
        "tool": "left out",
        "last": "passed",
    }
    assert report["parts"][0]["output"] == ["fine"]
    assert "3 parts failed" in output
    assert report["versions"]["python"]


def test_a_killed_check_leaves_a_whole_report(script, tmp_path):
    process = script(f"part first 9 echo 1; part second 60 bash -c 'touch {tmp_path}/begun; sleep 60'")
    wait_until((tmp_path / "begun").exists)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    process.kill()
    for child in children.split():
        os.kill(int(child), signal.SIGTERM)  # timeout passes it on
    process.communicate(timeout=30)
    report, results = fates(tmp_path)
    assert not report["finished"]
    assert results == {"first": "passed", "second": "under way"}


def test_ctrl_c_ends_the_part_and_the_check(script, tmp_path):
    sleep = f"sleep 61.{os.getpid()}"  # a command line that no other process has
    process = script(f"part long 60 bash -c 'touch {tmp_path}/begun; {sleep}'; part next 9 touch {tmp_path}/next")
    wait_until((tmp_path / "begun").exists)
    process.send_signal(signal.SIGINT)
    ended_by_ctrl_c(process, sleep, tmp_path)


@pytest.mark.parametrize("kind", ["part", "background"])
def test_ctrl_c_ends_a_part_that_has_only_just_begun(script, tmp_path, kind):
    sleep = f"sleep 62.{os.getpid()}"
    # Before each command bash looks whether a job runs: the signal comes before the first command after the start.
    at_once = "set -T; trap '[ -z \"$(jobs -pr)\" ] || { trap - DEBUG; kill -INT $$; }' DEBUG;"
    process = script(f"{at_once} {kind} long 60 {sleep}; part next 9 touch {tmp_path}/next")
    ended_by_ctrl_c(process, sleep, tmp_path)


def ended_by_ctrl_c(process, command, folder):
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in output
    assert not (folder / "next").exists()
    # The signal is on its way to the part.
    wait_until(lambda: not subprocess.run(["pgrep", "-f", command], capture_output=True).stdout)
    assert fates(folder)[1] == {"long": "under way"}


def test_a_part_that_was_killed_early_is_not_out_of_time(script, tmp_path):
    process = script("part killed 30 bash -c 'kill -9 $$'; end_report")
    process.communicate(timeout=30)
    assert fates(tmp_path)[1] == {"killed": "killed (137), perhaps for its memory"}


def test_a_background_part_runs_beside_the_next(script, tmp_path):
    process = script(
        f"background slow 20 bash -c 'until [ -e {tmp_path}/next ]; do sleep 0.1; done; exit 4';"
        f"part next 9 touch {tmp_path}/next; await || echo it gave $?; end_report"
    )
    output, _ = process.communicate(timeout=30)
    assert "it gave 4" in output
    assert fates(tmp_path)[1] == {"slow": "failed (4)", "next": "passed"}


def test_parts_share_a_budget(script, tmp_path):
    process = script("BUDGET=5; SECONDS=0; part cut 60 sleep 60; part late 5 echo no; end_report")
    process.communicate(timeout=60)
    report, results = fates(tmp_path)
    assert report["parts"][0]["limit"] <= 5
    assert results == {"cut": "out of time", "late": "left out"}
    assert process.returncode == 1


def test_a_report_names_files_by_their_place_in_the_repository(script, tmp_path):
    process = script('part one 9 echo "$PWD/docs/index.md and /elsewhere"; end_report')
    process.communicate(timeout=30)
    assert fates(tmp_path)[0]["parts"][0]["output"] == ["docs/index.md and /elsewhere"]


def test_exit_status_is_zero_if_all_parts_pass(script, tmp_path):
    process = script("part one 9 true; end_report")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert fates(tmp_path)[1] == {"one": "passed"}
