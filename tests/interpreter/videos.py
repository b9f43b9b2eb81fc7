"""Videos for tests: frames that move, video files, folders of frames, and damage to them."""

import hashlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def moving(n, height=64, width=96, seed=0):
    """Blocky noise that shifts, so that every frame differs: uint8 [n, height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(64, 192, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    base = small.repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.stack([np.roll(base, 3 * t, axis=1) for t in range(n)])


def picture(seed, height, width):
    """Smooth random colours, uint8 [height, width, 3]."""
    small = np.random.default_rng(seed).integers(40, 220, (4, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save_frames(folder, frames, name="{:05d}.jpg", **options):
    """Save frames uint8 [T, H, W, 3] as numbered images; returns the folder. ``options`` are those of Pillow."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(t), **options)
    return folder


def write_frames(folder, count, size, seed=0, name="{:05d}.jpg"):
    """Save ``count`` numbered images of smooth colours; returns their paths."""
    save_frames(folder, [picture(100 * seed + t, *size) for t in range(count)], name)
    return [folder / name.format(t) for t in range(count)]


def encode(path, frames, codec="libx264", pixels="yuv420p", fps=24, rotation=None, start=0, container=None, **options):
    """Encode frames uint8 [T, H, W, 3] as a video file; returns its path. ``options`` are those of the codec."""
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=fps, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.thread_count = 1  # several threads write other bytes in every run
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for t, frame in enumerate(frames):
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(format=pixels)
            shown.pts, shown.time_base = t + start, 1 / Fraction(fps)
            file.mux(stream.encode(shown))
        file.mux(stream.encode())
    return Path(path)


def cut(path, share=0.5):
    """Keep the first share of a file's bytes; returns its path."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def digest(root):
    """{relative path: hash} of all files but the lock."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
