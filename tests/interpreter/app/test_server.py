"""From a dropped video to corrected segments, through the requests that the page makes."""

import io

import numpy as np
import pytest
from PIL import Image

from interpreter import segment_video
from interpreter.app.work import Task
from interpreter.configs import BackboneConfig
from interpreter.data import open_video

from ..clips import make_clip

SMALL = BackboneConfig("efficientnet-lite0")


def labels_of(tab, pane, frames, view, version=0):
    answers = [tab.get(f"labels/{pane}/{t}?version={version}") for t in range(frames)]
    assert {a.status for a in answers} == {200}
    return np.stack([np.frombuffer(a.content, np.uint8).reshape(view) for a in answers])


@pytest.fixture
def steps(monkeypatch):
    """Names of the steps that tasks start."""
    seen, begin = [], Task.begin

    def noted(self, step, total=0):
        seen.append(step)
        begin(self, step, total)

    monkeypatch.setattr(Task, "begin", noted)
    return seen


def test_open_lists_sources_and_limits(server, tiny_run):
    about = server.client.open_tab().about
    assert [(s["id"], s["label"], s["method"]) for s in about["sources"]] == [
        ("run-0", str(tiny_run), "interpreter"),
        ("cluster", "cluster (no training)", "cluster"),
    ]
    assert about["limits"] == {"megabytes": 10, "frames": 100}
    assert server.client.get(f"/api/s/{about['token']}").json == about
    assert server.client.open_tab().token != about["token"]


def test_upload_is_described_and_its_frames_are_shown(tab, clip):
    described = tab.upload(clip).json["clip"]
    video = open_video(clip)
    assert described == tab.state()["clip"]
    assert {key: described[key] for key in ("name", "frames", "width", "height", "aspect", "view")} == {
        "name": "walk.mp4", "frames": 5, "width": 64, "height": 48, "aspect": 1.0, "view": [48, 64],
    }  # fmt: skip
    assert described["fps"] == pytest.approx(30000 / 1001)
    for t in (3, 0, 4, 1):
        answer = tab.get(f"frames/{t}?clip={described['id']}")
        assert answer.headers["content-type"] == "image/jpeg"
        shown = np.asarray(Image.open(io.BytesIO(answer.content)))
        expected = video.read([t])[0]
        assert np.abs(shown.astype(int) - expected).mean() < 4  # JPEG; the next frame differs by 10
        others = [np.abs(shown.astype(int) - video.read([o])[0]).mean() for o in range(5) if o != t]
        assert min(others) > np.abs(shown.astype(int) - expected).mean()


def test_large_video_is_shown_in_a_view_of_960_pixels(tab, tmp_path):
    clip = make_clip(tmp_path / "large.mp4", frames=2, size=(720, 1280))
    view = tab.upload(clip).json["clip"]["view"]
    assert view == [540, 960]
    assert Image.open(io.BytesIO(tab.get("frames/1").content)).size == (960, 540)
    pane = tab.segment("run-0")
    labels = labels_of(tab, "main", 2, view)
    assert set(np.unique(labels).tolist()) <= {s["id"] for s in pane["segments"]}


@pytest.mark.parametrize("source", ["run-0", "cluster"])
def test_labels_are_those_of_the_command_segment(tab, clip, tiny_run, source):
    how = {"run": tiny_run} if source == "run-0" else {"method": "cluster", "backbone": SMALL}
    expected = np.stack(list(segment_video(clip, **how).labels())) + 1
    tab.upload(clip)
    pane = tab.segment(source)
    np.testing.assert_array_equal(labels_of(tab, "main", 5, (48, 64), pane["version"]), expected)
    assert pane["source"] == source
    assert [s["id"] for s in pane["segments"]] == list(range(1, len(pane["segments"]) + 1))
    assert set(np.unique(expected).tolist()) <= {s["id"] for s in pane["segments"]}
    assert sum(s["area"] for s in pane["segments"]) == pytest.approx(1)
    assert len({s["colour"] for s in pane["segments"]}) == len(pane["segments"])
    assert not any(s["hidden"] or s["name"] for s in pane["segments"])
    assert (pane["undo"], pane["redo"], pane["note"]) == (False, False, None)


def test_corrections_change_labels_and_can_be_undone(tab, clip):
    tab.upload(clip)
    first = tab.segment("cluster", num_segments=4)
    before = labels_of(tab, "main", 5, (48, 64))
    merged = tab.edit("merge", 3, 1)
    assert [s["id"] for s in merged["segments"]] == [1, 2, 4]
    assert merged["version"] != first["version"]
    after = labels_of(tab, "main", 5, (48, 64))
    assert set(np.unique(after).tolist()) <= {1, 2, 4}
    inside = np.isin(before, (1, 3))
    assert (after[inside] == 1).mean() > 0.95  # the sum of two masks may win where neither did
    assert (after == 1).sum() >= inside.sum()

    split = tab.edit("split", 1)
    assert [s["id"] for s in split["segments"]] == [1, 2, 4, 5]
    halves = labels_of(tab, "main", 5, (48, 64))
    assert {1, 5} <= set(np.unique(halves[after == 1]).tolist())
    assert (halves[after == 2] == 2).all()

    hidden = tab.edit("hide", 2, 4)
    assert [s["hidden"] for s in hidden["segments"]] == [False, True, True, False]
    np.testing.assert_array_equal(labels_of(tab, "main", 5, (48, 64)), halves)
    assert [s["hidden"] for s in tab.edit("show", 4)["segments"]] == [False, True, False, False]
    named = tab.edit("name", 5, name="  red \n disc ")
    assert [s["name"] for s in named["segments"]] == ["", "", "", "red disc"]
    assert (named["undo"], named["redo"]) == (True, False)

    for _ in range(5):
        undone = tab.edit("undo")
    assert undone["segments"] == first["segments"]
    assert (undone["undo"], undone["redo"]) == (False, True)
    np.testing.assert_array_equal(labels_of(tab, "main", 5, (48, 64)), before)
    assert tab.post("edit", kind="undo").error == "there is nothing to undo"
    for _ in range(5):
        redone = tab.edit("redo")
    assert redone["segments"] == named["segments"]
    np.testing.assert_array_equal(labels_of(tab, "main", 5, (48, 64)), halves)
    versions = [p["version"] for p in (first, merged, split, hidden, named, undone, redone)]
    assert len(set(versions)) == len(versions)
    tab.edit("undo")
    assert not tab.edit("show", 1)["redo"]


def test_setting_segments_again_without_encoding(tab, clip, tiny_run, steps):
    tab.upload(clip)
    assert len(tab.segment("run-0")["segments"]) != 3
    assert "encoding frames" in steps
    del steps[:]
    pane = tab.segment("run-0", num_slots=3)
    assert "encoding frames" not in steps
    assert "grouping into segments" in steps
    assert len(pane["segments"]) == 3
    assert pane["settings"]["num_slots"] == 3
    expected = np.stack(list(segment_video(clip, tiny_run, num_slots=3).labels())) + 1
    np.testing.assert_array_equal(labels_of(tab, "main", 5, (48, 64)), expected)


def test_slow_setting_encodes_anew(tab, clip, tiny_run, steps):
    tab.upload(clip)
    slow = {c["name"] for c in tab.segment("run-0")["controls"] if c["slow"]}
    assert slow == {"association"}
    del steps[:]
    tab.segment("run-0", association="learned")
    assert "encoding frames" in steps
    expected = np.stack(list(segment_video(clip, tiny_run, association="learned").labels())) + 1
    np.testing.assert_array_equal(labels_of(tab, "main", 5, (48, 64)), expected)
    del steps[:]
    tab.segment("run-0")  # two encodings are kept
    assert "encoding frames" not in steps


def test_frames_segmented_by_themselves_have_a_note(tab, clip):
    tab.upload(clip)
    assert "segmented separately" in tab.segment("run-0", level=1)["note"]


def test_comparison_of_a_source_with_itself_agrees(tab, clip, steps):
    tab.upload(clip)
    assert tab.post("compare", left="cluster", right="cluster").status == 202
    state = tab.finish()
    assert state["agreement"] == 1.0
    assert steps.count("encoding frames") == 1
    left, right = state["panes"]["left"], state["panes"]["right"]
    assert left["segments"] == right["segments"]
    assert state["panes"]["main"] is None
    np.testing.assert_array_equal(*(labels_of(tab, side, 5, (48, 64)) for side in ("left", "right")))


def test_comparison_of_two_sources_shows_both(tab, clip, tiny_run):
    tab.upload(clip)
    assert tab.post("compare", left="cluster", right="run-0").status == 202
    state = tab.finish()
    assert [state["panes"][side]["source"] for side in ("left", "right")] == ["cluster", "run-0"]
    assert -1 < state["agreement"] < 1
    expected = np.stack(list(segment_video(clip, tiny_run).labels()))
    shown = labels_of(tab, "right", 5, (48, 64))
    ids = [shown[expected == label] for label in np.unique(expected)]  # only the numbers differ
    assert all((part == part[0]).all() for part in ids)
    assert len({part[0] for part in ids}) == len(ids)


def test_another_clip_takes_the_place_of_the_first(server, tab, clip, tmp_path):
    first = tab.upload(clip).json["clip"]
    tab.segment("run-0")
    second = tab.upload(make_clip(tmp_path / "other.mp4", frames=3)).json["clip"]
    assert second["id"] != first["id"]
    assert [name.rpartition("/")[2] for name in server.files()] == ["other.mp4"]
    assert tab.state()["panes"] == {"main": None, "left": None, "right": None}
    assert tab.get("labels/main/0").status == 404
    assert server.client.send("DELETE", f"/api/s/{tab.token}/clip").status == 200
    assert server.files() == []
    assert tab.state()["clip"] is None


def test_states_come_without_being_asked_for(tab, clip):
    with tab.watched({"Accept-Encoding": "gzip"}) as states:
        assert states.response.getheader("Content-Type").startswith("text/event-stream")
        assert states.response.getheader("Content-Encoding") is None  # compression would delay states
        assert states.next()["clip"] is None
        tab.upload(clip)
        assert states.next()["clip"]["name"] == "walk.mp4"
        tab.post("segment", source="run-0", settings={})
        while states.next()["panes"]["main"] is None:
            pass
    jobs = [state["job"] for state in states.seen if state["job"]]
    assert all(job["kind"] == "segment" and job["title"] == "segments of walk.mp4" for job in jobs)
