"""Run-length codes of COCO and YouTube-VIS, checked before they are decoded.

pycocotools does not check its input: an extra count writes outside its buffer, and a wrong size allocates any amount of
memory. Untrusted files are therefore decoded here, where all runs are checked before a mask is allocated.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LARGEST_MASK = 2**28
"""Largest number of pixels of a mask; larger masks are refused."""

BITS = 5  # bits of a count in each character of the compressed form; a sixth bit means that more characters follow
FIRST = 48  # the character of value 0
LONGEST = 7  # characters of a count: 35 bits hold any run of LARGEST_MASK


def decode_rle(rle: Mapping[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    """Decode one COCO run-length code.

    >>> decode_rle({"size": [2, 3], "counts": [1, 2, 3]}, (2, 3), "example").astype(int).tolist()
    [[0, 1, 0], [1, 0, 0]]

    Args:
        rle: ``{"size": [H, W], "counts": …}``, where the counts are a list of numbers or compressed as str or bytes.
            Runs go down the columns and begin with background.
        size: (H, W) that the mask must have.
        where: names the file and the place in it, for the error.

    Returns:
        bool [H, W].

    Raises:
        ValueError: if the code is of another size, malformed, or its runs do not add up to H·W pixels.
    """
    height, width = size
    if height < 1 or width < 1 or height * width > LARGEST_MASK:
        raise ValueError(f"{where}: masks of {height}x{width} (height x width); from 1x1 to {LARGEST_MASK} pixels work")
    if not isinstance(rle, Mapping) or "counts" not in rle or "size" not in rle:
        raise ValueError(f"{where}: a run-length code is an object with 'size' and 'counts', not {_shown(rle)}")
    if not isinstance(rle["size"], (list, tuple)) or [*rle["size"]] != [height, width]:
        raise ValueError(f"{where}: code of size {_shown(rle['size'])} for frames of {[height, width]}")
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        runs: Sequence[Any] = _decompress(counts, where)
    elif isinstance(counts, (list, tuple)):
        runs = counts
    else:
        raise ValueError(f"{where}: counts must be a list of numbers or a compressed string, not {_shown(counts)}")
    pixels = height * width
    if not all(type(run) is int and 0 <= run <= pixels for run in runs):
        raise ValueError(f"{where}: a run is no whole number from 0 to {pixels}, the pixels of the frame")
    if sum(runs) != pixels:
        raise ValueError(f"{where}: runs add up to {sum(runs)} pixels for a frame of {height}x{width} = {pixels}")
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, np.asarray(runs, np.int64)).reshape(width, height).T


def _decompress(counts: str | bytes, where: str) -> list[int]:
    """Runs of the compressed form: signed numbers, 5 bits a character, low bits first.

    Each run from the fourth on is stored as its difference from the run two before it (same colour).
    """
    try:
        codes = np.frombuffer(counts.encode("ascii") if isinstance(counts, str) else counts, np.uint8)
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: compressed counts hold a character that is not ASCII ({error})") from error
    if ((codes < FIRST) | (codes >= FIRST + 64)).any():
        raise ValueError(f"{where}: compressed counts hold a character outside '0'..'o'")
    runs: list[int] = []
    value = length = 0
    for code in (codes - FIRST).tolist():
        value |= (code & 31) << BITS * length
        length += 1
        if code & 32:
            if length == LONGEST:
                raise ValueError(f"{where}: a compressed count is longer than any mask")
            continue
        if code & 16:
            value -= 1 << BITS * length
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = length = 0
    if length:
        raise ValueError(f"{where}: compressed counts end in the middle of a number; the file is cut off")
    return runs


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
