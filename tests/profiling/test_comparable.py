"""Our numbers agree with recorded numbers of published code, and so do the pages made of the comparison."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from profiling.common.paths import RESULTS, ROOT
from profiling.comparable.__main__ import compare
from profiling.comparable.page import (
    FILE,
    FIRST,
    PAGES,
    cells,
    drop_in,
    examples,
    geomloss_options,
    of_group,
    with_tables,
    write_pages,
)
from profiling.comparable.peers import Comparison, MissingPeerError, Peers, difference
from profiling.comparable.rows import COMPARISONS
from profiling.geomloss_examples import digest, run
from profiling.geomloss_options import distances

RECORDED = {row["name"]: row for row in json.loads((RESULTS / FILE).read_text())["rows"]}
EQUAL = [comparison for comparison in COMPARISONS if comparison.bound is not None]


@pytest.mark.parametrize("comparison", EQUAL, ids=lambda comparison: comparison.name)
def test_ours_are_the_numbers_that_the_peer_computed(comparison):
    for case, theirs in enumerate(RECORDED[comparison.name]["values"]):
        assert difference(comparison.ours(case)[: len(theirs)], np.array(theirs)) <= 10 * comparison.bound


def test_every_row_was_run_and_is_as_equal_as_the_page_says():
    assert list(RECORDED) == [comparison.name for comparison in COMPARISONS]
    for comparison in EQUAL:
        row = RECORDED[comparison.name]
        assert row["bound"] == comparison.bound
        assert row["cases"] == comparison.cases
        assert row["largest_difference"] <= comparison.bound


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_made_of_the_results(page):
    text = (ROOT / page).read_text()
    made = with_tables(page, text, RESULTS)
    assert made == text, "run `python -m profiling.comparable --page` and commit the difference"


def test_changed_results_change_a_page_and_every_row_is_on_one(tmp_path):
    assert [one for group in FIRST for one in of_group(group)] == list(COMPARISONS)
    (tmp_path / "docs/results").mkdir(parents=True)
    for page in PAGES:
        (tmp_path / page).write_text((ROOT / page).read_text())
    assert write_pages(tmp_path, RESULTS) == []
    assert write_pages(tmp_path, tmp_path) == list(PAGES)  # without results
    with pytest.raises(ValueError, match=r"has the tables \(\), expected"):
        with_tables("docs/results/comparable_ops.md", "text", RESULTS)


def rows_of(bound, ours, theirs):
    def peer(peers):
        return "Peer 1", lambda case: theirs

    return Comparison("a", "Peer", "sums", "Ours.", 2, bound, lambda case: ours, peer)


@pytest.mark.parametrize(
    ("bound", "theirs", "said"),
    [
        (1e-9, [1.0, 2.0], ["0", "both, equal. Ours."]),
        (1e-9, [1.0, 2.0 + 1e-10], ["5e-11", "both, equal up to rounding. Ours."]),
        (1e-9, [1.0, 4.0], ["0.50", "**not equal** (more than 1e-09). Ours."]),
        (None, [1.0, 4.0], ["0.50", "Ours."]),
        (1e-9, [1.0, float("nan")], ["inf", "**not equal** (more than 1e-09). Ours."]),
        (1e-9, [1.0], ["inf", "**not equal** (more than 1e-09). Ours."]),
    ],
)
def test_nothing_is_called_equal_that_is_not(bound, theirs, said):
    comparison = rows_of(bound, np.array([1.0, 2.0]), np.array(theirs))
    assert cells(comparison, compare(comparison, Peers()))[3:5] == said
    assert cells(comparison, None)[3:5] == ["not run", "not known"]


def test_a_definition_of_a_clone_runs_without_the_imports_of_its_file(tmp_path):
    clone = tmp_path / "owner" / "name"
    clone.mkdir(parents=True)
    text = ["import missing", "def double(x):", "    return scale * x", "def other():", "    missing.call()"]
    (clone / "code.py").write_text("\n".join(text))
    peers = Peers(tmp_path)
    assert peers.definitions("owner/name", "code.py", ("double",), scale=2)["double"](21) == 42
    assert peers.commit("owner/name").startswith("owner/name, sha256 ")
    (clone / "COMMIT").write_text("0123456789abcdef\n")
    assert peers.commit("owner/name") == "owner/name@01234567"
    with pytest.raises(MissingPeerError, match="does not define half"):
        peers.definitions("owner/name", "code.py", ("half",))
    with pytest.raises(MissingPeerError, match=r"clone github\.com/owner/none"):
        peers.definitions("owner/none", "code.py", ("half",))
    with pytest.raises(MissingPeerError, match="pip install no-such"):
        peers.package("no_such_module", "no-such")
    assert "missing" not in sys.modules


SIDES = ("difference", "ours from float64", "GeomLoss's from float64")


def entry(*distances):
    return dict(zip(SIDES, distances, strict=False))


def test_rows_of_geomloss_options_name_the_largest_difference_of_each_kind():
    kinds = {"value": entry(1e-15), "gradient of points": entry(2e-13)}
    results = {"largest": {"sinkhorn, float64": {"combinations": 96, **kinds}}}
    assert geomloss_options(results)[2:] == [
        "| sinkhorn | float64 | 96 | gradient of points 2e-13, value 1e-15 | – | – | both, equal up to rounding |"
    ]
    kinds["value"]["difference"] = 1e-6
    assert "| **not equal** (more than 1e-11) |" in geomloss_options(results)[2]


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (1e-3, 2e-3, "ours is nearer to float64"),
        (2e-3, 1e-3, "GeomLoss is nearer to float64"),
        (1e-3, 1.05e-3, "both are about as far from float64"),
    ],
)
def test_float64_judges_where_the_two_differ(ours, theirs, said):
    results = {"largest": {"cost, float32": {"combinations": 2, "value": entry(2e-3, ours, theirs)}}}
    assert geomloss_options(results)[2].endswith(f"| **not equal** (more than 0.0001): {said} |")


def test_rows_of_examples_give_a_reason_for_what_is_not_equal():
    largest = {"energy": {"gradient": entry(0.5, 0.1, 0.4)}, "sinkhorn, p=2": {"value": entry(1e-6, 1e-7, 1e-6)}}
    ran = {"error": None, "calls": 90, "compared": 9, "largest": largest}
    stopped = {"error": "ValueError: 6 arguments\nmore", "calls": 0, "compared": 0, "largest": {}}
    first, second, third = examples({"programs": {"a/plot.py": ran, "b.py": stopped}})[2:]
    assert "`a/plot` | energy | 9 of 90 | gradient 0.50 | 0.10 | 0.40 | **not equal** (more than 0.001): ours" in first
    assert "nearly coincide" in first
    assert second.endswith("| value 1e-6 | 1e-7 | 1e-6 | both, equal up to rounding: ours is nearer to float64 |")
    assert "stops: ValueError: 6 arguments |" in third
    ran["largest"] = {"energy, multiscale": {"value": entry(9e-4, 1e-7, 9e-4)}}
    (truncated,) = examples({"programs": {"c.py": ran}})[2:]
    assert "**not equal** (more than 1e-05): ours is nearer to float64. GeomLoss truncates" in truncated


def test_rows_of_drop_in_pairs_show_difference_and_time():
    ratio = {"lower quartile": 1.182, "median": 1.2897, "upper quartile": 1.336}
    found = {"largest relative difference": 7.8e-16, "of the first loss in float32": 3e-8}
    pair = {"losses": [[1.0, 1.0]] * 5, **found, "ratio": ratio}
    assert drop_in({"pairs": {"lucidrains": pair}})[2:] == [
        "| `lucidrains` | 5 | 8e-16 | 3e-8 | both, equal up to rounding | 1.29× [1.18, 1.34] |"
    ]
    pair["largest relative difference"] = 1e-8
    assert "| **not equal** (more than 1e-10). |" in drop_in({"pairs": {"lucidrains": pair}})[2]


def test_the_code_of_an_example_is_known_without_comments_and_docstrings():
    text = '"""Title."""\nx = 1  # one\n\n\ndef f():\n    """Doc."""\n    return x\n'
    assert digest(text) == digest("x = 1\ndef f(): return x\n") != digest("x = 2\ndef f(): return x\n")


def test_what_is_not_finite_or_of_another_shape_is_infinitely_far():
    one, nan = torch.tensor([1.0]), torch.tensor([math.nan])
    for pair in ((nan, one), (one, nan), (one, one.expand(2))):
        assert distances({"value 0": pair[0], "value 1": one}, {"value 0": pair[1], "value 1": one}) == {
            "value": math.inf
        }


def test_a_changed_import_is_compared_with_geomloss_call_by_call(tmp_path):
    program = tmp_path / "plot.py"
    program.write_text(
        "import torch\nfrom geomloss import SamplesLoss\n"
        "x = torch.rand(5, 2).requires_grad_()\nloss = SamplesLoss('sinkhorn', blur=0.3)\n"
        "for _ in range(3):\n    loss(x, torch.rand(4, 2)).backward()\n"
        "loss(x, x, x, x, x, x)\n"
    )
    found = run(program, every=2, timeout=120)
    assert found["error"].startswith("ValueError: SamplesLoss: 6 arguments")
    assert (found["calls"], found["compared"]) == (3, 2)
    assert set(found["largest"]["sinkhorn, p=2"]) == {"value", "gradient"}
    for found_of_kind in found["largest"]["sinkhorn, p=2"].values():
        assert all(0 <= found_of_kind[side] < 1e-4 for side in SIDES)
