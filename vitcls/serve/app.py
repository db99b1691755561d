"""The routes over HTTP: who may ask, what is read, what is said, and in which status."""

import asyncio
import hmac
import importlib.resources
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitcls.core.errors import RunError
from vitcls.serve import bodies, openapi
from vitcls.serve.limits import Refused, is_loopback
from vitcls.serve.service import Service

_logger = logging.getLogger("vitcls")
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
}
_OPEN = {*_PAGE, "/healthz", "/readyz"}  # without a token: nothing of the model or of anybody is there
_EXPLANATION = 120.0  # seconds
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


def make_app(service: Service, *, token: str = "", loopback: bool = True) -> ASGIApp:
    """The application; whoever asks must bear the `token`, if any. `loopback`: it has names of this machine alone."""

    app = FastAPI(title="vitcls", docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_page(app)
    _add_state(app, service)
    _add_work(app, service)
    for kind, status in _STATUSES.items():
        app.add_exception_handler(kind, _said_of(status))
    app.add_exception_handler(404, lambda request, error: _error(404, "there is nothing here; see /docs"))
    app.add_exception_handler(405, lambda request, error: _error(405, "this route has another method; see /docs"))
    return _Guard(app, service, token, loopback)


def _said_of(status: int):
    """What is said of an error; never more than one line that was written for the user."""

    async def say(request: Request, error: Exception) -> Response:
        if isinstance(error, Refused):
            return _error(error.status, error.message, error.headers)
        if isinstance(error, RunError):  # says where the database is, which is for the log alone
            _logger.warning("%s", error)
        return _error(status, _WORDS[status], {"Retry-After": "5"} if status == 503 else None)

    return say


_STATUSES = {Refused: 400, TimeoutError: 504, ClientDisconnect: 499, RunError: 503, Exception: 500}
_WORDS = {
    499: "",  # nobody reads it
    500: "something is broken here; the log tells more",
    503: "something that this needs is out of reach; try again soon",
    504: "there was no answer in time",
}


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)


def _add_page(app: FastAPI) -> None:
    folder = importlib.resources.files("vitcls.serve") / "page"
    for path, (name, kind) in _PAGE.items():
        response = Response((folder / name).read_bytes(), media_type=kind)
        app.add_api_route(path, lambda response=response: response, include_in_schema=False, response_model=None)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", responses=openapi.answer("alive"))
    async def healthz() -> Response:
        """200 while the process is alive."""
        return JSONResponse({"alive": True})

    @app.get("/readyz", responses=openapi.answer("ready", 503))
    async def readyz() -> Response:
        """200 when the model is compiled, 503 before and while the server ends."""
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        service.gauges.drift(service.drift_values())
        return Response(service.gauges.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/model", responses=openapi.answer("model"))
    async def model() -> Response:
        """What is served."""
        return JSONResponse(service.about())

    @app.get("/v1/feedback", responses=openapi.answer("learned"))
    async def learned() -> Response:
        """What users have said so far, in numbers."""
        return JSONResponse(await service.learned())

    @app.get("/v1/drift", responses=openapi.answer("drift"))
    async def drift() -> Response:
        """How the images of late differ from those of the training."""
        return JSONResponse(service.drift())


def _add_work(app: FastAPI, service: Service) -> None:
    limits = service.limits

    async def predict(request: Request) -> Response:
        """The most probable classes of each image, with an id; and since when this model is served, as of /v1/model."""
        async with asyncio.timeout(limits.seconds):
            uploads = (await bodies.read(request, limits)).uploads
            if not uploads:
                raise Refused(400, "there is no image in the request: send a form, image/* or JSON; see /docs")
            predictions = await _unless_gone(request, service.predict(uploads))
        status = 422 if all("error" in one for one in predictions) else 200
        return JSONResponse({"predictions": predictions, "since": service.since}, status)

    app.router.add_api_route(
        "/v1/predict",
        predict,
        methods=["POST"],
        openapi_extra=openapi.IMAGES,
        responses=openapi.answer("predict", 422),
        route_class_override=_Plain,
    )

    @app.post("/v1/feedback", openapi_extra=openapi.FEEDBACK, responses=openapi.answer("feedback"))
    async def feedback(request: Request) -> Response:
        """Says of an answer that it is right, or what it should have been."""
        async with asyncio.timeout(limits.seconds):
            body = await bodies.read(request, limits)
            return JSONResponse(await service.feedback(body, request.client.host if request.client else ""))

    @app.post("/v1/explain", openapi_extra=openapi.IMAGE, responses=openapi.answer("explain"))
    async def explain(request: Request, method: str = "", label: str = "") -> Response:
        """Where the model looks in an image, and whether that is true."""
        async with asyncio.timeout(_EXPLANATION):
            uploads = (await bodies.read(request, limits)).uploads
            if len(uploads) != 1:
                raise Refused(400, "an explanation is of one image")
            return JSONResponse(await service.explain(uploads[0], method, label))


class _Plain(APIRoute):
    """One whose arguments FastAPI does not look for, which takes a third of an answer's time."""

    def get_route_handler(self) -> Callable:
        return self.endpoint


async def _unless_gone(request: Request, work: Coroutine) -> Any:
    """The result of `work`; it is cancelled, and ClientDisconnect raised, when nobody waits for it any more."""
    me, left = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        me.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if left and me.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


class _Guard:
    """Lets nobody in who may not, counts, and puts the headers on all that goes out."""

    def __init__(self, app: FastAPI, service: Service, token: str, loopback: bool):
        self._app, self._service, self._token, self._loopback = app, service, token, loopback
        self._routes = {route.path for route in app.routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        since, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_RAW_HEADERS]
            await send(message)

        headers = dict(scope["headers"])
        refused = self._refused(scope, headers)
        try:
            await (self._app if refused is None else refused)(scope, receive, sending)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._service.gauges.request(route, status, since)

    def _refused(self, scope: Scope, headers: dict[bytes, bytes]) -> Response | None:
        """Why a request is not let in: a page of another site that acts for a user, a wrong name, no token."""
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._loopback and not is_loopback(name.strip("[]")):
            return _error(403, "this server answers by the names of its own machine alone, as 127.0.0.1")
        foreign = b"origin" in headers and headers[b"origin"].decode("latin-1").partition("://")[2] != host  # or 'null'
        site = headers.get(b"sec-fetch-site", b"none")
        if scope["method"] == "POST" and (foreign or site not in (b"none", b"same-origin")):
            return _error(403, "pages of other sites may not ask")
        if self._token and scope["path"] not in _OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._token.encode()):
                words = "this is not the token" if given else "a token is asked for: Authorization: Bearer TOKEN"
                return _error(401, words, {"WWW-Authenticate": "Bearer"})
        return None


_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
