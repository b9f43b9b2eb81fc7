"""Clips of one length out of videos of any length, for evaluation."""

import numpy as np


def evaluation_clip(num_frames: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames of a clip of fixed length: a longer video is truncated, a shorter one repeats from its start.

    Args:
        num_frames: frames of the video, at least 1.
        length: frames of the clip, at least 1.

    Returns:
        indices: int64 [length], the frame at each place of the clip.
        valid: bool [length], false where a place repeats a frame that the clip has already: padding, to be cut off
            before scoring.

    Raises:
        ValueError: if a number is below 1.
    """
    if min(num_frames, length) < 1:
        raise ValueError(f"a clip needs at least one frame: num_frames={num_frames}, length={length}")
    places = np.arange(length)
    return places % num_frames, places < num_frames
