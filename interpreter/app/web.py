"""HTTP helpers: access, reading requests, caching of answers, and errors as one line of JSON."""

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_JSON = 1 << 20  # bytes of a request that is not an upload
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
KEEP = {"Cache-Control": "private, max-age=3600"}  # for frames and label maps, whose addresses contain their version


class Guard:
    """Adds headers that keep other sites out. Refuses changing requests that do not come from the page.

    A page of another site can send a request to this server, but not with this header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                added = [(key.lower().encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in names)]
            await send(message)

        request, answer = Request(scope), self.app
        if request.method not in ("GET", "HEAD") and request.headers.get("X-Interpreter") != "1":
            answer = problem(HTTPStatus.FORBIDDEN, "this request does not come from the page")
        await answer(scope, receive, with_headers)


def kept(request: Request, name: str, value: int) -> Mapping[str, str]:
    """Headers that let a browser cache an answer, unless the address names an older version of it."""
    return KEEP if request.query_params.get(name) == str(value) else {}


async def no_address(request: Request, error: Exception) -> Response:
    """The answer to a request with an unknown address."""
    assert isinstance(error, HTTPException)
    return problem(error.status_code, f"{request.method} {request.url.path}: {error.detail}")


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises ValueError if there is none."""
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_JSON:
            raise ValueError("the request is too large")
    try:
        body = json.loads(content)
        json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("the request is nested too deeply") from None
    except UnicodeEncodeError:  # an unpaired surrogate
        raise ValueError("the request contains text that is not Unicode") from None
    if not isinstance(body, dict):
        raise ValueError("the request must be a JSON object")
    return body


def field_of(body: Mapping[str, Any], name: str, kind: type) -> Any:
    """An entry of a request. Raises ValueError if it is missing or has the wrong type."""
    if not isinstance(body.get(name), kind):
        raise ValueError(f"{name}: is missing, or not of the type {kind.__name__}")
    return body[name]


def number_of(request: Request) -> int:
    """The number of the requested frame. Raises IndexError if it is not the number of a frame."""
    text = request.path_params["number"]
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise IndexError("there is no such frame")
    return int(text)


def problem(status: int, text: str) -> JSONResponse:
    """An error, as one line of JSON."""
    return JSONResponse({"error": text}, status)
