"""Whether ``make demo`` compiles follows from what was measured."""

import json

import pytest

from profiling.common.paths import RESULTS, ROOT
from profiling.demo_compiled import TRAININGS, steps_of_demo, timed, totals


def test_steps_are_those_of_the_makefile():
    assert len(steps_of_demo()) == sum(map(len, TRAININGS.values())) == 3
    assert f"{steps_of_demo()[0]} {steps_of_demo()[1]}" in (ROOT / "Makefile").read_text()


def test_the_first_step_counts_once():
    modes = {"eager": {"first_s": 1.0, "step_s": 2.0}, "compiled": {"first_s": 10.0, "step_s": 1.0}}
    assert totals(modes, 11) == {"steps": 11, "eager": 21.0, "compiled": 20.0, "saved": 1.0}


def test_steps_are_timed_after_the_first():
    result = timed("video", compiled=False, seconds=0.0)
    assert result["timed_steps"] == 4
    assert min(result["first_s"], result["step_s"]) > 0


@pytest.mark.parametrize("stage", TRAININGS)
def test_the_demo_compiles_only_where_that_saves_time(stage):
    measured = json.loads((RESULTS / "demo-compiled-cpu.json").read_text())["stages"][stage]
    steps = [steps_of_demo()[place] for place in TRAININGS[stage]]
    assert [one["steps"] for one in measured["trainings"]] == steps, "measure anew: the Makefile has other steps"
    demo = (ROOT / "Makefile").read_text().split("\ndemo: ")[1].split("\n\n")[0]
    lines = [line for line in demo.splitlines() if f"--stage {stage}" in line]
    for one, line in zip(measured["trainings"], lines, strict=True):
        assert ("--compile" in line) == (one["saved"] > 0), f"{one['saved']:.0f} s saved: {line}"
