"""Who is told of alerts: the console, the run's events, an address of the web, a program.

The last two are told by a thread of their own, so that the run waits for neither. Each channel tries, says once in the
log what it could not deliver, and never ends the run.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from http.client import HTTPException
from urllib.parse import urlsplit

from megaforge.config.alert_config import AlertConfig
from megaforge.monitor.alerts import EVENT, Alert, Channel
from megaforge.monitor.events import EventLog, finite

logger = logging.getLogger(__name__)

WAITING = 64  # alerts that a slow receiver may be behind; further ones are lost, and counted
ATTEMPTS = 4
FIRST_PAUSE = 1.0  # seconds before the second attempt; then twice as long each time
POST_SECONDS, COMMAND_SECONDS = 10.0, 60.0  # an attempt's
_RETRIED = (408, 425, 429, 500, 502, 503, 504)


def as_json(alert: Alert) -> str:
    """What webhooks and programs get: the fields of :class:`Alert`, and ``message``, the same in words. ``text`` too
    is in words, whole: chat services show a field of that name."""
    told = finite(asdict(alert))
    return json.dumps({**told, "message": alert.text, "text": alert.line()}, allow_nan=False)


class Console:
    """Warnings in the run's log, and so on standard error and in ``--log-file``."""

    def tell(self, alert: Alert) -> None:
        logger.log(logging.WARNING if alert.state == "firing" else logging.INFO, "%s", alert.line())

    def close(self, seconds: float) -> None:
        """Nothing is left."""


class EventChannel:
    """Events of the kind ``alert`` in ``events``."""

    def __init__(self, events: EventLog) -> None:
        self._events = events

    def tell(self, alert: Alert) -> None:
        self._events.tell(EVENT, **alert.fields())

    def close(self, seconds: float) -> None:
        """Nothing is left."""


class Background:
    """A channel whose alerts are delivered one after another by a thread; subclasses say how."""

    name = ""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Alert] = queue.Queue(WAITING)
        self._lost, self._thread = 0, threading.Thread(target=self._work, name=f"alerts: {self.name}", daemon=True)
        self._closing = threading.Event()
        self._thread.start()

    def deliver(self, alert: Alert) -> None:
        """
        Raises:
            OSError: it did not arrive.
        """
        raise NotImplementedError

    def tell(self, alert: Alert) -> None:
        try:
            self._waiting.put_nowait(alert)
        except queue.Full:
            self._lost += 1
            logger.warning("%s: %d alerts are lost, as it is too slow: %s", self.name, self._lost, alert.line())

    def close(self, seconds: float) -> None:
        self._closing.set()  # no pauses any more between attempts
        until = time.monotonic() + seconds
        while self._waiting.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.02)
        if left := self._waiting.unfinished_tasks:
            logger.warning("%s: %d alerts did not arrive in %.0f seconds", self.name, left, seconds)

    def _work(self) -> None:
        while True:
            alert = self._waiting.get()
            try:
                self.deliver(alert)
            except Exception as error:  # a receiver's fault is not the run's
                logger.warning("%s: an alert did not arrive (%s): %s", self.name, error, alert.line())
            finally:
                self._waiting.task_done()


class Webhook(Background):
    """Posts each alert as JSON. What is busy or broken is tried :data:`ATTEMPTS` times."""

    name = "--alert-webhook"

    def __init__(self, address: str) -> None:
        self._address, self._host = address, urlsplit(address).hostname
        super().__init__()

    def deliver(self, alert: Alert) -> None:
        pause = FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._post(as_json(alert).encode())
                return
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _RETRIED or attempt == ATTEMPTS:
                    raise OSError(f"{self._host} answers {error.code} {error.reason}") from None
            except (OSError, HTTPException) as error:
                if attempt == ATTEMPTS:
                    reason = getattr(error, "reason", error)  # neither shows the address
                    raise OSError(f"{self._host} after {attempt} attempts: {reason}") from None
            if not self._closing.wait(pause):
                pause *= 2

    def _post(self, body: bytes) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "megaforge"}
        request = urllib.request.Request(self._address, body, headers, method="POST")
        with urllib.request.urlopen(request, timeout=POST_SECONDS) as answer:
            answer.read(1024)


class Command(Background):
    """Starts a program for each alert: its standard input is the JSON, its environment has ``MEGAFORGE_ALERT`` (the
    kind), ``_STATE``, ``_SEVERITY``, ``_RUN`` and ``_TEXT``. One that takes longer than :data:`COMMAND_SECONDS` is
    ended, with all that it has started."""

    name = "--alert-command"

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        super().__init__()

    def deliver(self, alert: Alert) -> None:
        told = {"": alert.alert, "_STATE": alert.state, "_SEVERITY": alert.severity, "_RUN": alert.run}
        told["_TEXT"] = alert.text
        program = subprocess.Popen(
            self._words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_without_ranks(os.environ) | {f"MEGAFORGE_ALERT{name}": text for name, text in told.items()},
            start_new_session=True,
        )
        try:
            _, said = program.communicate(as_json(alert).encode() + b"\n", timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            program.communicate()
            raise OSError(f"{self._words[0]} was ended after {COMMAND_SECONDS:.0f} seconds") from None
        if program.returncode:
            last = said.decode(errors="backslashreplace").strip().rpartition("\n")[2][:200]
            raise OSError(f"{self._words[0]} ends with status {program.returncode}" + (f": {last}" if last else ""))


def _without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what makes a program of ours one more rank of this run."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in environment.items() if name not in ours}


def receivers_of(flags: AlertConfig) -> list[Channel]:
    """Those elsewhere that ``flags`` name.

    Raises:
        UserError: one cannot be reached: a variable that is not set, a program that is not there.
    """
    found = list[Channel]()
    address, words = flags.webhook_address(), flags.command()
    if address is not None:
        found.append(Webhook(address))
    if words is not None:
        found.append(Command(words))
    return found
