"""Serve the page: ``python -m interpreter.app --help``."""

import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from interpreter.commands import cli, run_command
from interpreter.configs import BackboneConfig, option
from interpreter.engine.run import check_ranges, read_config
from interpreter.hub.fetching import local_run
from interpreter.hub.names import pinned_name

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from interpreter.app.sessions import Sessions

PROG = "python -m interpreter.app"
LOCAL = ("127.0.0.1", "localhost", "::1")
LEAVE, FORGET = 15.0, 600.0  # seconds after a page was closed: its work stops, its clip is removed


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """Serve a page for the browser: drop a video in, see its segments, correct them, download the masks.

    The page always offers clustering of a ViT's tokens, which needs no training.
    Only this machine can open the page, unless you set --host. Ctrl-C stops the server and removes the uploaded clips.

    Examples:
      python -m interpreter.app
      python -m interpreter.app --run runs/clips
      python -m interpreter.app --run runs/first runs/second --port 8080
    """

    run: tuple[Path, ...] = ()
    """Run directories that the page offers, or hub:OWNER/NAME[@REVISION]. The tab Training shows runs during their
    training, which can also start later."""
    host: str = "127.0.0.1"
    """Address to serve on. 0.0.0.0 serves every machine that can reach this one. There is no password."""
    port: int = option(7860, at_least=0)
    """Port to serve on; 0 chooses a free one."""
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("facebook/dinov2-small"))
    """The backbone of cluster, the method that needs no run."""
    folder: Path | None = None
    """Directory in which the server makes a folder for uploaded clips; a clip is removed 10 minutes after its page was
    closed. Default: the directory for temporary files."""
    max_mb: int = option(500, at_least=1)
    """Largest file that can be uploaded, in MB."""
    max_frames: int = option(3000, at_least=1)
    """Longest clip, in frames."""
    max_clips: int = option(8, at_least=1)
    """Clips that are kept at once; each takes memory for the features of its frames."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    options = cli(AppOptions, sys.argv[1:] if arguments is None else arguments, prog=PROG)
    check_ranges(options)
    options = replace(options, run=tuple(map(local_run, options.run)))
    for run in options.run:
        if run.exists() and not run.is_dir():
            raise NotADirectoryError(f"--run {run} is a file; give the directory of a run")
        read_config(run)  # report damaged runs immediately
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f"the page needs more packages ({error}): pip install 'interpreter-slots[app]'") from error
    from interpreter.app.folder import ServerFolder

    listening = _listen(options.host, options.port)
    console = Console(soft_wrap=True, highlight=False)
    with listening, ServerFolder(options.folder) as folder:
        app, sessions = _application(options, folder)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2
        )

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                sessions.ending = True  # the event streams check this and end
                super().handle_exit(sig, frame)

        address = _address(options.host, listening.getsockname()[1])
        console.print(f"Open {address} in a browser. Ctrl-C ends the server.")
        if options.host not in LOCAL:
            console.print("There is no password: everyone who can reach this address can use the page.", style="yellow")
        try:
            Server(config).run(sockets=[listening])
        finally:
            sessions.shut_down()
    return 0


def _application(options: AppOptions, folder: Path) -> tuple["Starlette", "Sessions"]:
    from interpreter.app.server import Limits, make_app
    from interpreter.app.sessions import Sessions
    from interpreter.app.sources import Sources
    from interpreter.app.training import TrainingRun

    sources = Sources(options.run, options.backbone)
    sessions = Sessions(folder, sources, options.max_clips, LEAVE, FORGET)
    local = {id: source.run for id, source in sources.runs.items() if source.run and not pinned_name(source.run)}
    runs = {id: TrainingRun(id, run, folder) for id, run in local.items()}
    # Serve only these names, so that another site cannot reach the server by pointing its own name to this address.
    hosts = [*LOCAL, "[::1]"] if options.host in LOCAL else ["*"]
    return make_app(sessions, runs, Limits(options.max_mb, options.max_frames), hosts), sessions


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError if the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # from now on browsers wait for the server instead of being refused
    except (OSError, OverflowError) as error:
        listening.close()
        why = getattr(error, "strerror", None) or error
        raise OSError(f"cannot serve on {host}, port {port} ({why}); give another --port or --host") from error
    return listening


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    run_command(main, stopped="The server has stopped and removed the uploaded clips.")
