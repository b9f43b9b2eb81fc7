"""Invalid requests are answered with one line, and change nothing."""

import json

import pytest

from interpreter.app import corrections
from interpreter.app.sources import Sources

DEEP = "[" * 100_000
HUGE = "1" + "0" * 400


@pytest.fixture
def prepared(tab, clip):
    """A tab with a clip and four segments."""
    tab.upload(clip)
    tab.segment("cluster", num_segments=4)
    return tab


def refuse(tab, action, body, says=""):
    """Send a body that is refused; the state stays as it is."""
    before = tab.state()
    assert before["job"] is None
    body = body if isinstance(body, (bytes, str)) else json.dumps(body)
    content = body if isinstance(body, bytes) else body.encode()
    answer = tab.client.send("POST", f"/api/s/{tab.token}/{action}", content)
    assert 400 <= answer.status < 500, (body[:200], answer)
    assert says in answer.error, body[:200]
    assert tab.state() == before


@pytest.mark.parametrize("action", ["segment", "compare", "edit", "download"])
def test_body_that_is_no_object_is_refused(prepared, action):
    for body in ("", "{", "null", "[]", "3", '"x"', "{'a': 1}", b"\xff\xfe\x00", b"\0", DEEP, '{"a":' + DEEP):
        refuse(prepared, action, body)
    refuse(prepared, action, json.dumps({"kind": "x" * (1 << 20)}), "too large")


def test_segmenting_with_a_wrong_source_is_refused(prepared):
    for source in (None, 3, [], {}, "", "run-1", "run-00", "interpreter", "../run-0", "/etc"):
        refuse(prepared, "segment", {"source": source, "settings": {}})
        refuse(prepared, "compare", {"left": "cluster", "right": source})
        refuse(prepared, "compare", {"left": source, "right": "cluster"})
    refuse(prepared, "segment", {"source": "cluster"}, "settings")
    refuse(prepared, "compare", {"left": "cluster"}, "right")
    refuse(prepared, "compare", {})


ODD = ["NaN", "Infinity", "-1", HUGE, "1e400", '"3"', '""', "true", "false", "[]", "[1]", "{}", '{"a": 1}', "99"]


@pytest.mark.parametrize(
    ("source", "name", "others"),
    [
        ("cluster", "num_segments", ""),
        ("run-0", "num_slots", ""),
        ("run-0", "level", ""),
        ("run-0", "association", ""),
        ("run-0", "merge_threshold", '"association": "learned", '),
    ],
)
def test_value_of_no_slider_is_refused(prepared, source, name, others):
    for value in ODD:
        refuse(prepared, "segment", f'{{"source": "{source}", "settings": {{{others}"{name}": {value}}}}}', "not among")
    if name in ("num_segments", "num_slots"):
        refuse(prepared, "segment", {"source": source, "settings": {name: 0}}, "not among")
    refuse(prepared, "segment", {"source": source, "settings": {"backbone": "x"}}, "no setting is called 'backbone'")
    refuse(prepared, "segment", {"source": source, "settings": []}, "settings")


def test_setting_without_a_slider_is_left_out(prepared):
    for settings in ({"levels": [1]}, {"levels": 10**9}, {"levels": 10**400}, {"level": "x", "num_slots": {}}):
        assert prepared.segment("cluster", **settings)["settings"] == {"num_segments": None}
    refuse(prepared, "segment", {"source": "run-0", "settings": {"level": 10**9, "levels": 10**9}}, "not among")


def test_correcting_what_does_not_exist_is_refused(prepared):
    for kind in ("merge", "split", "hide", "show", "name"):
        for id in (0, 5, -1, 255, 10**30):
            segments = [1, id] if kind == "merge" else [id]
            refuse(prepared, "edit", {"kind": kind, "segments": segments, "name": "x"}, f"no segment {id}")
        for segments in (None, 1, "1", {}, [[1]], ["1"], [1.0], [True], [None]):
            refuse(prepared, "edit", {"kind": kind, "segments": segments}, "segments")
    for kind in (None, 1, "", "delete", "__init__"):
        refuse(prepared, "edit", {"kind": kind, "segments": [1]})
    for kind in ("merge", "split", "name"):
        refuse(prepared, "edit", {"kind": kind, "segments": []}, "select")
        refuse(prepared, "edit", {"kind": kind}, "select")
    refuse(prepared, "edit", {"kind": "merge", "segments": [2, 2]}, "select two")
    refuse(prepared, "edit", {"kind": "split", "segments": [1, 2]}, "select one")
    refuse(prepared, "edit", {"kind": "name", "segments": [1], "name": 3}, "name")
    refuse(prepared, "edit", {"kind": "undo"}, "nothing to undo")
    refuse(prepared, "edit", {"kind": "redo"}, "nothing to redo")


def test_download_of_an_unknown_kind_is_refused(prepared):
    for format in (None, 3, "", "exe", "../png", "PNG"):
        refuse(prepared, "download", {"format": format})
    for opacity in ("NaN", "Infinity", "-0.1", "1.1", HUGE, '"1"', "true", "[]", "null"):
        refuse(prepared, "download", f'{{"format": "overlay", "opacity": {opacity}}}', "opacity")


def test_frames_and_panes_that_do_not_exist_are_not_found(prepared):
    for number in ("5", "99999999999999999999", "9" * 5000, "-1", "x", "1.5", "", "%C2%B2", "%D9%A1"):
        for place in ("frames", "labels/main"):
            assert prepared.get(f"{place}/{number}").status == 404, number[:50]
    for pane in ("left", "right", "other", "__class__"):
        assert prepared.get(f"labels/{pane}/0").status == 404
    for format in ("png", "rle", "cutout", "overlay", "other"):
        assert prepared.get(f"download/{format}").status == 404


def test_request_before_there_is_a_clip_says_so(tab):
    no_clip, no_segments = "choose a video first", "segment the clip first"
    refuse(tab, "segment", {"source": "cluster", "settings": {}}, no_clip)
    refuse(tab, "compare", {"left": "cluster", "right": "cluster"}, no_clip)
    refuse(tab, "download", {"format": "png"}, no_clip)
    for kind in ("merge", "split", "hide", "show", "name", "undo", "redo"):
        refuse(tab, "edit", {"kind": kind, "segments": [1]}, no_segments)
    assert no_clip in tab.get("frames/0").error
    assert no_clip in tab.get("labels/main/0").error


def test_request_before_there_are_segments_says_so(tab, clip):
    tab.upload(clip)
    refuse(tab, "download", {"format": "png"}, "segment the clip first")
    refuse(tab, "edit", {"kind": "merge", "segments": [1, 2]}, "segment the clip first")
    assert "segment the clip first" in tab.get("labels/main/0").error


def test_error_inside_the_program_is_one_line(prepared, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("something broke")

    monkeypatch.setattr(corrections, "merge", fail)
    before = prepared.state()
    answer = prepared.post("edit", kind="merge", segments=[1, 2])
    assert answer.status == 500
    assert answer.error.startswith("an error inside the program, RuntimeError: something broke")
    assert "Traceback (most recent call last)" in capfd.readouterr().err
    assert prepared.state() == before
    monkeypatch.setattr(corrections, "uncorrected", fail)  # in the worker thread
    prepared.post("segment", source="cluster", settings={})
    state = prepared.finish()
    assert state["error"]["text"].startswith("an error inside the program, RuntimeError: something broke")
    assert state["panes"] == before["panes"]
    assert "in fail" in capfd.readouterr().err
    monkeypatch.undo()
    assert prepared.edit("merge", 1, 2)["undo"]


def test_expected_error_names_no_folder_of_the_server(server, tab, clip, monkeypatch, capfd):
    tab.upload(clip)
    (path,) = (server.folder / name for name in server.files())

    def fail(*_):
        raise OSError(f"{path}: cannot be read")

    monkeypatch.setattr(Sources, "open", fail)
    tab.post("segment", source="cluster", settings={})
    assert tab.finish()["error"]["text"] == "walk.mp4: cannot be read"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("body", ['{"kind": "name", "segments": [1], "name": "\\ud83d"}', '{"\\ud83d": 1}'])
def test_half_a_character_is_refused(prepared, body):
    path = f"/api/s/{prepared.token}/edit"
    assert "not Unicode" in prepared.client.send("POST", path, body.encode()).error


def test_split_in_a_frame_of_no_clip_is_refused(prepared):
    ids = [segment["id"] for segment in prepared.state()["panes"]["main"]["segments"]]
    for frame in (-1, 10**30):
        answer = prepared.post("edit", kind="split", segments=ids[:1], frame=frame)
        assert answer.status == 422
        assert answer.error == f"frame: {frame} is not a frame of the clip"
