"""A hub on this computer, which the real client of the Hugging Face hub uses."""

import os
import time
from types import SimpleNamespace

import pytest

from interpreter.hub.card import write_card
from interpreter.hub.names import parse_name
from interpreter.hub.packing import pack

from .small_hub import TOKEN, Repository, SmallHub, serving

NAME = "owner/tiny"
CHUNK = 1000  # at most this many bytes are lost when a download breaks off


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub. The client has an empty cache, and may write to the hub."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    hub = SmallHub()
    with serving(hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, which this hub does not have
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        without_waiting = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})  # in that module alone
        monkeypatch.setattr("huggingface_hub.file_download.time", without_waiting)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.address, hub.cache = address, tmp_path / "home" / "hub"
        yield hub


@pytest.fixture(scope="session")
def tiny_files(tiny_run, tmp_path_factory):
    """The files that a push of `tiny_run` sends, by path."""
    packed = pack(tiny_run, tmp_path_factory.mktemp("packed"))
    write_card(packed, parse_name(NAME), "mit")
    return {path: (packed.folder / path).read_bytes() for path in packed.files}


@pytest.fixture
def pushed(hub, tiny_files):
    """The hub with `tiny_run` on it, under NAME."""
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].change(tiny_files)
    return hub


@pytest.fixture
def as_another_user(hub, tmp_path):
    """Environment of a command for a user with an empty cache."""
    unset = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    return env | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "another"), "OMP_NUM_THREADS": "1"}
