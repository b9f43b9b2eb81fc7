"""The real application, served in this process."""

import threading

import pytest

from interpreter.configs import BackboneConfig
from interpreter.methods import cluster

from ..clips import make_clip
from .client import Client, wait_for

FRAMES = 5


class Served:
    """A server that runs in a thread.

    Attributes:
        folder: of the uploaded files.
        sessions: its tabs.
        address: to open in a browser.
        client: sends requests to that address.
    """

    def __init__(self, folder, runs, clips, leave, forget, megabytes, frames):
        import uvicorn

        from interpreter.app.server import Limits, make_app
        from interpreter.app.sessions import Sessions
        from interpreter.app.sources import Sources
        from interpreter.app.training import TrainingRun

        self.folder = folder
        sources = Sources(runs, BackboneConfig("efficientnet-lite0"))
        self.sessions = Sessions(folder, sources, clips, leave, forget)
        shown = {id: TrainingRun(id, source.run, folder) for id, source in sources.runs.items()}
        app = make_app(self.sessions, shown, Limits(megabytes, frames), ["127.0.0.1", "localhost"])
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started, every=0.005)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.client = Client(self.address)

    def files(self):
        """All uploaded files, as paths relative to the folder."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())

    def session(self, tab):
        """The server's object of a tab."""
        return self.sessions.find(tab.token)

    def close(self):
        self.sessions.ending = self._server.should_exit = True
        self._thread.join(30)
        self.sessions.shut_down()
        assert not self._thread.is_alive()


@pytest.fixture
def serve(tmp_path, tiny_run, monkeypatch):
    """serve(**options) -> Served: a server with the run `tiny_run` and the method cluster on a small backbone."""
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setattr(cluster, "FRAME_SIZE", (64, 96))  # small frames, to save time
    servers = []

    def start(*, runs=None, clips=8, leave=60.0, forget=600.0, megabytes=10, frames=100):
        folder = tmp_path / f"server-{len(servers)}"
        folder.mkdir()
        runs = [tiny_run] if runs is None else runs
        servers.append(Served(folder, runs, clips, leave, forget, megabytes, frames))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server(serve):
    return serve()


@pytest.fixture
def tab(server):
    """A tab of that server."""
    return server.client.open_tab()


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A clip of FRAMES frames, 48x64 pixels."""
    return make_clip(tmp_path_factory.mktemp("clip") / "walk.mp4", frames=FRAMES)


@pytest.fixture(scope="session")
def segmented(clip, tiny_run):
    """The segments that `interpreter.segment` finds in the same clip with `tiny_run`."""
    from interpreter import segment_video

    return segment_video(clip, tiny_run)
