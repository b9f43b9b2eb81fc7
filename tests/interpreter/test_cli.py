"""The command line of training: options, presets, help, and errors in one line."""

import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from interpreter.commands import cli, run_command
from interpreter.methods.interpreter.config import IMAGE_PRESETS, VIDEO_PRESETS, ImageTraining, VideoTraining
from interpreter.train import main, parse_stage

PRESETS = ("demo", "davis", "clips", "ytvis19", "movi-e")


def plain(text):
    """Without colours, frames and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", ["image", "video"])
def test_help_shows_the_defaults_of_the_preset(stage, preset, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--stage", stage, "--preset", preset, "--help"])
    assert exit_.value.code == 0
    text = plain(capsys.readouterr().out)
    defaults = (IMAGE_PRESETS if stage == "image" else VIDEO_PRESETS)[preset]
    for option, value in {
        "run": defaults.run,
        "num-slots": defaults.model.num_slots,
        "dim": defaults.model.dim,
        "steps": defaults.optim.steps,
        "batch-size": defaults.optim.batch_size,
        "peak-lr": defaults.optim.peak_lr,
        "checkpoint-every": defaults.logging.checkpoint_every,
    }.items():
        entry = re.search(rf"--{option} .*?\(default: (.*?)\)", text)
        assert entry is not None, option
        assert entry[1] == str(value), option
    assert f"(here: {stage})" in text
    assert f"(here: {preset})" in text
    assert all(name in text for name in PRESETS)


def test_training_does_not_load_tensorflow_where_it_is_installed(tmp_path):
    """The LLVM libraries of TensorFlow and Triton abort in one process, and TensorBoard would import TensorFlow."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    code = "import interpreter.train, interpreter.engine.trackers.tensorboard; from tensorboard.compat import tf; tf.io"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_every_option_is_explained(capsys):
    for stage in ("image", "video"):
        with pytest.raises(SystemExit):
            main(["--stage", stage, "--help"])
        text = plain(capsys.readouterr().out)
        assert text.count("(default: ") > 20
        assert re.findall(r"--[\w-]+(?: [A-Z{|]\S*)* \(default: ", text) == []  # a default without a word before it


def test_help_joins_the_lines_of_a_sentence_only(capsys):
    """A value that is explained on a line of its own keeps its line."""

    @dataclass(frozen=True)
    class Options:
        mode: str = "fast"
        """How much
        is computed.
        fast: one
        pass."""

    with pytest.raises(SystemExit):
        cli(Options, ["--help"])
    lines = [plain(line) for line in capsys.readouterr().out.splitlines() if "computed" in line or "pass" in line]
    assert lines == ["--mode STR How much is computed.", "fast: one pass. (default: fast)"]


def test_paper_numbers_of_the_image_stage():
    for preset, size, warm_up in [("ytvis19", (336, 504), 5), ("movi-e", (336, 336), 3)]:
        config = IMAGE_PRESETS[preset]
        model, optim = config.model, config.optim
        assert (model.num_slots, model.dim, model.iterations, model.decoder_layers) == (32, 768, 3, 4)
        assert (model.implicit, model.inference_iterations, model.input_positions) == ("bilevel", 3, False)
        assert config.backbone.backbone == "facebook/dinov2-base"
        assert config.data.frame_size == size
        assert (optim.batch_size, optim.weight_decay, optim.flip) == (128, 0.005, True)
        assert (optim.start_lr, optim.peak_lr, optim.final_lr) == (1e-4, 4e-4, 2e-6)
        assert optim.steps == 110_000
        epochs = {"ytvis19": 180, "movi-e": 60}[preset]
        assert optim.warmup_steps == pytest.approx(warm_up * optim.steps / epochs, rel=0.01)


def test_paper_numbers_of_the_video_stage():
    for preset, slots, frames, steps, epochs in [("ytvis19", 8, 36, 21_000, 800), ("movi-e", 20, 24, 47_000, 600)]:
        config = VIDEO_PRESETS[preset]
        model, optim = config.model, config.optim
        assert (model.num_slots, model.dim, model.encoder_layers, model.decoder_layers) == (slots, 768, 4, 4)
        assert (model.merge_threshold, model.blur, model.scaling, model.diameter) == (0.15, 0.05, 0.5, None)
        assert (model.iterations, model.inference_iterations, model.time_scale) == (3, 3, 1.0)
        assert model.time_scale == 1
        assert config.num_frames == frames
        assert (optim.batch_size, optim.weight_decay, optim.flip) == (96, 0.005, True)
        assert (optim.start_lr, optim.peak_lr, optim.final_lr) == (1e-5, 2e-4, 2e-6)
        assert optim.steps == steps
        assert optim.warmup_steps == pytest.approx(50 * steps / epochs, rel=0.01)


@pytest.mark.parametrize("preset", PRESETS)
def test_both_stages_of_a_preset_share_a_run(preset):
    image, video = IMAGE_PRESETS[preset], VIDEO_PRESETS[preset]
    assert isinstance(image, ImageTraining)
    assert isinstance(video, VideoTraining)
    assert image.run == video.run


def test_options_reach_the_configuration():
    line = "--run r --frame-size 64 96 --no-flip --feature-layer -2 --data folder --split None --clip-norm 1"
    _, _, config = parse_stage(line.split())
    assert isinstance(config, ImageTraining)
    assert config.run == Path("r")
    assert config.data.frame_size == (64, 96)
    assert config.data.data == "folder"
    assert config.data.split is None
    assert config.optim.flip is False
    assert config.optim.clip_norm == 1.0
    assert config.backbone.feature_layer == -2
    _, _, config = parse_stage(["--num-frames", "7", "--stage=video", "--preset=movi-e"])
    assert isinstance(config, VideoTraining)
    assert (config.num_frames, config.model.num_slots) == (7, 20)


@pytest.mark.parametrize("arguments", [["--samples", "7"], ["--samples=7"], ["--draws", "7"]])
def test_old_name_of_draws_works_with_a_warning(arguments, recwarn):
    _, _, config = parse_stage(["--stage", "video", *arguments])
    assert config.draws == 7
    warnings = [(warning.category, str(warning.message)) for warning in recwarn]
    assert warnings == ([] if arguments[0] == "--draws" else [(FutureWarning, "--samples is now --draws")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus", "3"], "--bogus"),
        (["--stage", "both"], "invalid choice: 'both' (choose from"),
        (["--preset", "coco"], "invalid choice: 'coco' (choose from"),
        (["--method", "sam"], "invalid choice: 'sam' (choose from"),
        (["--steps", "many"], "--steps"),
        (["--frame-size", "64"], "--frame-size"),
        (["--stage", "video", "--backbone", "x"], "--backbone"),
        (["--precision", "fp64"], "fp64"),
        (["--sta", "image"], "--sta"),
    ],
)
def test_wrong_option_exits_2_and_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert message.replace("'", "") in plain(captured.err + captured.out).replace("'", "")


def fail_with(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("frames [B] must be 3"), "error: frames [B] must be 3"),
        (FileNotFoundError("no run at x"), "error: no run at x"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x/y"), "error: [Errno 2] No such file: '/x/y'"),
        (OSError(errno.ENOSPC, "the disk is full: c was not written"), "error: the disk is full: c was not written"),
        (RuntimeError("known"), "error: known"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "error: Broken pipe"),  # of a helper process
        (ValueError("x" * 300), "error: " + "x" * 300),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_status_1(error, line, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(fail_with(error), (RuntimeError,))
    assert exit_.value.code == 1
    assert capsys.readouterr().err.splitlines() == [line]


def test_what_a_user_cannot_cause_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(fail_with(ZeroDivisionError()))
    with pytest.raises(RuntimeError):
        run_command(fail_with(RuntimeError()))


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (lambda: 0, 0),
        (lambda: 3, 3),
        (fail_with(KeyboardInterrupt()), 130),
        (lambda: signal.raise_signal(signal.SIGINT), 130),
        (lambda: signal.raise_signal(signal.SIGTERM), 143),
        (lambda: signal.raise_signal(signal.SIGHUP), 129),
    ],
)
def test_status_of_success_and_interruption(command, status, monkeypatch, capsys):
    monkeypatch.setattr("os._exit", sys.exit)  # how a command ends while threads of it still read
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        run_command(command, stopped="ADVICE")
    assert exit_.value.code == status
    name = {130: "INT", 143: "TERM", 129: "HUP"}.get(status)
    assert capsys.readouterr().err == (f"stopped by SIG{name}. ADVICE\n" if name else "")
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_command_itself_reports_in_one_line(tmp_path):
    command = [sys.executable, "-m", "interpreter.train", "--stage", "video", "--run", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no run directory at ")
    assert "python -m interpreter.train" in line
