"""The measurement of long videos, on a short one."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from profiling import length
from profiling.common.random_run import save_random_vit


@pytest.fixture
def threads():
    """Restores the number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_frames_of_a_stored_video_are_their_numbers(tmp_path):
    stored = np.arange(5 * 6, dtype=np.float16).reshape(5, 3, 2)
    stored.tofile(tmp_path / "features")
    features = length.StoredFeatures(tmp_path / "features", (3, 2), (1, 3))
    frames = torch.from_numpy(np.stack(list(length.StoredVideo(70_000).frames())[65_533:65_540]))
    assert np.array_equal(features.features(frames).numpy(), stored[np.arange(65_533, 65_540) % 5])


def test_levels_are_measured_part_by_part(tmp_path, threads):
    save_random_vit(tmp_path / "vit")
    random = np.random.default_rng(0)
    random.standard_normal((7, 256, length.WIDTH), np.float32).astype(np.float16).tofile(tmp_path / "features.f16")
    length.make_run(tmp_path, "levels")
    row = json.loads(length.measure_here(str(tmp_path), "levels", 60, "auto"))
    parts, memory = row["seconds"], row["memory"]
    assert {name for name in parts if "encoder" in name} == {f"of grouping: level {k}, encoder" for k in (2, 3)}
    assert sum(seconds for name, seconds in parts.items() if name.startswith("of ")) <= parts["grouping"] + 0.01
    assert row["total"] == pytest.approx(
        sum(parts[name] for name in ("image slots", "means and keeping", "grouping", "labels of patches")), abs=0.01
    )
    assert memory["attention_bytes"] == 60 * 256 * 32 * 2
    assert memory["baseline_bytes"] < memory["peak_bytes"]
    assert not re.search(str(tmp_path), json.dumps(row))


def test_exponent_is_that_of_the_times():
    rows = [
        {"way": "levels", "attention": kept, "frames": n, "total": 0.01 * n**1.5, "ms_a_frame": 10 * n**0.5}
        for kept in ("auto", "file")
        for n in (100, 400, 900)
    ]
    (fit,) = length.fits(rows).values()
    assert fit == {"exponent": 1.5, "ms_a_frame_relative": {"100": 1.0, "400": 2.0, "900": 3.0}}


def test_row_that_is_measured_again_replaces_the_older_one(tmp_path, threads, capsys):
    out = tmp_path / "length.json"
    for limit in (1.0, 2.0):
        length.save_row(out, {"way": "masks", "frames": 9, "attention": "auto", "given_up_after_seconds": limit})
    written = json.loads(out.read_text())
    assert [row["given_up_after_seconds"] for row in written["rows"]] == [2.0]
    assert written["command"] == "python -m profiling.length DIR"
    assert str(Path.home()) not in json.dumps(written)
