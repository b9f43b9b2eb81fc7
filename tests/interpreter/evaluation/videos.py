"""Tiny videos whose masks are known, and saved predictions for them in every format."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from interpreter.files import write_text
from interpreter.render import write_palette_png

FRAMES, SIZE = 6, (24, 40)


def squares(frames=FRAMES, shift=0):
    """Two objects of 8x8 pixels that move to the right by one pixel a frame: uint8 [T, H, W], ids 1 and 2.

    The first is ``shift`` pixels further to the right.
    """
    maps = np.zeros((frames, *SIZE), np.uint8)
    for t in range(frames):
        maps[t, 8:16, 2 + t + shift : 10 + t + shift] = 1
        maps[t, 8:16, 20 + t : 28 + t] = 2
    return maps


def save_davis(root, videos, annotations="Annotations_unsupervised"):
    """A data set in the layout of DAVIS-2017, split val: name -> masks uint8 [T, H, W]."""
    save_png(root / annotations / "480p", videos)
    for video, masks in videos.items():
        for t, mask in enumerate(masks):
            frame = root / "JPEGImages/480p" / video / f"{t:05d}.png"
            frame.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.repeat(mask[:, :, None] * 60, 3, axis=2)).save(frame)
    write_text(root / "ImageSets/2017/val.txt", "\n".join(videos) + "\n")
    return root


def save_png(path, videos):
    """Palette PNGs: path/VIDEO/00000.png …"""
    for video, maps in videos.items():
        for t, frame in enumerate(maps):
            write_palette_png(frame, path / video / f"{t:05d}.png")
    return path


def save_npz(path, videos):
    """One file with an array for each video."""
    np.savez(path, **videos)
    return path


def save_json(path, videos):
    """YouTube-VIS results: an entry for each id but 0."""
    entries = [
        {"video_id": video, "category_id": 1, "score": 0.5, "segmentations": [_rle(frame == i) for frame in maps]}
        for video, maps in videos.items()
        for i in np.unique(maps)
        if i
    ]
    write_text(path, json.dumps(entries))
    return path


def _rle(mask):
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}
