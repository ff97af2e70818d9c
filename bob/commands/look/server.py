"""What `bob look` answers: the report's files, and the API that the report asks.

Whoever may ask has the token of the URL that was printed, in a cookie. The checks of Host and
Origin keep other sites that are open in the same browser from asking in its name.
"""

import json
import secrets
from threading import Lock
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bob.commands.look.pages import INDEX, read_served
from bob.commands.look.review import Changes, Review
from bob.errors import BobError, tell

MIB = 1024**2
PHOTO, DECISIONS = 50 * MIB, 32 * MIB  # of a request's body, at most
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

T = TypeVar("T")


def application(review: Review, token: str, port: int) -> Starlette:
    """The app that serves the project in the current folder at `port` of this machine."""
    api = Api(review)
    return Starlette(
        routes=[
            Route("/", lambda _: RedirectResponse(f"/{INDEX.as_posix()}"), methods=["GET"]),
            Route("/api/state", api.state, methods=["GET"]),
            Route("/api/image/{recipe}", api.image, methods=["GET"]),
            Route("/api/cost", api.cost, methods=["POST"]),
            Route("/api/save", api.save, methods=["POST"]),
            Route("/api/try", api.photo, methods=["POST"]),
            Route("/{path:path}", api.file, methods=["GET"]),
        ],
        middleware=[Middleware(Gate, token=token, port=port)],
        exception_handlers={
            HTTPException: lambda _, error: _error(error.status_code, error.detail),
            BobError: lambda _, error: _error(400, str(error)),
        },
    )


def _error(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": " ".join(text.split())}, status)


class Api:
    """The handlers. What they do takes its time in threads, so that none waits for another."""

    def __init__(self, review: Review) -> None:
        self._review = review
        self._planning, self._loading = Lock(), Lock()
        self._trial: Any = None

    async def state(self, request: Request) -> Response:
        """What is decided; the page asks this to learn that it is served."""
        return JSONResponse(await run_in_threadpool(self._review.state))

    async def image(self, request: Request) -> Response:
        """A generated image of the item cache."""
        content = await run_in_threadpool(self._review.image, request.path_params["recipe"])
        if content is None:
            raise HTTPException(404, "this image is not in the item cache")
        return Response(content, media_type="image/png")

    async def cost(self, request: Request) -> Response:
        """What decisions cost; nothing is written."""
        changes = await _changes(request)
        return JSONResponse({"lines": await run_in_threadpool(self._cost, changes)})

    async def save(self, request: Request) -> Response:
        """Write decisions."""
        changes = await _changes(request)
        files = await run_in_threadpool(self._review.save, changes)
        state = await run_in_threadpool(self._review.state)
        return JSONResponse({"files": [path.as_posix() for path in files], "state": state})

    async def photo(self, request: Request) -> Response:
        """What the exported classifier says of a photo."""
        content = await _body(request, PHOTO)
        return JSONResponse(await run_in_threadpool(self._try, content))

    async def file(self, request: Request) -> Response:
        """One of the report's files or images."""
        path = request.path_params["path"]
        found = await run_in_threadpool(read_served, path, [self._review.objects])
        if found is None:
            raise HTTPException(404, "there is no such file here")
        return Response(found[0], media_type=found[1])

    def _cost(self, changes: Changes) -> list[str]:
        verdicts = self._review.verdicts_of(changes)
        with self._planning:  # DVC's repository is not made for several threads
            from bob.commands.look.costs import cost  # late: torch

            return cost(changes, verdicts)

    def _try(self, content: bytes) -> dict[str, Any]:
        with self._loading:
            from bob.commands.look.trying import Trial  # late: torch

            self._trial = self._trial or Trial()
        answer: dict[str, Any] = self._trial.photo(content)
        return answer


async def _changes(request: Request) -> Changes:
    try:
        body = json.loads(await _body(request, DECISIONS))
    except ValueError as error:
        raise BobError(f"the request is not JSON ({error})") from None
    return await run_in_threadpool(Changes.of, body)


async def _body(request: Request, most: int) -> bytes:
    """The body, which is not read further than it may be long."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, f"more than {most // MIB} MiB")
        parts.append(part)
    return b"".join(parts)


class Gate:
    """Lets those in who have the token and come from this machine's own pages."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token
        self._cookie = f"bob-look-{port}"  # a cookie is for all ports of its host
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self._origins = {f"http://{host}" for host in self._hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or turn it away."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refusal(HTTPConnection(scope))
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] += [
                    (name.lower().encode(), value.encode()) for name, value in HEADERS.items()
                ]
            await send(message)

        try:
            await (refused or self._app)(scope, receive, sending)
        except ClientDisconnect:
            pass
        except Exception as error:  # one line, and the next request is answered
            where = f"{scope['method']} {scope['path']}"
            tell(f"bob look: {where}: {type(error).__name__}: {error}")
            if not begun:
                text = f"bob look failed ({type(error).__name__}: {error})"
                await _error(500, text)(scope, receive, sending)

    def _refusal(self, asked: HTTPConnection) -> Response | None:
        """None where the request may pass; a redirect where it brings the token."""
        host = asked.headers.get("host", "")
        if host not in self._hosts:
            return _error(403, "Host is another; open the URL that bob look printed")
        if asked.scope["method"] not in ("GET", "HEAD") and not self._is_ours(asked.headers):
            return _error(403, "the request comes from another site")
        given = asked.query_params.get("token")
        if not self._is_token(given or asked.cookies.get(self._cookie, "")):
            return _error(403, "no valid token; open the URL that bob look printed")
        if given is None or asked.scope["path"] != "/":
            return None
        answer = RedirectResponse(f"/{INDEX.as_posix()}")  # so that no address has the token
        answer.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
        return answer

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())

    def _is_ours(self, headers: Headers) -> bool:
        """Of a request that may change something: browsers say where it comes from."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is None and site is None:
            return False
        return (origin is None or origin in self._origins) and site in (None, "same-origin")
