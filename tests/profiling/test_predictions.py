"""Predictions for a GPU are compared with what was measured; what was not measured is marked."""

import json

import pytest

from profiling.accounting.breakdown import idle
from profiling.gpu.predictions import PREDICTIONS, device_of, measured, rows_of, table
from profiling.step import add

RESULTS = {
    "device": {"device": "NVIDIA H200", "date": "today", "limits": {"bfloat16": {"gbytes": 4200.0}}},
    "steps": {
        "steps": {
            "image captured": {
                "milliseconds": {"median": 90.0},
                "breakdown": [{"name": "forward_kernel", "calls": 3, "milliseconds": 0.3}],
            }
        }
    },
    "bench": {
        "benchmarks": {
            "op": {"cases": [{"shape": {"B": b}, "variants": {"slotkernels": {"ms": {"median": b}}}} for b in (1, 2)]}
        }
    },
}


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (["device", "bfloat16", "gbytes", 1e-3], 4.2),
        (["step", "image captured", "milliseconds.median", 1], 90.0),
        (["step", "video captured", "milliseconds.median", 1], None),
        (["kernel", "image captured", "forward_kernel", 1000], 100.0),
        (["kernel", "image captured", "other_kernel", 1000], None),
        (["bench", "op", {"B": 2}, 1000], 2000.0),
        (["bench", "op", {"B": 3}, 1000], None),
    ],
)
def test_a_figure_is_found_where_the_prediction_says(source, value):
    assert measured(source, RESULTS) == (None if value is None else pytest.approx(value))


def test_ratio_is_to_the_middle_of_the_devices_range():
    row = {"figure": "a step", "unit": "ms", "h100": [1, 3], "h200": [80, 100], "reason": "a guess"}
    rows = [
        {**row, "from": ["step", "image captured", "milliseconds.median", 1], "found": {"NVIDIA H200, today": "why"}},
        {**row, "from": ["step", "image eager", "milliseconds.median", 1]},
    ]
    table_rows = rows_of({"rows": rows}, RESULTS)
    assert [one["ratio"] for one in table_rows] == [1.0, None]
    assert [one["difference"] for one in table_rows] == ["why", ""]
    assert "| a step | 80 to 100 ms | 90 ms | 1.00 |" in table(table_rows)
    assert "| a step | 80 to 100 ms | not measured |  |" in table(table_rows)


def test_another_device_is_not_judged_by_these_predictions(capsys):
    assert rows_of({"rows": [{"from": []}]}, {**RESULTS, "device": {"device": "NVIDIA A100"}}) == []
    assert "nothing was predicted for this device: NVIDIA A100" in capsys.readouterr().out


def test_every_prediction_has_a_range_for_both_cards_and_a_place():
    for row in json.loads(PREDICTIONS.read_text())["rows"]:
        for card in ("h100", "h200"):
            low, high = row[card]
            assert 0 < low < high
        measured(row["from"], RESULTS)  # which knows this kind of place
        assert row["reason"]


def test_device_is_read_from_the_report_of_its_part():
    part = {"name": "device", "fate": "passed", "output": ["{", ' "device": "a GPU"', "}"]}
    assert device_of({"parts": [part]}) == {"device": "a GPU"}
    part["output"] = ["a warning", *part["output"], "another"]
    assert device_of({"parts": [part]}) == {"device": "a GPU"}
    assert device_of({"parts": [{**part, "fate": "failed (1)"}]}) == {}


def test_idle_time_is_that_in_which_no_kernel_runs():
    spans = [(0, 1_000_000), (500_000, 800_000), (3_000_000, 4_000_000), (4_000_000, 4_500_000)]
    assert idle(spans) == {"span_ms": 4.5, "idle_ms": 2.0}
    assert idle([]) == {"span_ms": 0.0, "idle_ms": 0.0}


def test_steps_of_several_processes_share_a_file(tmp_path):
    about = {"device": "a GPU", "versions": {}, "commit": "abc", "date": "today", "command": "step"}
    for mode, deterministic in (("eager", True), ("captured", True), ("captured", False), ("captured", True)):
        step = {**about, "stage": "image", "mode": mode, "deterministic": deterministic}
        add(tmp_path / "steps.json", step)
    content = json.loads((tmp_path / "steps.json").read_text())
    add(tmp_path / "other.json", {**about, "stage": "image", "mode": "eager", "deterministic": True})
    add(tmp_path / "other.json", {**step, "device": "another GPU"})
    assert list(json.loads((tmp_path / "other.json").read_text())["steps"]) == ["image captured"]
    assert list(content["steps"]) == ["image eager", "image captured", "image captured, not deterministic"]
    assert content["commit"] == "abc"
