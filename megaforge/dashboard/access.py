"""Who may see the dashboard: those with its token, from pages of its own."""

from __future__ import annotations

import secrets
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_VARIABLE = "MEGAFORGE_DASHBOARD_TOKEN"
_SIGN_IN = b"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<title>MegaForge runs</title><form><p>%s</p><label>Token <input name="token" type="password" autofocus></label>
<button>Open</button></form></html>"""
_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Access:
    """ASGI middleware that lets nothing through without the token, in a cookie or ``Authorization: Bearer``, nor what
    another site's page asks for.

    ``/?token=TOKEN`` becomes a cookie that scripts cannot read and other sites' requests do not carry, and the address
    loses the token.
    """

    def __init__(self, app: ASGIApp, token: str, origins: tuple[str, ...] = ()) -> None:
        """``origins``: of pages that are ours besides those at the address that a browser asked, such as a proxy's."""
        self._app, self._token, self._origins = app, token, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not self._is_ours(headers):
            await _refuse(scope, send, 403, "this Origin is not the dashboard's")
        elif scope["type"] == "http" and scope["path"] == "/" and b"token=" in scope["query_string"]:
            await self._sign_in(scope, send, headers)
        elif not self._is_known(headers):
            await _refuse(scope, send, 401, "the token is missing or wrong: open the address that was printed")
        else:
            await self._app(scope, receive, _with_headers(send))

    def _is_ours(self, headers: Mapping[bytes, str]) -> bool:
        """A browser says from which page a request comes; other programs, which need the token as well, do not."""
        origin = headers.get(b"origin")
        if origin is None or origin in self._origins:
            return True
        return urlsplit(origin).netloc.lower() == headers.get(b"host", "").lower() != ""

    def _is_known(self, headers: Mapping[bytes, str]) -> bool:
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._is_token(given.strip())
        try:
            cookie = SimpleCookie(headers.get(b"cookie", "")).get(_cookie_of(headers))
        except CookieError:
            return False
        return cookie is not None and self._is_token(cookie.value)

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(errors="surrogateescape"), self._token.encode())

    async def _sign_in(self, scope: Scope, send: Send, headers: Mapping[bytes, str]) -> None:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if not self._is_token(given):
            await _refuse(scope, send, 401, "this is not the token")
            return
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{_cookie_of(headers)}={self._token}; HttpOnly; SameSite=Strict; Path=/{secure}"
        await _answer(send, 303, b"", [(b"location", b"/"), (b"set-cookie", cookie.encode())])


def _cookie_of(headers: Mapping[bytes, str]) -> str:
    """Its name: browsers keep one set of cookies for all ports of a host."""
    port = headers.get(b"host", "").rpartition(":")[2]
    return f"megaforge-{port}" if port.isdigit() else "megaforge"


async def _refuse(scope: Scope, send: Send, status: int, why: str) -> None:
    if scope["type"] == "websocket":
        extensions = scope.get("extensions") or {}
        if "websocket.http.response" in extensions:
            head = {"type": "websocket.http.response.start", "status": status, "headers": [*_HEADERS]}
            await send(head)
            await send({"type": "websocket.http.response.body", "body": why.encode()})
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": why})
    elif scope["path"] == "/":
        await _answer(send, status, _SIGN_IN % why.encode(), [(b"content-type", b"text/html; charset=utf-8")])
    else:
        body = b'{"error": "%s"}' % why.encode()
        await _answer(send, status, body, [(b"content-type", b"application/json")])


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    whole = [*headers, *_HEADERS, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": whole})
    await send({"type": "http.response.body", "body": body})


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(pair for pair in _HEADERS if pair[0] not in own)]
        await send(message)

    return sent
