"""All open tabs of all browsers. Closed tabs are removed after some time."""

import secrets
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from interpreter.app.session import Gone, Session, Shared
from interpreter.app.sources import Sources


class Sessions:
    """All tabs.

    Args:
        folder: folder of the server.
        sources: runs and methods that can segment.
        most: number of clips that are kept at once.
        leave: seconds after which the work of a closed tab stops. A reloaded page returns sooner.
        forget: seconds after which the clip of a closed tab is removed.
    """

    def __init__(self, folder: Path, sources: Sources, most: int, leave: float, forget: float) -> None:
        self.shared, self.most, self.leave, self.forget = Shared(folder, sources), most, leave, forget
        self.ending = False  # the server is stopping
        self._sessions: dict[str, Session] = {}
        self._bringing: list[Session] = []  # tabs that are uploading a clip
        self._lock = threading.Lock()

    def open(self) -> Session:
        """A new tab."""
        token = secrets.token_urlsafe(24)
        folder = self.shared.folder / secrets.token_hex(8)
        folder.mkdir()
        with self._lock:
            session = self._sessions[token] = Session(token, folder, self.shared)
        return session

    def find(self, token: str) -> Session:
        """The tab of a token. Raises :class:`Gone` if it was closed."""
        session = self._sessions.get(token)
        if session is None:
            raise Gone("the server no longer has this page's clip; reload the page and choose the video again")
        return session

    @contextmanager
    def place_for(self, session: Session) -> Iterator[None]:
        """A block in which a tab uploads a clip. Raises ValueError if the server already keeps the maximum number."""
        with self._lock:
            if session in self._bringing:
                raise ValueError("this page is still uploading another video; wait for it, or cancel it")
            tabs = [tab for tab in self._sessions.values() if tab.clip is not None or tab in self._bringing]
            if len([tab for tab in tabs if tab is not session]) >= self.most:
                raise ValueError(
                    f"this server already keeps {self.most} clips, its limit; try again after a user removes a video "
                    "(a closed page keeps its clip for 10 minutes), or restart the server with a larger --max-clips"
                )
            self._bringing.append(session)
        try:
            yield
        finally:
            with self._lock:
                self._bringing.remove(session)

    def close(self, session: Session) -> None:
        """Remove a tab."""
        with self._lock:
            self._sessions.pop(session.token, None)
        session.close()

    def tidy(self) -> None:
        """Stop the work of closed tabs, and remove tabs that do not return."""
        now = time.monotonic()
        with self._lock:
            alone = [session for session in self._sessions.values() if session.connections == 0]
        for session in alone:
            try:
                if now - session.left > self.forget:
                    self.close(session)
                elif now - session.left > self.leave:
                    session.cancel(f"stopped, because the page was disconnected for {self.leave:.0f} s; start it again")
            except Exception:  # continue with the other tabs in any case
                with suppress(OSError):
                    traceback.print_exc()

    def shut_down(self) -> None:
        """Stop all work."""
        for queue in (self.shared.long, self.shared.short):
            queue.close(seconds=5)
