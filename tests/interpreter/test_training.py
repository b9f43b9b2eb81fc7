"""Options that training refuses before it starts, for every method."""

import dataclasses
from pathlib import Path

import pytest

from interpreter.cache import main as cache
from interpreter.configs import OptimConfig
from interpreter.engine.run import RunConfig, write_config
from interpreter.methods import find_method
from interpreter.methods.interpreter import INTERPRETER
from interpreter.methods.interpreter.config import ImageTraining
from interpreter.methods.interpreter.stages import ImageTrainingStage
from interpreter.training import train


class Contrasting(ImageTrainingStage):
    """A stage whose loss compares all samples of a batch."""

    additive = False


def test_micro_batch_is_refused_where_the_loss_is_not_additive(tmp_path):
    config = ImageTraining(run=tmp_path / "run", optim=OptimConfig(batch_size=4, micro_batch=2))
    method = dataclasses.replace(INTERPRETER, stages=(Contrasting(),))
    with pytest.raises(ValueError, match=r"^--micro-batch: the loss of interpreter compares all samples of a batch"):
        train(method, method.stages[0], config)
    assert not (tmp_path / "run").exists()


def test_unknown_method_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"^unknown method 'sam'; choose from interpreter, "):
        find_method("sam")
    write_config(tmp_path, RunConfig("sam", {"model": {"optim": {"steps": 1}}}))
    with pytest.raises(ValueError, match=r"^unknown method 'sam'; choose from interpreter, "):
        cache(["--run", str(tmp_path)])


def test_run_of_another_method_is_refused_by_training_and_cache(tmp_path):
    write_config(tmp_path, RunConfig("dinosaur", {"model": {"optim": {"steps": 1}}}))
    config = ImageTraining(run=Path(tmp_path))
    with pytest.raises(ValueError, match=f"^{tmp_path} is a run of the method dinosaur; give another --run"):
        train(INTERPRETER, INTERPRETER.stages[0], config)
    with pytest.raises(ValueError, match=f"^{tmp_path} is a run of the method dinosaur, not of interpreter"):
        cache(["--run", str(tmp_path), "--method", "interpreter"])
