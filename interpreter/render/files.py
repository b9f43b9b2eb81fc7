"""Files that are there complete or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block ends well, and goes when it fails.

    Raises:
        OSError: one clear line where the disk is full; other errors pass through.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # An error that names another file came from the caller's block and already says what it has to say.
        if error.errno == errno.ENOSPC and error.filename in (None, str(temporary)):
            raise OSError(
                errno.ENOSPC, "no space left on the device: free some or write elsewhere", str(path)
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
