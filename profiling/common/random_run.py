"""Runs whose stages have random weights, for measurements that do not depend on the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from interpreter.configs import StageConfig
from interpreter.engine.checkpoint import TrainingState, save_checkpoint
from interpreter.engine.run import RunConfig, to_dict, write_config
from interpreter.methods.base import Method
from interpreter.methods.runs import open_context


def write_random_run(method: Method, run: Path, stages: Mapping[str, StageConfig], seed: int = 0) -> None:
    """Write a run directory that ``open_segmenter`` opens, as if its stages had been trained.

    Example::

        write_random_run(INTERPRETER, run, {"image": ImageTraining(run=run), "video": VideoTraining(run=run)})

    Args:
        method: of the run.
        run: the directory; checkpoints that it has are replaced.
        stages: options of each stage by its key, each after those that it needs.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    written, cpu = RunConfig(method.name), torch.device("cpu")
    for key, options in stages.items():
        stage: Any = method.stage(key)
        written.stages[key] = to_dict(options)
        context = open_context(method, stage, options, run, cpu, written)
        weights = stage.build(options, context).state_dict()
        save_checkpoint(run / key, TrainingState(options.optim.steps, weights))
        for needed in stage.needs(options)[:1]:
            written.trained_on[key] = context.earlier[needed].weights
    write_config(run, written)


def save_random_vit(folder: Path, width: int = 384, patch: int = 14, seed: int = 0) -> None:
    """Save a DINOv2 with random weights and 12 blocks in Hugging Face's format; by default of the size ViT-S/14."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(hidden_size=width, num_attention_heads=width // 64, patch_size=patch, image_size=518)
    Dinov2Model(config).save_pretrained(folder)
