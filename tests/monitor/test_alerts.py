"""Alerts: the book that keeps them, what is found in numbers, and who is told."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from megaforge.config.alert_config import AlertConfig
from megaforge.config.cli import parse_config
from megaforge.config.config import Config
from megaforge.errors import UserError
from megaforge.monitor import alert_channels
from megaforge.monitor.alert_channels import Command, EventChannel, Webhook, as_json, receivers_of
from megaforge.monitor.alert_kinds import CLEAR_AFTER, COLLAPSED_STEPS, SLOW_STEPS, WARM_UP, StepAlert
from megaforge.monitor.alerts import Alert, AlertBook, Finding
from megaforge.monitor.events import EventLog, read_events
from megaforge.registry import ALERTS
from tests.held import is_alive, time_begins_with, until

ALERT = Alert("nan", "firing", "critical", "the loss is nan", "tiny", "h1", since=1.0, time=2.0, value=math.nan)


class Ear:
    """A channel that remembers."""

    def __init__(self) -> None:
        self.heard: list[Alert] = []

    def tell(self, alert: Alert) -> None:
        self.heard.append(alert)

    def close(self, seconds: float) -> None:
        """Nothing is left."""

    def brief(self) -> list[tuple[str, float, int, bool]]:
        return [(alert.state, alert.time, alert.times, alert.again) for alert in self.heard]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_book(repeat: float = 60.0) -> tuple[AlertBook, Ear, Clock]:
    ear, clock = Ear(), Clock()
    return AlertBook([ear], "tiny", "h1", repeat=repeat, severities=lambda name: "warning", clock=clock), ear, clock


BAD, FINE = Finding(True, "bad"), Finding(False, "fine")


def test_what_lasts_is_told_again_only_after_a_while_and_then_resolved() -> None:
    book, ear, clock = make_book()
    for clock.now in range(0, 150, 10):
        book.enter("disk", BAD)
        assert book.firing == {"disk": "bad"}
    clock.now = 150
    book.enter("disk", FINE)
    book.enter("disk", FINE)
    book.close()
    assert ear.brief() == [
        ("firing", 0, 1, False),
        ("firing", 60, 1, True),
        ("firing", 120, 1, True),
        ("resolved", 150, 1, False),
    ]
    assert ear.heard[-1].since == 0 and "after 2 min" in ear.heard[-1].line() and not book.firing


def test_what_comes_and_goes_is_counted_and_told_at_most_once_in_a_while() -> None:
    book, ear, clock = make_book()
    for clock.now in range(60):
        book.enter("disk", BAD if clock.now % 2 == 0 else FINE)
    assert ear.brief() == [("firing", 0, 1, False), ("resolved", 1, 1, False)]
    clock.now = 60
    book.enter("disk", BAD)
    assert ear.brief()[2:] == [("firing", 60, 30, False)] and "30 times since it was last told" in ear.heard[-1].line()
    clock.now = 61
    book.enter("disk", FINE)
    clock.now = 62
    book.enter("disk", BAD)
    assert len(ear.heard) == 4, "too soon"
    book.close()
    book.close()
    assert ear.brief()[4:] == [("firing", 62, 1, False)], "what was not told is told at the end, once"


def test_a_fault_that_goes_on_beyond_the_pause_is_told_then() -> None:
    book, ear, clock = make_book()
    for clock.now, finding in ((0, BAD), (1, FINE), (2, BAD), (59, BAD), (61, BAD), (62, BAD)):
        book.enter("disk", finding)
    assert ear.brief() == [("firing", 0, 1, False), ("resolved", 1, 1, False), ("firing", 61, 1, False)]
    assert ear.heard[-1].since == 2


def test_a_clock_that_is_set_back_silences_nothing() -> None:
    book, ear, clock = make_book()
    for clock.now, finding in ((1000, BAD), (1001, FINE), (5, BAD)):
        book.enter("disk", finding)
    assert [alert.state for alert in ear.heard] == ["firing", "resolved", "firing"]


def test_a_new_process_goes_on_with_what_fired(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    first, _, _ = make_book()
    first._channels = [EventChannel(log)]
    first.enter("disk", BAD)
    first.enter("nan", BAD)
    first.enter("nan", FINE)
    told = read_events(tmp_path / "events.jsonl").events
    assert [(event["alert"], event["state"]) for event in told] == [
        ("disk", "firing"),
        ("nan", "firing"),
        ("nan", "resolved"),
    ]
    book, ear, clock = make_book()
    book.restore([*told, {"kind": "alert", "time": 1.0}, {"kind": "start", "time": 1.0}])
    assert book.firing == {"disk": "bad"}
    clock.now = told[0]["time"] + 1
    book.enter("disk", BAD)
    assert ear.heard == [], "it was told a second ago"
    book.enter("disk", FINE)
    assert [alert.state for alert in ear.heard] == ["resolved"]


def config_of(*flags: str) -> Config:
    line = ["--config", "cdrmix-test", "--data-path", "d", "--vocab-size", "64", *flags]
    return parse_config(line, prog="test").config


def judged(name: str, records: list[dict[str, float]], *flags: str) -> list[tuple[int, bool]]:
    """Where an alert begins and ends over ``records``, by the index of the record."""
    rule = ALERTS.get(name).of_steps(config_of("--alert-window", "16", *flags))
    alert, bad, changes = StepAlert(rule), False, []
    for index, record in enumerate(records):
        found = alert.judge(index, record)
        if found is not None and found.bad != bad:
            bad = found.bad
            changes.append((index, bad))
    return changes


def losses(*values: float) -> list[dict[str, float]]:
    return [{"loss": value, "grad_norm": 1.0, "tokens_per_second": 1.0} for value in values]


def test_nan() -> None:
    steps = losses(2.0, math.nan, *[2.0] * 9, math.inf, *[2.0] * CLEAR_AFTER)
    assert judged("nan", steps) == [(1, True), (21, False)], "ten good steps in a row end it"
    overflow = {"loss": 2.0, "grad_norm": math.inf}
    assert judged("nan", [overflow]) == [(0, True)]
    assert judged("nan", [overflow | {"loss_scale": 2.0**16}]) == []


def test_loss_spike() -> None:
    noise = [2.0 + 0.01 * (-1) ** k for k in range(16)]
    assert judged("loss_spike", losses(*noise, 2.15, *noise)) == [], "less than a tenth above the median"
    assert judged("loss_spike", losses(*noise, 2.3, *noise)) == [(16, True), (26, False)]
    assert judged("loss_spike", losses(*noise, 0.1, math.nan, *noise)) == [], "lower, and what nan tells"
    assert judged("loss_spike", losses(*noise[:3], 9.0)) == [], "a quarter of the window tells what is usual"
    level = judged("loss_spike", losses(*noise, *[3.0] * 40))
    assert [bad for _, bad in level] == [True, False], "a level that stays becomes the usual one"


def speeds(*values: float) -> list[dict[str, float]]:
    return [{"tokens_per_second": value} for value in values]


def test_throughput() -> None:
    usual = [100.0] * (WARM_UP + SLOW_STEPS + 16)
    assert judged("throughput", speeds(1.0, *usual[1:], *[81.0] * 40)) == []
    dip = judged("throughput", speeds(*usual, 10.0, 10.0, 10.0, *usual))
    assert dip == [], "single slow steps are not the throughput"
    slow = judged("throughput", speeds(*usual, *[79.0] * 40, *usual))
    first, last = len(usual), len(usual) + 40
    assert [bad for _, bad in slow] == [True, False], "it lasts while the steps are slow, however long"
    assert first < slow[0][0] <= first + SLOW_STEPS and last < slow[1][0] <= last + SLOW_STEPS
    assert judged("throughput", speeds(*usual, *[79.0] * 20), "--alert-throughput-share", "0.5") == []


def test_memory_and_disk() -> None:
    full = [{"memory_share": 0.5, "host_memory_share": share, "disk_share": 1 - share} for share in (0.9, 0.91, 0.05)]
    steps: list[dict[str, float]] = [full[0], {}, full[1], {}, full[2]]
    assert judged("memory", steps) == [(2, True), (4, False)], "at the limit it is not above it"
    assert judged("disk", steps) == [(4, True)]
    assert judged("memory", [{"memory_share": 0.95, "host_memory_share": 0.1}]) == [(0, True)]
    assert judged("disk", steps, "--alert-disk-share", "0.96") == []


def test_expert_collapse() -> None:
    """cdrmix-test has 4 experts, 2 a token: two of four are 50 %, all alike 100 %, and the limit 62.5 %."""

    def used(*values: float) -> list[dict[str, float]]:
        return [{"experts_used": value} for value in values]

    assert judged("expert_collapse", used(*[0.63] * 30)) == []
    assert judged("expert_collapse", used(*[0.62] * (COLLAPSED_STEPS - 1), 1.0, *[0.62] * 9)) == []
    assert judged("expert_collapse", used(*[0.5] * 30, *[1.0] * 30)) == [(COLLAPSED_STEPS - 1, True), (39, False)]
    assert ALERTS.get("expert_collapse").of_steps(config_of("--ffn", "dense")) is None


def test_every_kind_has_a_meaning() -> None:
    for name in ALERTS.names():
        assert ALERTS.get(name).meaning and ALERTS.get(name).severity in ("critical", "warning")


class Hook:
    """A server that answers with ``statuses``, then with 200."""

    def __init__(self, *statuses: int) -> None:
        self.bodies: list[dict[str, Any]] = []
        hook, left = self, list(statuses)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = left.pop(0) if left else 200
                if status == 200:
                    hook.bodies.append(json.loads(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/secret"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(alert_channels, "FIRST_PAUSE", 0.01)
    yield


def test_a_webhook_gets_json_and_is_tried_again_while_it_is_busy() -> None:
    hook = Hook(503, 429)
    webhook = Webhook(hook.address)
    webhook.tell(ALERT)
    webhook.close(300.0)
    hook.close()
    [body] = hook.bodies
    assert body == json.loads(as_json(ALERT))
    assert body["value"] is None and body["message"] == "the loss is nan", "JSON holds no nan"
    assert body["text"] == "run tiny on h1: ALERT nan (critical): the loss is nan"


def test_what_a_webhook_refuses_is_said_without_its_address(caplog: pytest.LogCaptureFixture) -> None:
    hook = Hook(404)
    webhook = Webhook(hook.address)
    webhook.tell(ALERT)
    webhook.close(300.0)
    hook.close()
    nobody = Webhook(hook.address)
    nobody.tell(ALERT)
    nobody.close(300.0)
    assert hook.bodies == []
    refused, gone = caplog.messages
    assert "127.0.0.1 answers 404" in refused and "after 4 attempts" in gone and "refused" in gone
    assert "secret" not in caplog.text and "the loss is nan" in refused


def test_a_receiver_that_is_too_slow_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alert_channels, "WAITING", 2)
    held = threading.Event()
    webhook = Webhook("http://127.0.0.1:1/")
    monkeypatch.setattr(webhook, "deliver", lambda alert: held.wait(300.0))
    for _ in range(5):
        webhook.tell(ALERT)
    webhook.close(0.05)
    held.set()
    assert "1 alerts are lost" in caplog.text and "did not arrive in 0 seconds" in caplog.text


def test_a_command_gets_the_alert(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    out = tmp_path / "out"
    code = "import os, sys; said = [sys.stdin.read(), os.environ['MEGAFORGE_ALERT_STATE'], str('RANK' in os.environ)]"
    code += f"; open({str(out)!r}, 'w').write(''.join(said))"
    command = Command([sys.executable, "-c", code])
    command.tell(ALERT)
    command.close(300.0)
    line, rest = out.read_text().split("\n")
    assert json.loads(line)["alert"] == "nan" and rest == "firingFalse"
    failing = Command(["sh", "-c", "echo no such pager >&2; exit 3"])
    failing.tell(ALERT)
    failing.close(300.0)
    assert "ends with status 3: no such pager" in caplog.text


def test_a_command_that_does_not_end_is_ended_with_its_children(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alert_channels, "COMMAND_SECONDS", 0.3)
    time_begins_with(tmp_path / "pid", monkeypatch)
    command = Command(["sh", "-c", f"cd {tmp_path}; sleep 600 & echo $! >new; mv new pid; wait"])
    command.tell(ALERT)
    command.close(300.0)
    assert "sh was ended after 0 seconds" in caplog.text
    until(lambda: not is_alive(int((tmp_path / "pid").read_text())))  # its child ends too


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--alert-webhook", "hooks.example.com/secret"), "--alert-webhook: its value is not an address"),
        (("--alert-webhook", "ftp://x/secret"), "give one such as https://"),
        (("--alert-webhook", "http://x:99999999/secret"), "not an address"),
        (("--alert-webhook", "http://x/ secret"), "not an address"),
        (("--alert-command", "'"), "--alert-command ': No closing quotation"),
        (("--alert-command", " "), "it names no program"),
        (("--alerts-off", "nann"), "did you mean nan?"),
        (("--alert-memory-share", "90"), "must be above 0 and at most 1"),
    ],
)
def test_bad_flags(flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match="alert") as raised:
        config_of(*flags)
    assert words in str(raised.value) and "secret" not in str(raised.value)


def test_what_the_machine_lacks_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--alert-command nobody-has-this -v: there is no program 'nobody-has-this'"):
        receivers_of(AlertConfig(alert_command="nobody-has-this -v"))
    from_variable = AlertConfig(alert_webhook="env:HOOK_OF_MINE")
    with pytest.raises(UserError, match="the variable 'HOOK_OF_MINE' is not set"):
        receivers_of(from_variable)
    monkeypatch.setenv("HOOK_OF_MINE", "nonsense")
    with pytest.raises(UserError, match="--alert-webhook env:HOOK_OF_MINE: its value is not an address"):
        receivers_of(from_variable)
    monkeypatch.setenv("HOOK_OF_MINE", "http://127.0.0.1:1/x")
    assert len(receivers_of(from_variable)) == 1
