"""What the tab Training shows of a run, before and during training."""

import io
import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from interpreter.app.training import TrainingRun
from interpreter.engine.records import read_records
from interpreter.engine.run import read_config, write_config
from interpreter.locks import Lock

PAST_PROCESS = 2**22 + 1  # above the largest number of a process in Linux


@pytest.fixture
def run(tiny_run, tmp_path):
    """A run that may be changed, with three steps recorded of each stage."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def client(serve, run):
    return serve(runs=[run]).client


def append(run, stage, text):
    with (run / stage / "metrics.jsonl").open("a") as file:
        file.write(text)


def shown(client, id="run-0"):
    answer = client.get(f"/api/runs/{id}/training")
    assert answer.status == 200, answer
    return answer.json


def test_runs_are_listed(client, run):
    assert client.get("/api/runs").json == [{"id": "run-0", "label": str(run), "training": False}]


def test_stages_show_their_last_record(client, run):
    old = time.time() - 100
    os.utime(run / "image" / "metrics.jsonl", (old, old))
    image, video = shown(client)["stages"]
    last = {record["stage"]: record for record in read_records(run)}
    assert (image["step"], image["loss"]) == (3, last["image"]["loss"])
    assert (video["step"], video["loss"]) == (3, last["video"]["loss"])
    assert 100 <= image["seconds_ago"] <= 130
    append(run, "video", json.dumps({"stage": "video", "step": 7, "loss": 0.25}) + "\n")
    assert [s["step"] for s in shown(client)["stages"]] == [3, 7]
    assert shown(client)["stages"][1]["loss"] == 0.25
    assert shown(client)["stages"][1]["seconds_ago"] < 30


def test_half_written_record_is_not_read(client, run):
    before = shown(client)
    line = json.dumps({"stage": "video", "step": 4, "loss": 0.5})
    for length in range(1, len(line)):
        path = run / "video" / "metrics.jsonl"
        whole = path.read_text()
        append(run, "video", line[:length])
        after = shown(client)
        assert [(s["step"], s["loss"]) for s in after["stages"]] == [(s["step"], s["loss"]) for s in before["stages"]]
        path.write_text(whole)
    append(run, "video", line[:5])
    assert client.get(shown(client)["curves"]).status == 200
    path.write_text(whole)
    append(run, "video", line + "\n")
    assert shown(client)["stages"][1]["step"] == 4


def test_stage_that_has_just_begun_is_at_step_0(client, run):
    shutil.rmtree(run / "video")
    stage = {"name": "video", "step": 0, "steps": 3, "loss": None, "seconds_ago": None}
    assert shown(client)["stages"][1] == stage
    (run / "video").mkdir()
    append(run, "video", "")
    assert shown(client)["stages"][1] == stage


def test_loss_that_is_no_number_is_left_out(client, run):
    append(run, "video", '{"stage": "video", "step": 4, "loss": NaN}\n')
    assert (shown(client)["stages"][1]["step"], shown(client)["stages"][1]["loss"]) == (4, None)


def test_run_is_in_training_while_its_lock_is_taken(client, run):
    lock = Lock(run / ".lock")
    assert lock.take()
    for _ in range(2):  # reading does not remove it
        assert shown(client)["training"] is True
        assert client.get("/api/runs").json[0]["training"] is True
    lock.release()
    assert shown(client)["training"] is False
    assert not (run / ".lock").exists()
    about = json.loads(_described(run))
    (run / ".lock").write_text(json.dumps(about | {"process": PAST_PROCESS}))  # its process was killed
    assert shown(client)["training"] is False
    for text in ("", "{", "[]", "3"):
        (run / ".lock").write_text(text)
        assert shown(client)["training"] is False


def _described(run):
    lock = Lock(run / ".lock")
    lock.take()
    try:
        return (run / ".lock").read_text()
    finally:
        lock.release()


def test_run_without_a_directory_shows_once_it_is_there(serve, tiny_run, tmp_path):
    run = tmp_path / "later"
    client = serve(runs=[run]).client
    assert client.get("/api/runs").json == [{"id": "run-0", "label": str(run), "training": False}]
    assert shown(client) == {"training": False, "stages": [], "pictures": [], "curves": None}
    assert client.get("/api/runs/run-0/curves.png").error == "nothing is recorded yet"
    assert [source["id"] for source in client.open_tab().about["sources"]] == ["cluster"]
    run.mkdir()
    write_config(run, read_config(tiny_run))  # training has started, but has recorded nothing
    assert [(s["name"], s["step"]) for s in shown(client)["stages"]] == [("image", 0), ("video", 0)]
    assert [source["id"] for source in client.open_tab().about["sources"]] == ["cluster"]
    shutil.copytree(tiny_run, run, dirs_exist_ok=True)
    assert [s["step"] for s in shown(client)["stages"]] == [3, 3]
    assert [source["id"] for source in client.open_tab().about["sources"]] == ["run-0", "cluster"]


def test_damaged_run_is_one_line(client, run):
    (run / "config.json").write_text("{")
    assert "is not the configuration of a run" in client.get("/api/runs/run-0/training").error


def test_curves_are_drawn_anew_when_something_is_recorded(client, run):
    first = shown(client)["curves"]
    drawn = client.get(first)
    assert drawn.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(drawn.content)).size[0] > 200
    assert shown(client)["curves"] == first
    assert client.get(first).content == drawn.content
    append(run, "video", json.dumps({"stage": "video", "step": 4, "loss": 9.0}) + "\n")
    second = shown(client)["curves"]
    assert second != first
    assert client.get(second).content != drawn.content
    assert client.get("/api/runs/run-1/curves.png").status == 404


def test_pictures_are_listed_in_the_order_of_their_writing(client, run):
    shutil.rmtree(run / "samples")
    assert shown(client)["pictures"] == []
    (run / "samples").mkdir()
    for age, name in enumerate(["image-000050.png", "image-000100.png", "video-3-000020.png"]):
        Image.fromarray(np.full((8, 8, 3), age, np.uint8)).save(run / "samples" / name)
        os.utime(run / "samples" / name, (1000 - age, 1000 - age))
    for name in ("image-1.jpg", ".image-000001.png", "image-000001.png.part", "notes.png"):
        (run / "samples" / name).touch()
    pictures = shown(client)["pictures"]
    assert [(p["stage"], p["step"]) for p in pictures] == [("video-3", 20), ("image", 100), ("image", 50)]
    assert len({p["url"] for p in pictures}) == 3
    for picture, age in zip(pictures, (2, 1, 0), strict=True):
        answer = client.get(picture["url"])
        assert answer.headers["content-type"] == "image/png"
        assert (np.asarray(Image.open(io.BytesIO(answer.content))) == age).all()


def test_files_that_are_no_pictures_are_not_given(run, tmp_path):
    shown = TrainingRun("run-0", run, tmp_path)
    (run / "samples" / "image-000077.png").symlink_to(run / "config.json")
    assert 77 not in [picture["step"] for picture in shown.show()["pictures"]]
    for name in ("image-000077.png", "../config.json", "../curves.png", "", ".", "image-999999.png"):
        with pytest.raises(FileNotFoundError):
            shown.picture(name)
