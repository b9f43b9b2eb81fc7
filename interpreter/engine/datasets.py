"""The data of a run, opened by its configuration."""

from pathlib import Path

from interpreter.configs import DataConfig
from interpreter.data import VideoDataset, open_dataset
from interpreter.data.synthetic import generate_scenes
from interpreter.engine.logging import console


def open_videos(config: DataConfig, run: Path) -> VideoDataset:
    """Open the data set; scenes that do not exist yet are generated. Skipped videos are named on screen."""
    root = config.root
    if config.data == "synthetic":
        split, root = config.split or "train", root or run / "scenes"
        generate_scenes(root, config.num_videos, split=split)
        dataset = open_dataset("synthetic", root, split)
    elif root is None:
        raise ValueError(f"--data {config.data} needs --root DIR")
    elif config.data == "davis":
        dataset = open_dataset("davis", root, config.split, int(config.year))
    else:
        dataset = open_dataset("folder", root)
    if dataset.skipped:
        console.print(f"[yellow]{dataset.report()}")
    return dataset
