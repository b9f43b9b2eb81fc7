"""Scores of several evaluations are joined only if they follow one version of the protocol."""

import pytest

from profiling.quality import joined


def evaluation(value, **version):
    row = {"protocol": "interpreter", "split": "val", "commit": "abc", "method": "masks", "mean": {"miou_video": value}}
    return {"results": [{**row, **version, "per_seed": [{"miou_video": value}]}]}


def test_seeds_of_one_version_are_joined():
    (row,) = joined([evaluation(0.25, version=2), evaluation(0.5, version=2)])
    assert (row["protocol"], row["version"], row["values"]) == ("interpreter", 2, {"miou_video": [0.25, 0.5]})


def test_scores_of_different_protocol_versions_do_not_join():
    with pytest.raises(SystemExit, match=r"versions \[1, 2\] of protocol interpreter"):
        joined([evaluation(0.25), evaluation(0.5, version=2)])
