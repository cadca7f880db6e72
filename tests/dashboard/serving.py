"""A dashboard that runs in threads of the test, and the files that it shows."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from websockets.sync.client import ClientConnection, connect

from megaforge.dashboard.app import make_app
from megaforge.dashboard.feed import Feed
from megaforge.dashboard.serve import listen
from megaforge.monitor.runs_folder import Runs

TOKEN = "a-token-of-the-tests"
HEADER = {"Authorization": f"Bearer {TOKEN}"}


def told(folder: Path, kind: str, iteration: int = 0, time: float = 1.0, **fields: Any) -> None:
    """Appends an event to a run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": time, "kind": kind, "iteration": iteration, "uptime": time, **fields}) + "\n")


def stepped(folder: Path, first: int, last: int, **more: float | None) -> None:
    """Appends the records of steps to a run's metrics; the loss of step i is 1 / i."""
    with (folder / "metrics.jsonl").open("a") as file:
        for i in range(first, last + 1):
            record = {"kind": "step", "iteration": i, "loss": 1 / i, "tokens": 10 * i, "step_seconds": 0.5, **more}
            file.write(json.dumps(record) + "\n")


def a_run(folder: Path, steps: int = 4, train_iters: int = 8) -> Path:
    """A run on another machine that has done ``steps``."""
    told(folder, "start", train_iters=train_iters, host="elsewhere", pid=1, born=1.0, run=folder.name)
    stepped(folder, 1, steps)
    return folder


@dataclass
class Served:
    """A dashboard at ``port``; ``sockets`` of its server can be cut."""

    feed: Feed
    port: int

    def get(self, path: str, headers: dict[str, str] | None = None, method: str = "GET") -> tuple[int, bytes, Any]:
        """(status, body, headers) of an address."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, headers=HEADER if headers is None else headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def json(self, path: str, expected: int = 200) -> Any:
        """The JSON that an address answers with status ``expected``."""
        status, body, _ = self.get(path)
        assert status == expected, (status, body)
        return json.loads(body)

    def socket(self, query: str = "", headers: dict[str, str] | None = None) -> ClientConnection:
        given = HEADER if headers is None else headers
        address, patience = f"ws://127.0.0.1:{self.port}/ws?{query}", {"open_timeout": 300, "ping_timeout": None}
        return connect(address, additional_headers=given, proxy=None, **patience)


@contextlib.contextmanager
def served(
    directory: Path, machine: Callable[[], dict[str, Any] | None] = lambda: None, seconds: float = 0.05, **options: Any
) -> Iterator[Served]:
    """A dashboard of the runs in ``directory``; ``more`` makes further addresses for its feed."""
    feed = Feed(Runs(directory), machine, bool(options.pop("control", False)), seconds)
    listener = listen("127.0.0.1", 0)
    more: Callable[[Feed], Any] = options.pop("more", lambda _: ())
    app = make_app(feed, TOKEN, more=more(feed), **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, ws_ping_timeout=300))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield Served(feed, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def until(condition: Callable[[], Any], seconds: float = 300.0, pause: float = 0.01) -> Any:
    """What ``condition`` gives once that is true; asked for again after ``pause``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(pause)
    return value
