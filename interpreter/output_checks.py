"""Checks of a directory that segments are written to, before any work is done."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path


def check_place(out: Path, alpha: float, name: str | None = None, formats: Sequence[str] = ()) -> None:
    """Refuse an invalid directory or opacity, and a directory with files of another program.

    Args:
        out: directory to write to.
        alpha: opacity of the overlay's tint.
        name: of the video; None if it is not known yet, or a live stream.
        formats: see :meth:`SegmentedVideo.write`.

    Raises:
        ValueError: says which option to change.
        PermissionError: if this user cannot write to the directory.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha {alpha}: the opacity must be between 0 and 1")
    present = next((path for path in (out, *out.parents) if path.exists()), Path("."))
    if not present.is_dir():
        raise ValueError(f"--out {out}: {present} is a file; give a directory")
    if not os.access(present, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"--out {out}: this user cannot write to {present}; give another directory")
    if formats:
        from interpreter.render.formats import check_formats

        check_formats(formats, out)
    if name is None:
        return
    if (out / "stream.json").exists():
        raise ValueError(f"--out {out} contains the files of a live stream; give another directory")
    annotations = (out / "Annotations" / name).resolve()
    if annotations.exists() and not (out / "slots.safetensors").exists():
        raise ValueError(f"{annotations} already exists and is not from this command; give another --out")
