"""All tabs of all browsers: they come, are closed, and are forgotten."""

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
        folder: of the server.
        sources: what can segment.
        most: clips that are kept at once.
        leave: seconds after which the work of a closed tab stops: a page that is reloaded comes back sooner.
        forget: seconds after which its clip is removed.
    """

    def __init__(self, folder: Path, sources: Sources, most: int, leave: float, forget: float) -> None:
        self.shared, self.most, self.leave, self.forget = Shared(folder, sources), most, leave, forget
        self.ending = False  # the server is about to end
        self._sessions: dict[str, Session] = {}
        self._bringing: list[Session] = []  # a clip, at this moment
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
        """The tab of a token; :class:`Gone` if it was closed."""
        session = self._sessions.get(token)
        if session is None:
            raise Gone("the server no longer has this page's clip; reload the page and choose the video again")
        return session

    @contextmanager
    def place_for(self, session: Session) -> Iterator[None]:
        """A block in which a tab brings a clip; ValueError if the server keeps enough of other tabs already."""
        with self._lock:
            if session in self._bringing:
                raise ValueError("another upload of this page is under way; wait for it, or cancel it")
            tabs = [tab for tab in self._sessions.values() if tab.clip is not None or tab in self._bringing]
            if len([tab for tab in tabs if tab is not session]) >= self.most:
                raise ValueError(
                    f"this server already keeps {self.most} clips, its limit; try again after somebody removes a video "
                    "(a closed page keeps its clip for 10 minutes), or restart the server with a larger --max-clips"
                )
            self._bringing.append(session)
        try:
            yield
        finally:
            with self._lock:
                self._bringing.remove(session)

    def close(self, session: Session) -> None:
        """Forget a tab."""
        with self._lock:
            self._sessions.pop(session.token, None)
        session.close()

    def tidy(self) -> None:
        """Stop the work of tabs that were closed, and forget those that do not come back."""
        now = time.monotonic()
        with self._lock:
            alone = [session for session in self._sessions.values() if session.connections == 0]
        for session in alone:
            try:
                if now - session.left > self.forget:
                    self.close(session)
                elif now - session.left > self.leave:
                    session.cancel(f"stopped, because the page was disconnected for {self.leave:.0f} s; start it again")
            except Exception:  # the other tabs must be looked after nevertheless
                with suppress(OSError):
                    traceback.print_exc()

    def shut_down(self) -> None:
        """Stop all work."""
        for queue in (self.shared.long, self.shared.short):
            queue.close(seconds=5)
