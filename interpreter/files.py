"""Files that are complete or absent (written next to their place, synced, renamed), and text from any system."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``. Rename it to ``path`` if the block succeeds, and remove it otherwise.

    Several processes, also on several machines, can write the same path at the same time. The last file stays.

    Raises:
        OSError: if the disk is full. The earlier file at ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # Some libraries make their files readable only for the owner, but run directories are shared.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except Exception as error:
        # Some libraries report a failed write with their own exception type, and the cause is only in the text. An
        # error that names another file came from the caller's block, and keeps its message.
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full and getattr(error, "filename", None) in (None, str(temporary)):
            raise OSError(
                errno.ENOSPC, f"the disk is full: {path} was not written; an earlier version of it is unchanged"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    r"""Read a text file of any system: UTF-8 or UTF-16, with or without a byte-order mark. Returns lines ended by \n.

    Windows' editors put a byte-order mark first, ``copy a.txt+b.txt c.txt`` leaves one at the start of a later line,
    and PowerShell's ``>`` writes UTF-16 with ``\r\n``.

    Raises:
        ValueError: if it is neither UTF-8 nor UTF-16. The message names the byte.
        OSError: if it cannot be read.
    """
    content = path.read_bytes()
    try:
        # The rule of the JSON standard. It requires that the text begins with an ASCII character.
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not a text file in UTF-8 or UTF-16 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("^\ufeff+", "", lines, flags=re.MULTILINE)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes from this folder. No process may be writing to it."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
