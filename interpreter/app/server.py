"""The web server of the page: its addresses and their answers.

Files come only from three places: the folder of the page, the folder of the requesting tab, and pictures of the runs
that the command names. No address contains a path.
"""

import asyncio
import contextlib
import gzip
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import interpreter
from interpreter.app.clip import Clip, check_name, safe_name
from interpreter.app.pane import Edit
from interpreter.app.session import Gone, Session, number
from interpreter.app.sessions import Sessions
from interpreter.app.training import TrainingRun
from interpreter.app.web import KEEP, Guard, body_of, field_of, kept, no_address, number_of, problem
from interpreter.app.work import explain

PAGE = Path(__file__).parent / "page"
LOOK, REMIND = 0.1, 15.0  # seconds between checks of the state, and between keep-alive messages


class Limits(NamedTuple):
    """Limits of uploads."""

    megabytes: int  # of a file
    frames: int  # of a clip


class Pages:
    """The answers to all requests.

    Args:
        sessions: the tabs.
        runs: training runs by id.
        limits: of uploads.
    """

    def __init__(self, sessions: Sessions, runs: Mapping[str, TrainingRun], limits: Limits) -> None:
        self.sessions, self.runs, self.limits = sessions, runs, limits
        self._drawing = threading.Lock()
        self._pictures = CapacityLimiter(8)  # so that requests for pictures do not use all threads

    async def page(self, request: Request) -> Response:
        """The page itself."""
        return FileResponse(PAGE / "index.html")

    async def open(self, request: Request) -> Response:
        """Open a tab."""
        return await self._about(self.sessions.open(), HTTPStatus.CREATED)

    async def about(self, request: Request) -> Response:
        """The data that a tab needs at its start."""
        return await self._about(self._session(request))

    async def _about(self, session: Session, status: int = HTTPStatus.OK) -> Response:
        sources = await to_thread.run_sync(
            lambda: [source.describe() for source in self.sessions.shared.sources.usable()]
        )
        content = {
            "token": session.token,
            "sources": sources,
            "limits": self.limits._asdict(),
            "version": interpreter.__version__,
        }
        return JSONResponse(content, status)

    async def events(self, request: Request) -> Response:
        """Send the state of a tab after each change, while the tab is open."""
        session = self._session(request)

        async def states() -> AsyncIterator[str]:
            session.connections += 1
            last, silent = "", 0.0
            try:
                yield "retry: 1000\n\n"  # milliseconds until the browser reconnects
                while not (session.closed or self.sessions.ending):
                    state = json.dumps(await to_thread.run_sync(session.state))
                    if state != last:
                        last, silent = state, 0.0
                        yield f"data: {state}\n\n"
                    elif silent >= REMIND:
                        silent = 0.0
                        yield ": still here\n\n"
                    await asyncio.sleep(LOOK)
                    silent += LOOK
            finally:
                session.disconnect()

        return StreamingResponse(states(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def upload(self, request: Request) -> Response:
        """Receive a clip: the body is the file."""
        session, name = self._session(request), safe_name(request.query_params.get("name", "clip"))
        check_name(name)
        most = self.limits.megabytes * 10**6
        too_large = problem(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"{name}: larger than the {self.limits.megabytes} MB that this server accepts; cut the clip, or start the "
            "server with a larger --max-mb",
        )
        if int(request.headers.get("Content-Length", 0)) > most:
            return too_large
        with self.sessions.place_for(session), session.uploading() as folder:
            path, size = folder / name, 0
            with path.open("wb") as file:
                async for chunk in request.stream():
                    if (size := size + len(chunk)) > most:
                        return too_large
                    await to_thread.run_sync(file.write, chunk)

            def check() -> None:
                if session.closed:
                    raise Gone("this page was closed")

            clip = await to_thread.run_sync(Clip, number(), path, self.limits.frames, check)
            await to_thread.run_sync(session.use, clip)
        return JSONResponse({"clip": clip.describe()})

    async def remove(self, request: Request) -> Response:
        """Remove the clip."""
        await to_thread.run_sync(self._session(request).remove_clip)
        return JSONResponse({})

    async def close(self, request: Request) -> Response:
        """Close a tab."""
        await to_thread.run_sync(self.sessions.close, self._session(request))
        return JSONResponse({})

    async def segment(self, request: Request) -> Response:
        """Segment the clip."""
        session, body = self._session(request), await body_of(request)
        settings = field_of(body, "settings", dict)
        source = self.sessions.shared.sources[field_of(body, "source", str)]
        await to_thread.run_sync(session.segment, source, settings)
        return JSONResponse({}, HTTPStatus.ACCEPTED)

    async def compare(self, request: Request) -> Response:
        """Segment the clip with two sources."""
        session, body = self._session(request), await body_of(request)
        left, right = (self.sessions.shared.sources[field_of(body, side, str)] for side in ("left", "right"))
        await to_thread.run_sync(session.compare, left, right)
        return JSONResponse({}, HTTPStatus.ACCEPTED)

    async def cancel(self, request: Request) -> Response:
        """Stop the task."""
        await to_thread.run_sync(self._session(request).cancel)
        return JSONResponse({})

    async def edit(self, request: Request) -> Response:
        """Correct segments."""
        session, body = self._session(request), await body_of(request)
        ids = field_of(body, "segments", list) if "segments" in body else []
        if not all(type(id) is int for id in ids):
            raise ValueError("segments: must be a list of numbers")
        name = field_of(body, "name", str) if "name" in body else ""
        frame = field_of(body, "frame", int) if "frame" in body else 0
        await to_thread.run_sync(session.edit, Edit(field_of(body, "kind", str), ids, name, frame))
        return JSONResponse({"pane": session.require_pane("main").describe()})

    async def make_download(self, request: Request) -> Response:
        """Write a file of the segments."""
        session, body = self._session(request), await body_of(request)
        opacity = body.get("opacity", 0.5)
        if isinstance(opacity, bool) or not isinstance(opacity, int | float) or not 0 <= opacity <= 1:
            raise ValueError("opacity: must be a number between 0 and 1")
        await to_thread.run_sync(session.download, field_of(body, "format", str), float(opacity))
        return JSONResponse({}, HTTPStatus.ACCEPTED)

    async def download(self, request: Request) -> Response:
        """A file that was written."""
        about = self._session(request).downloads.get(request.path_params["format"])
        if about is None:
            raise Gone("this file does not exist, or the segments have changed; download it again")
        return FileResponse(about["path"], filename=about["name"])

    async def frame(self, request: Request) -> Response:
        """A frame of the clip as JPEG."""
        clip = self._session(request).require_clip()
        content = await to_thread.run_sync(clip.jpeg, number_of(request), limiter=self._pictures)
        return Response(content, media_type="image/jpeg", headers=kept(request, "clip", clip.id))

    async def labels(self, request: Request) -> Response:
        """The segments of a frame, one byte for each pixel."""
        session, pane = self._session(request), request.path_params["pane"]
        version, content = await to_thread.run_sync(session.labels, pane, number_of(request), limiter=self._pictures)
        headers = dict(kept(request, "version", version))
        if "gzip" in request.headers.get("Accept-Encoding", ""):  # compressed to a hundredth of the size
            content = await to_thread.run_sync(gzip.compress, content, 1)
            headers["Content-Encoding"] = "gzip"
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def list_runs(self, request: Request) -> Response:
        """The runs that the command names."""
        return JSONResponse(await to_thread.run_sync(lambda: [run.describe() for run in self.runs.values()]))

    async def training(self, request: Request) -> Response:
        """The progress of a run."""
        return JSONResponse(await to_thread.run_sync(self._run(request).show))

    async def curves(self, request: Request) -> Response:
        """The curves of a run."""
        run = self._run(request)

        def draw() -> bytes:
            with self._drawing:
                return run.curves().read_bytes()

        return Response(await to_thread.run_sync(draw), media_type="image/png", headers=KEEP)

    async def picture(self, request: Request) -> Response:
        """A picture of masks of a run."""
        return FileResponse(self._run(request).picture(request.path_params["name"]), headers=KEEP)

    def _session(self, request: Request) -> Session:
        return self.sessions.find(request.path_params["token"])

    def _run(self, request: Request) -> TrainingRun:
        run = self.runs.get(request.path_params["run"])
        if run is None:
            raise Gone("there is no such run here; reload the page")
        return run

    def routes(self) -> list[Route | Mount]:
        """All addresses."""
        tab = "/api/s/{token}"

        def route(path: str, answer: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
            return Route(path, answered(self, answer), methods=[method])

        return [
            route("/", self.page),
            Mount("/page", StaticFiles(directory=PAGE)),
            route("/api/sessions", self.open, "POST"),
            route(tab, self.about),
            route(tab, self.close, "DELETE"),
            route(f"{tab}/events", self.events),
            route(f"{tab}/clip", self.upload, "PUT"),
            route(f"{tab}/clip", self.remove, "DELETE"),
            route(f"{tab}/segment", self.segment, "POST"),
            route(f"{tab}/compare", self.compare, "POST"),
            route(f"{tab}/cancel", self.cancel, "POST"),
            route(f"{tab}/edit", self.edit, "POST"),
            route(f"{tab}/download", self.make_download, "POST"),
            route(f"{tab}/download/{{format}}", self.download),
            route(f"{tab}/frames/{{number}}", self.frame),
            route(f"{tab}/labels/{{pane}}/{{number}}", self.labels),
            route("/api/runs", self.list_runs),
            route("/api/runs/{run}/training", self.training),
            route("/api/runs/{run}/curves.png", self.curves),
            route("/api/runs/{run}/pictures/{name}", self.picture),
        ]


def answered(
    pages: Pages, answer: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """An answer whose errors are one line of JSON."""

    async def checked(request: Request) -> Response:
        try:
            return await answer(request)
        except ClientDisconnect:
            return Response(status_code=HTTPStatus.BAD_REQUEST)  # the client has disconnected
        except (Gone, FileNotFoundError, IndexError) as error:
            return problem(HTTPStatus.NOT_FOUND, _line(error))
        except Exception as error:
            ours = not isinstance(error, (ValueError, OSError))
            status = HTTPStatus.INTERNAL_SERVER_ERROR if ours else HTTPStatus.UNPROCESSABLE_ENTITY
            return problem(status, _line(error))

    def _line(error: Exception) -> str:
        return pages.sessions.shared.shortened(explain(error))

    return checked


def make_app(sessions: Sessions, runs: Mapping[str, TrainingRun], limits: Limits, hosts: list[str]) -> Starlette:
    """The application.

    Args:
        sessions: the tabs.
        runs: training runs by id.
        limits: of uploads.
        hosts: host names that requests may use, so that another site cannot reach the server under its own name.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async def tidy() -> None:
            while True:
                await asyncio.sleep(1)
                await to_thread.run_sync(sessions.tidy)

        tidying = asyncio.create_task(tidy())
        yield
        tidying.cancel()

    middleware = [
        Middleware(Guard),
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
    ]
    routes = Pages(sessions, runs, limits).routes()
    answers = {HTTPException: no_address}
    return Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=answers)
