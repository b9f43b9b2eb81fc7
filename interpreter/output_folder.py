"""A folder of results: several files that appear together."""

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from interpreter.interrupts import Interrupted, StopRequest
from interpreter.locks import Lock, waiting_for


def make_output_folder(out: Path) -> None:
    """Make a folder for results, and make sure that files can be written to it.

    Raises:
        OSError: if that is impossible.
    """
    out.mkdir(parents=True, exist_ok=True)
    with waiting_for(out / ".lock", str(out)), tempfile.TemporaryDirectory(prefix=".segment-", dir=out):
        pass


@contextlib.contextmanager
def written_together(out: Path, names: Sequence[str], absent: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder inside ``out``. When the block ends without an error, its entries move to ``out``.

    After an error or a signal inside the block, ``out`` is unchanged. The moves happen one after the other, in the
    order of ``names``. During the moves, signals are delayed, and other processes that write to ``out`` wait. Only a
    crash or a power cut between two moves leaves a mix of new and old entries; the next call replaces both.

    Args:
        out: the folder.
        names: files or folders, relative to ``out``, that the block makes in the temporary folder.
        absent: files of an earlier call, relative to ``out``, that this one does not make: they are deleted.

    Raises:
        OSError: if ``out`` cannot be written, for example because the disk is full.
        Interrupted: after the moves, if a signal arrived during them.
    """
    with private_folder(out) as folder:
        try:
            yield folder
        except OSError as error:
            if error.errno == errno.ENOSPC:
                text = f"the disk is full: nothing was written to {out}, and its files are unchanged"
                raise OSError(errno.ENOSPC, text) from error
            raise
        stopped = move_together(folder, out, names, absent)
    if stopped:
        raise Interrupted(stopped)


def move_together(folder: Path, out: Path, names: Sequence[str], absent: Sequence[str] = ()) -> int:
    """Move entries from a private folder to ``out``, and delete those in ``absent``, while signals and other processes
    wait. Returns the number of a signal that arrived during the moves, or 0."""
    with waiting_for(out / ".lock", str(out)), StopRequest() as stop:
        for number, name in enumerate(names):
            place = out / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.is_dir():
                place.rename(folder / f"previous-{number}")
            (folder / name).replace(place)
        for name in absent:
            (out / name).unlink(missing_ok=True)
    return stop.number


@contextlib.contextmanager
def private_folder(out: Path) -> Iterator[Path]:
    """Yield a private folder inside ``out``. Afterwards, remove it, and those of killed processes."""
    with waiting_for(out / ".lock", str(out)):
        for other in out.glob(".segment-*"):
            lock = Lock(other / ".lock")
            with contextlib.suppress(PermissionError):  # it belongs to another user
                if lock.take():
                    if lock.exclusive:
                        shutil.rmtree(other)
                    lock.release()
        folder = Path(tempfile.mkdtemp(prefix=".segment-", dir=out))
        alive = Lock(folder / ".lock")
        alive.take()
    try:
        yield folder
    finally:
        with waiting_for(out / ".lock", str(out)):
            alive.release()
            shutil.rmtree(folder)
