"""Our numbers beside recorded ones of published code, and the page that is made of the comparison."""

import json
import sys

import numpy as np
import pytest

from profiling.common.paths import RESULTS, ROOT
from profiling.comparable.__main__ import compare
from profiling.comparable.page import FILE, PAGE, drop_in, geomloss_options, line, with_tables
from profiling.comparable.peers import Comparison, MissingPeerError, Peers, difference
from profiling.comparable.rows import COMPARISONS

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


def test_the_page_is_made_of_the_results():
    page = (ROOT / PAGE).read_text()
    assert with_tables(page, RESULTS) == page, "run `python -m profiling.comparable --page` and commit the difference"


def rows_of(bound, ours, theirs):
    def peer(peers):
        return "Peer 1", lambda case: theirs

    return Comparison("a", "Peer", "sums", "Ours.", 2, bound, lambda case: ours, peer)


@pytest.mark.parametrize(
    ("bound", "theirs", "said"),
    [
        (1e-9, [1.0, 2.0], "| 0 | both, equal. Ours. |"),
        (1e-9, [1.0, 2.0 + 1e-10], "| 5e-11 | both, equal up to rounding. Ours. |"),
        (1e-9, [1.0, 4.0], "| 0.50 | **not equal** (more than 1e-09). Ours. |"),
        (None, [1.0, 4.0], "| 0.50 | Ours. |"),
        (1e-9, [1.0, float("nan")], "| inf | **not equal** (more than 1e-09). Ours. |"),
        (1e-9, [1.0], "| inf | **not equal** (more than 1e-09). Ours. |"),
    ],
)
def test_nothing_is_called_equal_that_is_not(bound, theirs, said):
    comparison = rows_of(bound, np.array([1.0, 2.0]), np.array(theirs))
    assert said in line(comparison, compare(comparison, Peers()))
    assert "not run" in line(comparison, None)


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


def test_rows_of_geomloss_options_name_the_largest_difference_of_each_kind():
    kinds = {"value": {"difference": 1e-15}, "gradient of points": {"difference": 2e-13}}
    results = {"geomloss": "0.3.1", "largest": {"sinkhorn, float64": {"combinations": 96, **kinds}}}
    assert geomloss_options(results) == [
        "| GeomLoss, all options of SamplesLoss, float64 (geomloss 0.3.1) | sinkhorn: value 1e-15, gradient of points "
        "2e-13 | 96 combinations | 2e-13 | both, equal up to rounding | `profiling.geomloss_options` |"
    ]
    kinds["value"]["difference"] = 1e-6
    assert "**not equal** (more than 1e-09)" in geomloss_options(results)[0]


def test_rows_of_drop_in_pairs_show_difference_and_time():
    ratio = {"lower quartile": 1.182, "median": 1.2897, "upper quartile": 1.336}
    pair = {"losses": [[1.0, 1.0]] * 5, "largest relative difference": 7.8e-08, "ratio": ratio}
    assert drop_in({"pairs": {"lucidrains": pair}}) == [
        "| `examples/dropin/lucidrains` | losses of training before and after the change of import; time of a step "
        "before / after: 1.29× [1.18, 1.34] | 5 steps | 8e-8 | both, equal up to rounding | `profiling.dropin` |"
    ]
