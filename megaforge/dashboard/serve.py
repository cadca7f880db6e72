"""Runs the dashboard until it is interrupted."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import secrets
import socket
import sys
from pathlib import Path

from megaforge.dashboard.access import TOKEN_VARIABLE
from megaforge.errors import UserError, require
from megaforge.monitor.runs_folder import DEPTH, Runs

_SHORTEST_TOKEN = 16


def token_from(given: str | None) -> str:
    """The token that the environment names, or a new one.

    Raises:
        UserError: it is short enough to be guessed, or cannot stand in a cookie.
    """
    if given is None:
        return secrets.token_urlsafe(24)
    if not re.fullmatch(rf"[A-Za-z0-9_-]{{{_SHORTEST_TOKEN},}}", given):
        raise UserError(
            f"{TOKEN_VARIABLE}: must be at least {_SHORTEST_TOKEN} letters, digits, - or _; make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return given


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: the port is taken or not ours, or there is no such host here.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
        return listener
    except socket.gaierror as error:
        raise UserError(f"--host {host}: {error.strerror}; 127.0.0.1 is this machine alone") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: in use; give another, or 0 for any free one") from error
        if error.errno == errno.EACCES:
            raise UserError(f"--port {port}: needs rights that you lack; give one from 1024 on") from error
        raise UserError(f"--host {host}: cannot listen there ({error.strerror}); try 127.0.0.1") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    directory: Path,
    host: str,
    port: int,
    *,
    seconds: float,
    depth: int = DEPTH,
    origins: tuple[str, ...] = (),
    fleets: tuple[Path, ...] = (),
) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Args:
        fleets: files of fleets that the page may start; none: it changes nothing.

    Raises:
        UserError: a package is missing, the folder is, the port is taken, or a fleet's file is not one.
    """
    uvicorn = require("uvicorn", extra="dashboard", purpose="tools/dashboard.py")
    for module in ("starlette", "websockets"):
        require(module, extra="dashboard", purpose="tools/dashboard.py")
    from megaforge.dashboard.app import control_routes, make_app
    from megaforge.dashboard.control import Control
    from megaforge.dashboard.feed import Feed
    from megaforge.dashboard.machine import MachineMeter

    if not directory.is_dir():
        raise UserError(f"--runs {directory}: is not a directory; name one that holds runs' --save directories")
    token = token_from(os.environ.get(TOKEN_VARIABLE))
    feed = Feed(Runs(directory, depth), MachineMeter(directory), control=bool(fleets), seconds=seconds)
    routes = control_routes(Control(fleets, directory, feed)) if fleets else ()
    listener = listen(host, port)
    if not is_loopback(host):
        print(
            f"warning: --host {host}: other machines reach this, and the token travels unencrypted; "
            "ssh -L is safer, or a proxy with TLS",
            file=sys.stderr,
        )
    at = f"[{host}]" if ":" in host else host
    print(f"runs below {directory}: http://{at}:{listener.getsockname()[1]}/?token={token}")
    print("Ctrl-C ends it", flush=True)
    app = make_app(feed, token, origins, routes)
    options = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    uvicorn.Server(options).run(sockets=[listener])
