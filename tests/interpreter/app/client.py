"""A small client of the page's server: requests, tabs, and waiting for results."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

FROM_PAGE = {"X-Interpreter": "1"}


def wait_for(condition, seconds=30.0, every=0.02):
    """Wait for the first true value of `condition()` and return it; fails after the time limit."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"nothing came of it in {seconds} s"
        time.sleep(every)
    return value


@dataclass
class Answer:
    status: int
    headers: dict = field(repr=False)
    content: bytes

    @property
    def json(self):
        return json.loads(self.content)

    @property
    def error(self):
        """The error message, one line, of an answer."""
        assert self.status >= 400, self
        assert list(self.json) == ["error"]
        assert self.json["error"]
        assert "\n" not in self.json["error"]
        return self.json["error"]


class Client:
    """Requests to the server at an address such as http://127.0.0.1:7860, one connection each."""

    def __init__(self, address):
        self.address, self.place = address, urlsplit(address).netloc

    def send(self, method, path, body=None, headers=None):
        """Send the path unchanged, and the body too unless it is a dictionary."""
        connection = http.client.HTTPConnection(self.place, timeout=60)
        try:
            if isinstance(body, dict):
                body = json.dumps(body).encode()
            connection.request(method, path, body, FROM_PAGE if headers is None else headers)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())
        finally:
            connection.close()

    def get(self, path):
        return self.send("GET", path, headers={})

    def raw(self, head, body=b""):
        """Send the lines of a request unchanged; the body may be incomplete."""
        name, port = self.place.split(":")
        with socket.create_connection((name, int(port)), timeout=60) as connection:
            connection.sendall("".join(f"{line}\r\n" for line in (*head, "")).encode("latin-1") + body)
            response = http.client.HTTPResponse(connection)
            response.begin()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def open_tab(self):
        answer = self.send("POST", "/api/sessions")
        assert answer.status == 201
        return Tab(self, answer.json)


class Tab:
    """A tab of the page; `about` is what the server answered when it was opened."""

    def __init__(self, client, about):
        self.client, self.about, self.token = client, about, about["token"]

    def get(self, path):
        return self.client.get(f"/api/s/{self.token}/{path}")

    def post(self, action, **body):
        return self.client.send("POST", f"/api/s/{self.token}/{action}", body)

    def upload(self, content, name=None):
        """Send a file, given as its path or its bytes."""
        content, name = (content, name) if isinstance(content, bytes) else (content.read_bytes(), name or content.name)
        return self.client.send("PUT", f"/api/s/{self.token}/clip?name={quote(name, safe='')}", content)

    @contextmanager
    def watched(self, headers=None):
        """A stream of states; an open page has one."""
        states = States(self, headers or {})
        try:
            yield states
        finally:
            states.close()

    def state(self):
        """The state at this moment."""
        with self.watched() as states:
            return states.next()

    def finish(self, seconds=60):
        """Wait until the tab has no task; returns the state then."""
        return wait_for(lambda: (state := self.state())["job"] is None and state, seconds)

    def segment(self, source="cluster", **settings):
        """Segment the clip and return the main pane; fails if the server reports an error."""
        assert self.post("segment", source=source, settings=settings).status == 202
        state = self.finish()
        assert state["error"] is None
        return state["panes"]["main"]

    def edit(self, kind, *segments, **more):
        """Correct segments and return the main pane; fails if the server reports an error."""
        answer = self.post("edit", kind=kind, segments=list(segments), **more)
        assert answer.status == 200, answer
        return answer.json["pane"]

    def download(self, format, **options):
        """A file of the segments; returns its name and its bytes."""
        assert self.post("download", format=format, **options).status == 202
        state = self.finish()
        assert state["error"] is None
        answer = self.get(f"download/{format}")
        assert answer.status == 200
        assert len(answer.content) == state["downloads"][format]["bytes"]
        return state["downloads"][format]["name"], answer.content


class States:
    """An open stream of a tab's states, read when `next` is called or, with `follow`, by a thread."""

    def __init__(self, tab, headers):
        self._connection = http.client.HTTPConnection(tab.client.place, timeout=60)
        self._connection.request("GET", f"/api/s/{tab.token}/events", headers=headers)
        self._socket = self._connection.sock
        self.response = self._connection.getresponse()
        self.seen = []

    def next(self):
        """The next state; None at the end of the stream."""
        assert self.response.status == 200, self.response.read()
        while line := self.response.readline():
            if line.startswith(b"data: "):
                self.seen.append(json.loads(line.removeprefix(b"data: ")))
                return self.seen[-1]
        return None

    def follow(self):
        """Read all states in a thread, which ends with the stream; they are in `seen`."""

        def read():
            with suppress(OSError, ValueError, AttributeError):  # the stream was closed in this process
                while self.next() is not None:
                    pass

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread

    def close(self):
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # a thread that reads would wait for the next state
        self.response.close()
        self._connection.close()
