"""The dashboard's addresses: the page, the state by WebSocket and by polling, curves and panels."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from megaforge.dashboard import panels, series
from megaforge.dashboard.access import Access
from megaforge.dashboard.control import Control
from megaforge.dashboard.feed import Feed
from megaforge.errors import UserError

STATIC = Path(__file__).with_name("static")
_Act = Callable[[Mapping[str, Any]], Any]  # what a request asks for -> the answer
_N = TypeVar("_N", int, float)
_MOST_RUNS, _MOST_METRICS = 32, 128  # of one request for curves


def make_app(feed: Feed, token: str, origins: tuple[str, ...] = (), more: tuple[BaseRoute, ...] = ()) -> Starlette:
    """The application.

    Args:
        feed: started and stopped with it.
        origins: see :class:`Access`.
        more: addresses besides, behind the same token.
    """
    bells = Bells()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def changed() -> None:
            loop.call_soon_threadsafe(bells.ring)

        feed.listeners.append(changed)
        await run_in_threadpool(feed.start)
        yield
        await run_in_threadpool(feed.stop)

    routes = [
        Route("/api/state", _answering(feed, _state)),
        Route("/api/series", _answering(feed, _series)),
        Route("/api/run", _answering(feed, _run)),
        Route("/api/audit", _answering(feed, _audit)),
        Route("/api/history", _answering(feed, _history)),
        WebSocketRoute("/ws", _socket(feed, bells)),
        *more,
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    middleware = [Middleware(Access, token=token, origins=origins), Middleware(GZipMiddleware, minimum_size=2000)]
    return Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={UserError: user_error}
    )


def control_routes(control: Control) -> tuple[BaseRoute, ...]:
    """The addresses that start and stop fleets."""
    asked: dict[str, _Act] = {
        "": lambda _: control.offers(),
        "/check": lambda given: control.check(*_choice(given)),
    }
    posted: dict[str, _Act] = {
        "/start": lambda given: control.start(*_choice(given)),
        "/stop": lambda given: control.stop(_text(given, "fleet")),
        "/stop_model": lambda given: control.stop_model(_text(given, "run")),
    }
    return (
        *(Route(f"/api/control{path}", _acting(act)) for path, act in asked.items()),
        *(Route(f"/api/control{path}", _acting(act), methods=["POST"]) for path, act in posted.items()),
    )


def _acting(act: _Act) -> Callable[[Request], Any]:
    """An address that acts on what it was asked: a JSON object where it is posted."""

    async def endpoint(request: Request) -> Response:
        asked: Mapping[str, Any] = request.query_params
        if request.method == "POST":
            # Forms of other sites can post no JSON without asking first; the Origin was checked already.
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                raise UserError("the request: expected Content-Type application/json")
            try:
                asked = await request.json()
            except ValueError as error:
                raise UserError(f"the request: is not JSON ({error})") from None
            if not isinstance(asked, dict):
                raise UserError("the request: expected a JSON object")
        return json_response(await run_in_threadpool(act, asked))

    return endpoint


def _choice(asked: Mapping[str, Any]) -> tuple[str, str, int]:
    """(fleet, mode, workers) of a request."""
    workers = str(asked.get("workers", ""))
    if not workers.isdecimal() or len(workers) > 6:
        raise UserError(f"workers {workers!r:.80}: expected a number")
    return _text(asked, "fleet"), _text(asked, "mode"), int(workers)


def _text(asked: Mapping[str, Any], name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str):
        raise UserError(f"{name}: expected a text")
    return value


async def user_error(_: Request, error: Exception) -> Response:
    """What a user's mistake is answered with."""
    return json_response({"error": str(error)}, 404 if "there is none" in str(error) else 400)


def json_response(value: Any, status: int = 200) -> Response:
    return Response(value if isinstance(value, str) else panels.as_json(value), status, media_type="application/json")


def _answering(feed: Feed, answer: Callable[[Feed, QueryParams], Any]) -> Callable[[Request], Any]:
    """An address whose work, which waits for the feed, is done in a thread."""

    async def endpoint(request: Request) -> Response:
        return json_response(await run_in_threadpool(answer, feed, request.query_params))

    return endpoint


def _state(feed: Feed, asked: QueryParams) -> str:
    return feed.message(_number(asked, "since", 0, int), asked.get("epoch", ""))[1]


def _series(feed: Feed, asked: QueryParams) -> dict[str, Any]:
    runs, metrics = asked.getlist("run"), asked.getlist("metric")
    for name, given, most in (("run", runs, _MOST_RUNS), ("metric", metrics, _MOST_METRICS)):
        if len(given) > most:
            raise UserError(f"{name}: {len(given)} at once; ask for at most {most}")
    view = series.View(
        asked.get("x", "iteration"),
        _number(asked, "points", 800, int),
        _number(asked, "smooth", 0.0, float),
        _number(asked, "low", float("-inf"), float),
        _number(asked, "high", float("inf"), float),
    )
    return feed.curves(runs, metrics, view)


def _run(feed: Feed, asked: QueryParams) -> dict[str, Any]:
    with feed.run(asked.get("run", "")) as run:
        return panels.detail(run)


def _audit(feed: Feed, asked: QueryParams) -> dict[str, str]:
    with feed.run(asked.get("run", "")) as run:
        directory = run.directory
    return panels.audit(directory)


def _history(feed: Feed, asked: QueryParams) -> dict[str, Any]:
    points = feed.history(asked.get("fleet"))
    return {"time": [point[0] for point in points], "share": [point[1] for point in points]}


def _number(asked: QueryParams, name: str, default: _N, kind: Callable[[str], _N]) -> _N:
    text = asked.get(name)
    try:
        return default if text is None else kind(text)
    except ValueError:
        raise UserError(f"{name} {text!r:.80}: expected a number") from None


class Bells:
    """Wakes the sockets; in the event loop's thread."""

    def __init__(self) -> None:
        self._bells: set[asyncio.Event] = set()

    def ring(self) -> None:
        for bell in self._bells:
            bell.set()

    @contextlib.contextmanager
    def one(self) -> Any:
        """A bell for the time of the block."""
        bell = asyncio.Event()
        self._bells.add(bell)
        try:
            yield bell
        finally:
            self._bells.discard(bell)


def _socket(feed: Feed, bells: Bells) -> Callable[[WebSocket], Any]:
    """An address that sends a page what came after what it has, whenever something did. A page that is slow to read
    misses nothing: its next message holds all of it."""

    async def endpoint(socket: WebSocket) -> None:
        given = socket.query_params.get("since", "")
        since = int(given) if given.isdecimal() and len(given) < 20 else 0
        epoch = socket.query_params.get("epoch", "")
        await socket.accept()
        with bells.one() as bell, contextlib.suppress(WebSocketDisconnect):
            gone = asyncio.create_task(_until_gone(socket))
            while not gone.done():
                bell.clear()
                sequence, text = await run_in_threadpool(feed.message, since, epoch)
                if sequence != since or epoch != feed.epoch:
                    await socket.send_text(text)
                since, epoch = sequence, feed.epoch
                rung = asyncio.create_task(bell.wait())
                await asyncio.wait((rung, gone), return_when=asyncio.FIRST_COMPLETED)
                rung.cancel()

    return endpoint


async def _until_gone(socket: WebSocket) -> None:
    """Until the page closes; what it says is not listened to."""
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            await socket.receive_text()
