"""Every method fulfils the contract of interpreter.methods.base; so does one with any number of stages."""

import contextlib
import dataclasses
import io
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from interpreter.cache import main as cache
from interpreter.configs import BackboneConfig, LoggingConfig
from interpreter.data import open_video
from interpreter.data.video.first_frames import FirstFrames
from interpreter.engine.distributed import Ranks
from interpreter.engine.inputs import InputSettings
from interpreter.engine.memory import memory_notice
from interpreter.engine.run import check_ranges, from_dict, read_config, to_dict
from interpreter.engine.step import TrainingStep
from interpreter.engine.task import Task
from interpreter.engine.videos import open_videos
from interpreter.export.__main__ import ExportOptions, open_last_stage
from interpreter.export.trace import trace
from interpreter.methods import METHODS
from interpreter.methods.runs import open_context, open_segmenter
from interpreter.train import main, parse_stage
from interpreter.training import train, ways_to_save_memory

from .contract_methods import LEVELS
from .program_chains import CHAINS

CPU, STEPS = torch.device("cpu"), 4
EVERY = [*METHODS.values(), LEVELS]
TRAINED = [method for method in EVERY if method.stages]
STAGES = [pytest.param(m, s, id=f"{m.name}-{s.name}") for m in TRAINED for s in m.stages]


@pytest.fixture(autouse=True)
def _all_methods(monkeypatch):
    monkeypatch.setitem(METHODS, LEVELS.name, LEVELS)


def demo(stage, run, scenes, **optim):
    """The demo preset on small frames, few steps and few frames a step."""
    config = stage.presets["demo"]
    changes = {"batch_size": 2, "steps": STEPS, "warmup_steps": 2, "precision": "fp32", **optim}
    logging = LoggingConfig(log_every=1, checkpoint_every=2)
    config = dataclasses.replace(
        config, run=run, optim=dataclasses.replace(config.optim, **changes), logging=logging, features="streamed"
    )
    if not hasattr(config, "data"):
        return config
    data = dataclasses.replace(config.data, root=scenes, frame_size=(64, 96), num_videos=3)
    return dataclasses.replace(config, data=data)


@pytest.fixture(scope="module")
def run_of(scenes, tmp_path_factory):
    """run_of(method) -> a run whose stages were all trained for a few steps of the demo preset."""
    runs = {}

    def make(method):
        if method.name not in runs:
            runs[method.name] = tmp_path_factory.mktemp(method.name) / "run"
            for stage in method.stages:
                train(method, stage, demo(stage, runs[method.name], scenes))
        return runs[method.name]

    return make


@contextlib.contextmanager
def opened(method, stage, run, scenes):
    """The task of a stage, as training opens it."""
    config = demo(stage, run, scenes)
    context = open_context(method, stage, config, run, CPU)
    torch.manual_seed(0)
    model = stage.build(config, context)
    settings = InputSettings(open_videos(context.data, run), config.optim, Ranks())
    with stage.inputs(config, context, settings) as inputs:
        groups, after = stage.parameter_groups, stage.after_step
        yield Task(model, stage.loss, inputs, stage.noise(model), config.optim, CPU, Ranks(), groups, after)


@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_presets_are_valid_and_survive_json(method, stage):
    for config in stage.presets.values():
        check_ranges(config)
        assert from_dict(stage.config, to_dict(config)) == config
        assert method.stage(stage.key(config)) is stage


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.name)
def test_method_describes_itself(method):
    assert METHODS[method.name] is method
    assert method.summary
    assert method.citation
    method.settings()  # has defaults
    assert (method.open is None) == bool(method.stages)


@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_batch_is_a_function_of_the_step_alone(method, stage, run_of, scenes):
    with opened(method, stage, run_of(method), scenes) as task:
        from_start = list(itertools.islice(task.batches(0), 3))
        from_two = next(task.batches(2))
        assert [list(tensor.shape) for tensor in from_two] == [list(shape) for shape in task.shapes()]
        assert all(torch.equal(one, other) for one, other in zip(from_start[2], from_two, strict=True))
        assert not torch.equal(from_start[0][0], from_start[1][0])


@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_compiled_steps_equal_eager_steps(method, stage, run_of, scenes):
    losses = []
    for compiled in (False, True):
        with opened(method, stage, run_of(method), scenes) as task:
            step = TrainingStep(task, task.optim, CPU, compiled)
            step.start(0, {})
            for batch in itertools.islice(task.batches(0), 3):
                step.run(batch)
            losses.append(step.read_sums()["loss"])
            assert step.failure() is None
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_memory_of_a_step_is_predicted(method, stage, run_of, scenes):
    with opened(method, stage, run_of(method), scenes) as task:
        assert memory_notice(task).startswith("a step takes ")


@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)
def test_training_resumes_bit_for_bit(method, run_of, scenes, tmp_path):
    """Resumed from its checkpoint after half of the steps, each stage ends with the weights of an uninterrupted run."""
    straight, resumed = run_of(method), tmp_path / "run"
    shutil.copytree(straight, resumed)
    for stage in method.stages:
        config = demo(stage, resumed, scenes)
        last = f"{stage.key(config)}/checkpoint-{STEPS:08d}.safetensors"
        (resumed / last).unlink()
        train(method, stage, config)
        one, other = load_file(resumed / last), load_file(straight / last)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.name)
def test_five_frames_are_segmented(method, run_of, scenes):
    clip = FirstFrames(open_video(next(scenes.glob("JPEGImages/*/train-00000"))), 5)
    if method.stages:
        segmenter = open_segmenter(method, run_of(method), frame_size=(64, 96), device=CPU)
    else:  # with the backbone whose weights come with the installation
        settings = method.settings(backbone=BackboneConfig())
        segmenter = open_segmenter(method, None, settings, frame_size=(64, 96), device=CPU)
    advanced = []
    encoded = segmenter.encode(clip, (0, 1), advanced.append)
    assert sum(advanced) == encoded.frames == 5
    for seed in (0, 1):
        segmentation = segmenter.segment(encoded, seed)
        masks, labels = segmentation.masks(), segmentation.labels(size=(32, 48))
        torch.testing.assert_close(masks.sum(-1), torch.ones(masks.shape[:-1]), atol=2e-3, rtol=0)
        assert labels.shape == (5, 32, 48)
        assert labels.max() < segmentation.num_segments
        again = segmenter.segment(encoded, seed).labels(size=(32, 48))
        assert np.array_equal(labels, again)


@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_help_names_method_stage_presets_and_options(method, stage, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--method", method.name, "--stage", stage.name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in (method.name, stage.name, *stage.presets, "--run", "--steps", "Examples"):
        assert word in text


@pytest.mark.parametrize("name", CHAINS)
def test_exported_programs_give_the_same_masks(name, run_of, scenes):
    """Programs are traced on three frames and run on five. They contain no operation of this project."""
    method = METHODS[name]
    clip = FirstFrames(open_video(next(scenes.glob("JPEGImages/*/train-00000"))), 5)
    _, _, segmenter = open_last_stage(ExportOptions(run=run_of(method), out=Path("unused")))
    traced = {program.name: trace(program) for program in segmenter.programs()}
    assert not any("slotkernels" in str(program.graph) for program in traced.values())
    run = {name: program.module() for name, program in traced.items()}
    with torch.no_grad():
        features = run["backbone"](torch.from_numpy(np.stack([*clip.frames(segmenter.frame_size)])))
        masks = CHAINS[name](run, features, segmenter)
        labels = run["labels"](masks)
    segmentation = segmenter.segment(segmenter.encode(clip, (0,)))
    expected = segmentation.masks() if name == "interpreter" else segmentation.attention.float()
    torch.testing.assert_close(masks, expected, atol=2e-3, rtol=0)  # segmenters keep masks in half precision
    sure = expected.topk(2).values.diff().abs() > 5e-3  # patches that rounding cannot assign to another segment
    assert torch.equal(masks.argmax(-1)[sure[..., 0]], expected.argmax(-1)[sure[..., 0]])
    if name == "interpreter":
        assert (labels.numpy() == segmentation.labels(size=segmenter.frame_size)).mean() > 0.99


def test_every_trained_method_is_exported():
    assert {method.name for method in METHODS.values() if method.stages} - {LEVELS.name} == CHAINS.keys()


def test_a_method_without_programs_says_so(run_of):
    segmenter = open_segmenter(LEVELS, run_of(LEVELS), device=CPU)
    with pytest.raises(ValueError, match="nothing to export but its backbone"):
        segmenter.programs()


@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_config_json_names_method_and_options(method, stage, run_of, scenes):
    run = run_of(method)
    stored, config = read_config(run), demo(stage, run, scenes)
    assert stored.method == method.name
    assert stored.options(stage.key(config), stage.config).optim == config.optim
    assert (stage.key(config) in stored.trained_on) == bool(stage.needs(config))


def test_stage_above_a_stage_is_trained_by_its_number(run_of, scenes):
    run, stage = run_of(LEVELS), LEVELS.stages[1]
    third = dataclasses.replace(demo(stage, run, scenes), level=3, dim=2)
    train(LEVELS, stage, third)
    assert (run / "level-3").is_dir()
    segmenter = open_segmenter(LEVELS, run, LEVELS.settings(stage="level-3"), device=CPU)
    assert segmenter.num_segments == 2


def test_another_methods_run_is_refused(run_of, scenes):
    interpreter = METHODS["interpreter"]
    config = demo(interpreter.stages[0], run_of(LEVELS), scenes)
    with pytest.raises(ValueError, match="is a run of the method test-levels; give another --run"):
        train(interpreter, interpreter.stages[0], config)


def test_method_without_stages_is_not_trained():
    with pytest.raises(ValueError, match="cluster has nothing to train"):
        parse_stage(["--method", "cluster", "--run", str(Path("run"))])


def test_method_without_stages_has_nothing_to_cache():
    with pytest.raises(ValueError, match="cluster has nothing to train, so there is nothing to cache"):
        cache(["--method", "cluster"])


def test_cache_wants_the_options_of_a_level(run_of):
    run = run_of(LEVELS)
    with pytest.raises(
        ValueError, match=r"does not hold the options of --stage level-4 yet; .* --stage level --level 4 --run"
    ):
        cache(["--run", str(run), "--stage", "level-4"])


@pytest.mark.parametrize(("method", "stage"), STAGES)
def test_ways_to_save_memory_are_options_of_the_stage(method, stage):
    ways, options = ways_to_save_memory(stage, stage.presets["demo"]), io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(options):
        main(["--method", method.name, "--stage", stage.name, "--help"])
    assert all(way in options.getvalue() for way in re.findall(r"--[a-z-]+", ways))
    assert ways.endswith("a smaller --batch-size")
