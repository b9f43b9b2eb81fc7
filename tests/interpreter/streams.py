"""Live streams for tests: containers as the bytes that a writer sends after each frame."""

import io
import os
import threading
from contextlib import contextmanager

import av
import numpy as np

# format, codec, pixels, options of the codec and of the container: what a live writer sends, frame by frame
LIVE = {
    "mkv": ("matroska", "libx264", "yuv420p", {"tune": "zerolatency"}, {"cluster_time_limit": "1"}),
    "webm": (
        "webm",
        "libvpx-vp9",
        "yuv420p",
        {"lag-in-frames": "0", "deadline": "realtime"},
        {"cluster_time_limit": "1"},
    ),
    "mpegts": ("mpegts", "libx264", "yuv420p", {"tune": "zerolatency"}, {}),
    "y4m": ("yuv4mpegpipe", "rawvideo", "yuv420p", {}, {}),
}
BARE: tuple[str, str, str, dict[str, str], dict[str, str]] = ("h264", "libx264", "yuv420p", {"tune": "zerolatency"}, {})


class Sink:
    """A file without seek; `look` returns the bytes that were written since its last call."""

    def __init__(self):
        self.content = bytearray()

    def write(self, data):
        self.content += data
        return len(data)

    def look(self):
        data = bytes(self.content)
        self.content.clear()
        return data


def sent(kind, frames, fps=24):
    """The bytes that a writer sends for frames uint8 [T, H, W, 3]: T + 1 pieces, the last one after all frames."""
    container, codec, pixels, of_codec, of_container = LIVE.get(kind, BARE)
    sink, pieces = Sink(), []
    with av.open(sink, "w", format=container, options={"flush_packets": "1", **of_container}) as file:
        stream = file.add_stream(codec, rate=fps, options=of_codec)
        (stream.height, stream.width), stream.pix_fmt = frames.shape[1:3], pixels
        stream.codec_context.thread_count = 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            pieces.append(sink.look())
        file.mux(stream.encode())
    return [*pieces, sink.look()]


def stream(kind, frames):
    """A whole stream as bytes."""
    return b"".join(sent(kind, frames))


@contextmanager
def piped(content):
    """The reading end of a pipe that a thread fills with these bytes, and then closes."""
    reading, writing = os.pipe()

    def fill():
        try:
            with os.fdopen(writing, "wb") as file:
                file.write(content)
        except BrokenPipeError:  # the reader closed the pipe
            pass

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        with os.fdopen(reading, "rb") as file:
            yield file
    finally:
        thread.join()


def unseekable(content):
    """A file object in memory, without a descriptor."""
    return io.BufferedReader(io.BytesIO(content))
