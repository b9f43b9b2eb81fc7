"""Trackers: TensorBoard's events, failures, missing packages, and runs of earlier versions."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from interpreter.configs import LoggingConfig, OptimConfig
from interpreter.console import console
from interpreter.engine.records import RunLog
from interpreter.engine.run import from_dict, read_config, require_same, to_dict
from interpreter.engine.trackers import TrackedStage, Trackers, flat, require_trackers, tensorboard
from interpreter.engine.trainer import Trainer
from interpreter.interrupts import StopRequest
from interpreter.methods import METHODS
from interpreter.train import main, parse_stage

from .small_tasks import CPU, Regression

OPTIM = OptimConfig(steps=10, batch_size=4, warmup_steps=3, precision="fp32")
PICTURE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def run_trainer(folder, task, **logging):
    logging = LoggingConfig(**{"log_every": 2, "sample_every": 5, "checkpoint_every": 3, **logging})
    return Trainer(task, OPTIM, logging, folder / "image", CPU, False, lambda: PICTURE).run(StopRequest())


def records(folder):
    return [json.loads(line) for line in (folder / "image" / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard" / "image"), size_guidance={"scalars": 0, "images": 0})
    return accumulator.Reload()


def assert_events_equal_records(folder):
    board, written = events(folder), records(folder)
    names = written[0].keys() - {"stage", "step"}
    assert set(board.Tags()["scalars"]) == names
    for name in names:
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert found == [(record["step"], np.float32(record[name])) for record in written], name


@pytest.fixture
def recorder(monkeypatch):
    """A tracker named tensorboard that records its calls and, from step `fails_at`, raises an error."""

    class Recorder:
        fails_at, last, calls = None, -1, []

        def __init__(self, stage):
            self.last_step = Recorder.last
            Recorder.stage, Recorder.calls = stage, []

        def scalars(self, step, values):
            if Recorder.fails_at is not None and step >= Recorder.fails_at:
                raise ConnectionError("the server is [gone]\nwith details")
            Recorder.calls.append((step, values))

        def picture(self, step, image):
            Recorder.calls.append((step, image))

        def close(self, failed):
            Recorder.calls.append(failed)

    monkeypatch.setattr(tensorboard, "TRACKER", Recorder)
    return Recorder


def test_tensorboard_holds_every_record_and_picture(tmp_path):
    run_trainer(tmp_path, Regression())
    assert_events_equal_records(tmp_path)
    images = events(tmp_path).Images("masks")
    assert [image.step for image in images] == [0, 5, 10]
    (tmp_path / "grid.png").write_bytes(images[1].encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), PICTURE)


def test_tensorboard_drops_steps_after_the_checkpoint(tmp_path):
    """The first process dies in step 10. It has recorded steps 7 and 8, but its last checkpoint is of step 6."""

    def die(step):
        if step == 8:
            raise MemoryError

    with pytest.raises(MemoryError):
        run_trainer(tmp_path, Regression(at_step=die), log_every=1, sample_every=7)
    assert [event.step for event in events(tmp_path).Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    run_trainer(tmp_path, Regression(), log_every=1, sample_every=7)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 11))
    assert_events_equal_records(tmp_path)
    assert [image.step for image in events(tmp_path).Images("masks")] == [0, 7, 10]


def test_a_tracker_that_is_added_later_gets_the_whole_history(tmp_path):
    run_trainer(tmp_path, Regression(steps=10), log_to=())
    assert not (tmp_path / "tensorboard").exists()
    run_trainer(tmp_path, Regression())
    assert_events_equal_records(tmp_path)
    assert [image.step for image in events(tmp_path).Images("masks")] == [0, 5, 10]


@pytest.mark.parametrize("killed", [False, True])
def test_a_tracker_that_was_left_out_gets_what_it_lacks(tmp_path, killed):
    """The tracker is on until step 4, off until 8, then on. A killed process loses events that it had not written."""

    def run(steps, log_to):
        optim, logging = replace(OPTIM, steps=steps), LoggingConfig(log_every=2, sample_every=5, log_to=log_to)
        Trainer(Regression(), optim, logging, tmp_path / "image", CPU, False, lambda: PICTURE).run(StopRequest())

    run(4, ("tensorboard",))
    if killed:
        TrackedStage(tmp_path / "image", 4).write_id("tensorboard", "-1")  # as at its start
        (written,) = (tmp_path / "tensorboard/image").iterdir()
        written.write_bytes(written.read_bytes()[:-100])
    run(8, ())
    run(10, ("tensorboard",))
    assert_events_equal_records(tmp_path)
    assert [image.step for image in events(tmp_path).Images("masks")] == [0, 4, 5, 8, 10]
    assert TrackedStage(tmp_path / "image", 10).read_id("tensorboard") == "10"


def test_replay_follows_the_steps_and_skips_what_a_tracker_holds(tmp_path, recorder):
    run_trainer(tmp_path, Regression(), log_to=())
    recorder.last = 4
    with RunLog(tmp_path / "image", 8, 10, 4, ["tensorboard"], {"optim.seed": 0}):
        pass
    assert recorder.stage == TrackedStage(tmp_path / "image", 8, {"optim.seed": 0})
    steps = [call[0] for call in recorder.calls[:-1]]
    assert steps == [5, 6, 8]
    assert np.array_equal(recorder.calls[0][1], PICTURE)
    known = {record["step"]: record for record in records(tmp_path)}
    for step, values in recorder.calls[1:3]:
        assert {"stage": "image", "step": step, **values} == known[step]


def test_a_damaged_picture_is_named_and_left_out(tmp_path, recorder):
    run_trainer(tmp_path, Regression(), log_to=())
    picture = tmp_path / "samples/image-000005.png"
    content = picture.read_bytes()
    for damaged in (b"", b"no picture", content[:40], content[:-20]):
        picture.write_bytes(damaged)
        with console.capture() as captured, RunLog(tmp_path / "image", 10, 10, 4, ["tensorboard"]):
            pass
        line = f"{picture} is damaged, and the trackers do not get it: "
        assert " ".join(captured.get().split()).count(line) == 1
        assert [call[0] for call in recorder.calls[:-1]] == [0, 2, 4, 6, 8, 10, 10]


def test_a_picture_that_is_drawn_again_reaches_a_tracker_that_holds_its_step(tmp_path, recorder):
    """The earlier process was stopped while it drew the picture of the step that training resumes from."""
    run_trainer(tmp_path, Regression(), log_to=())
    (tmp_path / "samples/image-000010.png").unlink()
    recorder.last = 10
    run_trainer(tmp_path, Regression())
    assert [call[0] for call in recorder.calls[:-1]] == [10]
    assert np.array_equal(recorder.calls[0][1], PICTURE)


def test_a_tracker_knows_whether_it_got_the_whole_history(tmp_path, recorder, monkeypatch):
    """W&B deletes the files of earlier processes only then."""
    whole = []
    monkeypatch.setattr(recorder, "whole", False, raising=False)
    monkeypatch.setattr(recorder, "close", lambda self, failed: whole.append(self.whole))
    run_trainer(tmp_path, Regression(), log_to=())
    with pytest.raises(ValueError, match="--log-to absent cannot be started"):
        RunLog(tmp_path / "image", 10, 10, 4, ["tensorboard", "absent"])

    def records_that_end(path):
        yield "", {"step": 2, "loss": 1.0}
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr("interpreter.engine.records._records", records_that_end)
        patch.setattr("interpreter.engine.records.truncate_records", lambda path, step: None)
        with pytest.raises(OSError, match="the disk is gone"):
            RunLog(tmp_path / "image", 10, 10, 4, ["tensorboard"])
    with RunLog(tmp_path / "image", 10, 10, 4, ["tensorboard"]):
        pass
    assert whole == [False, False, True]


def test_a_tracker_that_fails_is_named_once_and_training_goes_on(tmp_path, recorder):
    recorder.fails_at = 6
    with console.capture() as captured:
        run_trainer(tmp_path, Regression())
    text = " ".join(captured.get().split())
    line = "tensorboard failed and is left out from now on: the server is [gone]. Training continues, and metrics.jsonl"
    assert text.count(line) == 1
    assert [call[0] for call in recorder.calls] == [0, 2, 4, 5]  # nothing after the failure, and it is not closed
    assert [record["step"] for record in records(tmp_path)] == [2, 4, 6, 8, 10]


def test_trackers_are_told_whether_training_failed(tmp_path, recorder):
    run_trainer(tmp_path, Regression())
    assert recorder.calls[-1] is False

    def die(step):
        raise MemoryError

    with pytest.raises(MemoryError):
        run_trainer(tmp_path / "other", Regression(at_step=die))
    assert recorder.calls[-1] is True


def test_a_tracker_that_cannot_start_is_one_clear_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    with pytest.raises(
        ValueError, match=r"--log-to tensorboard cannot be started: .*Not a directory.* leave tensorboard out"
    ):
        run_trainer(tmp_path, Regression(at_step=lambda step: pytest.fail("a step ran")))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_an_absent_package_is_named_before_anything_is_written(name, tmp_path, image_options, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("interpreter.engine.trackers.find_spec", lambda n: None if n == name else found(n))
    message = rf"--log-to {name} needs the package {name}: pip install {name}, or leave {name} out of --log-to"
    with pytest.raises(ValueError, match=message):
        main(["--run", str(tmp_path / "run"), *image_options, "--log-to", "tensorboard", name])
    assert not (tmp_path / "run").exists()


def test_a_folder_named_like_a_package_is_no_package(tmp_path, monkeypatch):
    """W&B makes a folder ./wandb, which Python would import as an empty package."""
    (tmp_path / "interpreter_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="needs the package interpreter_tracker"):
        require_trackers(["interpreter_tracker"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], ("tensorboard",)), (["--log-to"], ()), (["--log-to", "wandb", "mlflow", "--seed", "1"], ("wandb", "mlflow"))],
)
def test_log_to_takes_any_number_of_names(arguments, expected):
    assert parse_stage(["--run", "runs/x", *arguments])[2].logging.log_to == expected


def test_runs_from_before_log_to_resume_and_it_may_change(image_run, image_options):
    run = image_run()
    content = json.loads((run / "config.json").read_text())
    del content["stages"]["image"]["logging"]["log_to"]
    (run / "config.json").write_text(json.dumps(content))
    stage = METHODS["interpreter"].stage("image")
    old = read_config(run).options("image", stage.config)
    assert old.logging.log_to == ("tensorboard",)
    _, _, new = parse_stage(["--run", str(run), *image_options, "--log-to"])
    require_same(from_dict(stage.config, to_dict(old)), new)
    main(["--run", str(run), *image_options, "--steps", "4", "--log-to"])
    assert read_config(run).stages["image"]["logging"]["log_to"] == []
    assert read_config(run).options("image", stage.config).logging.log_to == ()
    assert not (run / "tensorboard").exists()


def test_trackers_get_all_options_of_the_stage(image_run, image_options, recorder):
    main(["--run", str(image_run()), *image_options, "--steps", "4"])
    told = recorder.stage.options
    assert told["method"] == "interpreter"
    assert told["stage"] == recorder.stage.name == "image"
    assert told["code"]
    assert told["optim.steps"] == 4
    assert told["model.num_slots"] == 4
    assert told["data.frame_size"] == [64, 96]


def test_options_are_flat_and_ids_stay_in_the_stage(tmp_path):
    assert flat({"a": 1, "b": {"c": {"d": None}, "e": [1]}}) == {"a": 1, "b.c.d": None, "b.e": [1]}
    stage = TrackedStage(tmp_path / "image", 0)
    assert stage.read_id("wandb") is None
    stage.write_id("wandb", "abc")
    stage.write_id("mlflow", "def")
    assert TrackedStage(tmp_path / "image", 5).read_id("wandb") == "abc"
    (tmp_path / "image" / "trackers.json").write_text("[")
    with pytest.raises(ValueError, match=r"trackers\.json is damaged .*delete it"):
        stage.read_id("wandb")


def test_names_given_twice_are_one_tracker(tmp_path, recorder):
    trackers = Trackers(["tensorboard", "tensorboard"], TrackedStage(tmp_path / "image", 0))
    trackers.scalars(1, {"loss": 0.5})
    assert recorder.calls == [(1, {"loss": 0.5})]
