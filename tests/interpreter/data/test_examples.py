"""The examples in docstrings of `interpreter.data` run and print the shown results."""

import doctest
import importlib
import pkgutil

import pytest

import interpreter.data
from interpreter.data import open_dataset, open_video

from ..videos import encode, moving, save_frames

SKIPPED = {"interpreter.data.__main__", "interpreter.data.loaders.dali"}  # a command; needs DALI
MODULES = [
    module.name
    for module in pkgutil.walk_packages(interpreter.data.__path__, "interpreter.data.")
    if module.name not in SKIPPED
]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the examples may use: ``clips``, a folder of two videos, and ``folder``, an empty one."""
    clips = tmp_path_factory.mktemp("clips")
    save_frames(clips / "ball", moving(3, 48, 64), "{:05d}.png")
    encode(clips / "walk.mp4", moving(5))
    return {
        "clips": clips,
        "folder": tmp_path_factory.mktemp("folder"),
        "open_dataset": open_dataset,
        "open_video": open_video,
    }


@pytest.mark.parametrize("module", MODULES)
def test_examples(module, names):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.testmod(importlib.import_module(module), extraglobs=names, optionflags=flags)
    assert failed == 0
