"""A real browser, where there is one: Chromium, driven by Playwright; ``run_scripts/browser.sh`` installs both."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

INSTALL = "bash run_scripts/browser.sh"
_SHARED_MEMORY, _ROOM = "/dev/shm", 1 << 30
NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser_path() -> str:
    """The browser's program; skips the test where there is none."""
    pytest.importorskip("playwright.sync_api", reason=f"playwright is not installed: {INSTALL}")
    for name in (os.environ.get("MEGAFORGE_BROWSER", ""), *NAMES):
        if name and (found := shutil.which(name)):
            return found
    pytest.skip(f"no browser was found ({', '.join(NAMES)}, MEGAFORGE_BROWSER): {INSTALL}")


class Watched:
    """A page, with all that it was told and all that it complained of.

    Attributes:
        problems: errors of its console and its scripts.
        messages: of the state, in the order in which they came, each with how it came.
        cut: while True, its sockets are closed and no other opens.
    """

    def __init__(self, page: Any) -> None:
        self.page, self.cut = page, False
        self.problems: list[str] = []
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self._sockets: list[Any] = []
        page.on("console", lambda said: said.type == "error" and self.problems.append(said.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("response", self._polled)
        page.route_web_socket("**/ws?*", self._opened)

    def _polled(self, answer: Any) -> None:
        if "/api/state" in answer.url and answer.status == 200:
            with contextlib.suppress(Exception):  # the page was closed meanwhile
                self.messages.append(("polling", answer.json()))

    def _opened(self, socket: Any) -> None:
        if self.cut:
            socket.close()
            return
        server = socket.connect_to_server()
        self._sockets.append((socket, server))

        def pass_on(text: str) -> None:
            self.messages.append(("socket", json.loads(text)))
            socket.send(text)

        server.on_message(pass_on)

    def cut_sockets(self) -> None:
        """As a network does that loses them."""
        self.cut = True
        for socket, server in self._sockets:
            socket.close()
            server.close()
        self._sockets.clear()

    def gaps(self) -> list[str]:
        """Messages that do not follow from what the page had by then."""
        have, found = 0, []
        for way, message in self.messages:
            if not message["full"] and message["since"] > have:
                found.append(f"{way}: {message['since']} follows {have}")
            have = max(have, message["sequence"])
        return found


def _options() -> dict[str, Any]:
    """Containers have no user namespaces for its sandbox; the page is ours.

    Playwright has it keep its pictures in files below the temporary directory, as some containers have little room in
    /dev/shm; where that is a disk, letting go of one can hold up a frame for a second.
    """
    roomy = os.path.isdir(_SHARED_MEMORY) and shutil.disk_usage(_SHARED_MEMORY).free > _ROOM
    return {
        "args": ["--no-sandbox"],
        "ignore_default_args": ["--disable-dev-shm-usage"] if roomy else None,
    }


@contextlib.contextmanager
def browser_page(width: int = 1280, height: int = 900) -> Iterator[Watched]:
    """A page of a browser of its own."""
    path = browser_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, **_options())
        try:
            page = browser.new_context(viewport={"width": width, "height": height}).new_page()
            page.set_default_timeout(300_000)
            yield Watched(page)
        finally:
            browser.close()
