"""The configuration of a run: ranges of options, what may change on resume, and config.json."""

import dataclasses
import json
from pathlib import Path

import pytest

from interpreter.cache import Caching
from interpreter.engine.run import (
    RunConfig,
    check_ranges,
    flag,
    read_config,
    require_same,
    to_dict,
    write_config,
)
from interpreter.methods import METHODS
from interpreter.methods.interpreter.config import ImageTraining, VideoTraining
from interpreter.methods.interpreter.settings import Settings

STAGES = [stage.presets["demo"] for method in METHODS.values() for stage in method.stages]
OPTIONS = [
    *(options for options in STAGES if not isinstance(options, VideoTraining)),
    VideoTraining(run=Path("run"), level=3),  # like the settings below
    *(method.settings() for method in METHODS.values() if method.settings is not Settings),
    Settings(association="learned"),  # all options have a meaning for it
    Caching(run=Path("run")),
]


def bounded(options):
    """Yield (path of field names, least value) of each option with a least value."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{path}", least) for path, least in bounded(value))
        elif field.metadata.get("at_least") is not None:
            yield field.name, field.metadata["at_least"]


def with_value(options, path, value):
    """A copy of the options with another value of the field at this path."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(options, **{name: with_value(getattr(options, name), rest, value) if rest else value})


CASES = [
    pytest.param(options, path, least, id=f"{number}-{type(options).__name__}-{path}")
    for number, options in enumerate(OPTIONS)
    for path, least in bounded(options)
]


@pytest.mark.parametrize(("options", "path", "least"), CASES)
def test_number_below_its_least_value_is_refused_by_name(options, path, least):
    check_ranges(with_value(options, path, least))
    with pytest.raises(ValueError, match=f"^{flag(path.rsplit('.')[-1])} must be at least {least}, got {least - 1}$"):
        check_ranges(with_value(options, path, least - 1))


def test_every_kind_of_options_has_ranges():
    assert {"steps", "batch_size", "draws", "frame_size", "num_slots", "workers", "log_every"} <= {
        case.values[1].rsplit(".")[-1] for case in CASES
    }


def test_each_of_several_numbers_is_checked_and_none_passes():
    config = ImageTraining(run=Path("run"))
    with pytest.raises(ValueError, match="--frame-size must be at least 1, got 0"):
        check_ranges(with_value(config, "data.frame_size", (64, 0)))
    check_ranges(with_value(config, "optim.micro_batch", None))


MAY_CHANGE = [
    ("run", Path("elsewhere")),
    ("optim.steps", 7),
    ("logging.log_every", 3),
    ("logging.checkpoint_every", 3),
    ("decoding.prefetch", 5),
    ("features", "streamed"),
    ("cache", Path("cache")),
    ("compile", True),
    ("cuda_graph", False),
    ("model.recompute", True),
]
MUST_NOT = [
    ("init", Path("other"), "--init was None, now other"),
    ("optim.seed", 1, "--seed was 0, now 1"),
    ("optim.schedule", "exponential", "--schedule was cosine, now exponential"),
    ("optim.micro_batch", 2, "--micro-batch was None, now 2"),
    ("model.dim", 64, "--dim was 128, now 64"),
]


@pytest.mark.parametrize("options", [ImageTraining(run=Path("run")), VideoTraining(run=Path("run"))])
@pytest.mark.parametrize(("path", "value"), MAY_CHANGE)
def test_what_may_change_may_differ_on_resume(options, path, value):
    require_same(options, with_value(options, path, value))


@pytest.mark.parametrize("options", [ImageTraining(run=Path("run")), VideoTraining(run=Path("run"))])
@pytest.mark.parametrize(("path", "value", "message"), MUST_NOT)
def test_everything_else_must_be_the_same_on_resume(options, path, value, message):
    with pytest.raises(ValueError, match=f"^run was started with other settings: {message}. Use the same"):
        require_same(options, with_value(options, path, value))


def test_all_differences_are_named_and_no_start_is_no_difference():
    options = VideoTraining(run=Path("run"))
    other = dataclasses.replace(with_value(options, "model.heads", 2), num_frames=3, draws=1, allow_unfinished=True)
    with pytest.raises(ValueError, match="--heads was 4, now 2") as caught:
        require_same(options, other)
    for part in ("--num-frames was 24, now 3", "--draws was 4, now 1"):
        assert part in str(caught.value)
    assert "--allow-unfinished" not in str(caught.value)
    require_same(None, options)


def test_configuration_survives_its_file(tmp_path):
    image, video = ImageTraining(run=Path("run"), cache=Path("c")), VideoTraining(run=Path("run"), num_frames=3)
    config = RunConfig("interpreter", {"image": to_dict(image), "video": to_dict(video)}, {"video": "abc"})
    write_config(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["format"] == 2
    stored = read_config(tmp_path)
    assert stored == config
    assert (stored.options("image", ImageTraining), stored.options("video", VideoTraining)) == (image, video)
    assert stored.options("other", VideoTraining) is None


def test_absent_configuration_is_empty(tmp_path):
    assert read_config(tmp_path) == RunConfig("interpreter", {}, {})


def test_format_of_a_later_version_is_refused_by_number(tmp_path):
    (tmp_path / "config.json").write_text('{"format": 3, "method": "interpreter", "stages": {}}')
    with pytest.raises(
        ValueError, match=r"config\.json is not the configuration of a run \(format 3; .* reads 1 and 2"
    ):
        read_config(tmp_path)
