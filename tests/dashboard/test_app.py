"""The dashboard over real sockets: who may see it, what it answers, and that no page misses anything."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from megaforge.dashboard.access import Access
from tests.dashboard.serving import HEADER, TOKEN, Served, a_run, served, stepped, told, until


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("runs")
    a_run(directory / "fleet/a")
    (directory.parent / "secret").mkdir()
    a_run(directory.parent / "secret")
    with served(directory, origins=("https://proxy.example",)) as found:
        yield found


@pytest.mark.parametrize("path", ["/", "/app.js", "/api/state", "/api/series", "/api/run?run=fleet/a", "/nothing"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer \xff\xfe"},
        {"Cookie": f"megaforge={TOKEN}"},  # of another port
        {"Cookie": "megaforge-{port}="},
        {"Cookie": 'megaforge-{port}="\\"; ;;='},
    ],
)
def test_nothing_without_the_token(board: Served, path: str, headers: dict[str, str]) -> None:
    given = {name: value.replace("{port}", str(board.port)) for name, value in headers.items()}
    status, body, sent = board.get(path, given)
    assert status == 401 and b"fleet" not in body and TOKEN.encode() not in body
    assert sent["X-Frame-Options"] == "DENY"


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[tuple[bytes, bytes]]()
    monkeypatch.setattr("secrets.compare_digest", lambda one, other: seen.append((one, other)) or False)
    assert not Access(None, "right")._is_token("wrong")  # type: ignore[arg-type]
    assert seen == [(b"wrong", b"right")]


def test_the_address_becomes_a_cookie(board: Served) -> None:
    status, _, sent = board.get(f"/?token={TOKEN}", {})
    assert status == 303 and sent["Location"] == "/" and sent["Referrer-Policy"] == "no-referrer"
    cookie, *attributes = sent["Set-Cookie"].split("; ")
    assert set(attributes) == {"HttpOnly", "SameSite=Strict", "Path=/"}
    status, body, sent = board.get("/", {"Cookie": f"other=1; {cookie}"})
    assert status == 200 and b"/app.js" in body and "default-src 'self'" in sent["Content-Security-Policy"]
    for wrong in ("/?token=", "/?token=wrong", f"/?token=wrong&token={TOKEN}", "/?token=%ff"):
        status, body, sent = board.get(wrong, {})
        assert status == 401 and "Set-Cookie" not in sent and b"this is not the token" in body, wrong


@pytest.mark.parametrize(
    "origin, status",
    [
        ("http://127.0.0.1:{port}", 200),
        ("https://proxy.example", 200),
        ("http://127.0.0.1", 403),
        ("http://127.0.0.1:{port}.evil.example", 403),
        ("http://evil.example:{port}", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_only_pages_of_ours_may_ask(board: Served, origin: str, status: int) -> None:
    headers = {**HEADER, "Origin": origin.replace("{port}", str(board.port))}
    assert board.get("/api/state", headers)[0] == status
    if status == 200:
        with board.socket(headers=headers) as socket:
            assert json.loads(socket.recv(timeout=300))["full"]
    else:
        with pytest.raises(InvalidStatus) as refused:
            board.socket(headers=headers)
        assert refused.value.response.status_code == 403


def test_a_socket_without_the_token_is_refused(board: Served) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with pytest.raises(InvalidStatus) as refused:
            board.socket(headers=headers)
        assert refused.value.response.status_code == 401


@pytest.mark.parametrize(
    "path, status, word",
    [
        ("/api/run?run=../secret", 404, "there is none of this name"),
        ("/api/run?run=/etc", 404, "there is none"),
        ("/api/run", 404, "there is none"),
        ("/api/audit?run=..%2Fsecret", 404, "there is none"),
        ("/api/history?fleet=none", 404, "there is none"),
        ("/api/state?since=x", 400, "since 'x': expected a number"),
        ("/api/series?points=1e3", 400, "points '1e3': expected a number"),
        ("/api/series?points=0", 400, "points 0: must be"),
        ("/api/series?x=epoch", 400, "x epoch: expected one of"),
        ("/api/series?smooth=nan", 400, "smooth nan"),
        ("/api/series?" + "run=a&" * 40, 400, "run: 40 at once"),
        ("/api/series?" + "metric=a&" * 200, 400, "metric: 200 at once"),
    ],
)
def test_bad_requests(board: Served, path: str, status: int, word: str) -> None:
    assert word in board.json(path, status)["error"]


def test_no_path_leads_out(board: Served) -> None:
    for path in ("/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "//etc/passwd", "/static/../../serve.py"):
        assert board.get(path)[0] == 404, path
    assert board.get("/api/state", method="POST")[0] == 405


def test_panels_and_curves_are_answered(board: Served) -> None:
    assert board.json("/api/run?run=fleet/a")["name"] == "fleet/a"
    assert board.json("/api/audit?run=fleet/a")["state"] == "absent"
    answer = board.json("/api/series?run=fleet/a&metric=loss&x=tokens&low=15&high=35")
    assert [(one["x"], one["count"]) for one in answer["curves"]] == [([20, 30], 2)]
    assert board.json("/api/series?run=../secret&metric=loss")["missing"] == ["../secret"]
    assert board.json("/api/history") == {"time": [], "share": []}


def test_fifty_pages_miss_nothing(tmp_path: Path) -> None:
    """Each cuts its socket now and then, polls, and comes back; all have seen every step and the run's end."""
    run, seen, problems = a_run(tmp_path / "r", steps=1, train_iters=60), [set[int]() for _ in range(50)], list[str]()
    with served(tmp_path) as board:
        ended = threading.Event()

        def page(index: int) -> None:
            since, epoch = 0, ""

            def take(message: dict[str, Any]) -> None:
                nonlocal since, epoch
                if message["since"] > since:
                    problems.append(f"page {index}: a gap after {since}")
                since, epoch = message["sequence"], message["epoch"]
                seen[index].update(row["iteration"] for row in message["runs"])

            while not (ended.is_set() and 60 in seen[index]):
                try:
                    with board.socket(f"since={since}&epoch={epoch}") as socket:
                        for _ in range(2 + index % 5):
                            take(json.loads(socket.recv(timeout=5)))
                except (TimeoutError, ConnectionClosed):
                    pass
                take(board.json(f"/api/state?since={since}&epoch={epoch}"))

        pages = [threading.Thread(target=page, args=(index,)) for index in range(50)]
        for one in pages:
            one.start()
        for step in range(2, 61):
            stepped(run, step, step)
        ended.set()
        for one in pages:
            one.join(timeout=600)
        assert not any(one.is_alive() for one in pages) and problems == []
        assert all(60 in found for found in seen)


def test_a_run_deleted_while_it_is_watched(tmp_path: Path) -> None:
    run = a_run(tmp_path / "r")
    with served(tmp_path) as board, board.socket() as socket:
        first = json.loads(socket.recv(timeout=300))
        assert [row["name"] for row in first["runs"]] == ["r"]
        with (run / "events.jsonl").open("a") as file:
            file.write('{"time": 2.0, "kind": "progr')  # a line that is being written
        stepped(run, 5, 5)
        assert [row["iteration"] for row in json.loads(socket.recv(timeout=300))["runs"]] == [5]
        shutil.rmtree(run)
        while not (message := json.loads(socket.recv(timeout=300)))["removed"]:
            pass
        assert message["removed"] == ["r"]
        assert "there is none" in board.json("/api/run?run=r", 404)["error"]
        told(a_run(tmp_path / "r", steps=2), "progress", 2)  # and another of its name
        until(lambda: [row["iteration"] for row in board.json("/api/state")["runs"]] == [2])
