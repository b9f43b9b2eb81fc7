"""Ctrl-C and SIGTERM as a request to finish the step, save and leave."""

import signal
from types import FrameType


class StopRequest:
    """Context manager: the first SIGINT or SIGTERM sets ``requested``, a second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> "StopRequest":
        self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
