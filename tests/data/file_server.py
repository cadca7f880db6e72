"""A server of files for tests, which breaks connections at any byte."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Gives ``files`` by name, and in each answer as many bytes as ``cuts`` says before it breaks the connection.

    Attributes:
        ranges: whether it knows ``Range``; refuses_head: whether it gives what it does not describe.
        types: what it calls the content of files, by name.
        sent: bytes of all answers.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.cuts, self.ranges, self.sent, self.tag = files, list[int](), True, 0, "one"
        self.refuses_head, self.types = False, dict[str, str]()
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_HEAD(self) -> None:
        self.send_error(403) if self.server.refuses_head else self._answer(0)

    def do_GET(self) -> None:
        content = self.server.files.get(self.path.lstrip("/"))
        first, given = 0, self.headers.get("Range")
        if content is not None and given and self.server.ranges and self.headers.get("If-Range") == self.server.tag:
            first = int(given.removeprefix("bytes=").rstrip("-"))
        if content is not None and first >= len(content):
            self.send_error(416)
            return
        self._answer(first)
        if content is not None:
            part = content[first:]
            part = part[: self.server.cuts.pop(0)] if self.server.cuts else part
            self.server.sent += len(part)
            self.wfile.write(part)
            self.close_connection = True

    def _answer(self, first: int) -> None:
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", self.server.tag)
        if (kind := self.server.types.get(self.path.lstrip("/"))) is not None:
            self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        return


@contextmanager
def serving() -> Iterator[Server]:
    """A server that answers until the block ends."""
    with Server({}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
