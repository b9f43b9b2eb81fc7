"""Files that are whole or absent (written beside their place, synced, renamed), and text from any system."""

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
    """Yield a temporary path beside ``path``; rename it there when the block ends well, remove it when not.

    Several processes, on several machines, may write the same path at the same time: the last one's file stays.

    Raises:
        OSError: if the disk is full, in one clear line; what was at ``path`` before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # Some libraries make their files readable for the owner alone, but run directories are shared.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except Exception as error:
        # Some libraries report a failed write in an exception type of their own, with the cause in the text only. An
        # error that names another file came from the caller's block and needs no other message.
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full and getattr(error, "filename", None) in (None, str(temporary)):
            raise OSError(
                errno.ENOSPC, f"the disk is full: {path} was not written; an earlier version of it is unchanged"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    r"""Read a text file as any system writes it: UTF-8 or UTF-16, with or without a byte-order mark, lines ended by \n.

    Windows' editors put a byte-order mark first, ``copy a.txt+b.txt c.txt`` leaves one at the start of a later line,
    and PowerShell's ``>`` writes UTF-16 with ``\r\n``.

    Raises:
        ValueError: if it is neither; names the byte and what to do.
        OSError: if it cannot be read.
    """
    content = path.read_bytes()
    try:
        # The rule of JSON's standard, for which the text has to begin with an ASCII character.
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not a text file in UTF-8 or UTF-16 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub("^\ufeff+", "", lines, flags=re.MULTILINE)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of files in this folder; no process may be writing there."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
