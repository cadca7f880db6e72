"""Duplicates by address, caps of hosts: each address in one form, without a network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from megaforge.data.corpus.addresses import Domains, canonical, host_of
from megaforge.data.corpus.records import make_records
from megaforge.data.corpus.stage import Scope, join_all
from megaforge.data.corpus.stages.host_cap import HostCapSettings
from megaforge.data.corpus.stages.url import UrlSettings

pytest.importorskip("tldextract", reason="needs the corpus extra")

SAME = (
    "https://www.Example.org/a/b/?utm_source=x&b=2&a=1#part",
    "http://example.org/a/b?a=1&b=2",
    "https://example.org:443/a/b/?b=2&a=1&fbclid=zz",
    "//example.org/a/b?a=1&b=2",
    "example.org/a/b?a=1&b=2 ",
)


def reasons(settings: Any, urls: list[str | None], parts: int = 1, **columns: Any) -> list[str | None]:
    size = -(-len(urls) // parts)
    tables = [
        make_records(
            [f"t{row}" for row in range(begin, min(begin + size, len(urls)))],
            id=range(begin, min(begin + size, len(urls))),
            url=urls[begin : begin + size],
            **{name: values[begin : begin + size] for name, values in columns.items()},
        )
        for begin in range(0, len(urls), size)
    ]
    return [one for outcome in join_all(settings.open(Scope(Path("."))), tables) for one in outcome.reasons or ()]


def test_one_form_of_an_address() -> None:
    assert {canonical(url) for url in SAME} == {"example.org/a/b?a=1&b=2"}
    others = (
        "https://example.org/a/B?a=1&b=2",
        "https://example.org/a/b?a=1",
        "https://example.org:8080/a/b?a=1&b=2",
        "https://news.example.org/a/b?a=1&b=2",
    )
    assert len({canonical(url) for url in (*SAME, *others)}) == 1 + len(others)
    assert canonical("http://[broken") == "http://[broken" and canonical("http://a:b/c") == "http://a:b/c"
    assert (
        canonical("") == "" and host_of("http://[broken") == "" and host_of("HTTPS://User@Host.Org:1/x") == "host.org"
    )


def test_the_first_the_best_or_the_newest_of_an_address_stays() -> None:
    urls = [*SAME, "https://other.org/", None, None]
    for parts in (1, 3):
        found = reasons(UrlSettings(), urls, parts)
        assert found == [None, *["the address of another document (of 0-0)"] * 4, None, None, None]
    quality = [0.5, 0.5, 0.9, 0.9, None, None, None, None]
    assert [one is None for one in reasons(UrlSettings(), urls, 2, quality=quality)] == [
        False,
        False,
        True,
        False,
        False,
        True,
        True,
        True,
    ]
    dates = ["2020-01-01", "2024-05-01", None, "2023-01-01", "2024-05-01", None, None, None]
    kept = reasons(UrlSettings(keep="newest"), urls, 2, date=dates, quality=quality)
    assert [row for row, one in enumerate(kept) if one is None] == [1, 5, 6, 7]
    assert reasons(UrlSettings(), [None, None]) == [None, None]


def test_caps_by_registered_domain_or_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    domains = Domains("a test")
    hosts = ("news.bbc.co.uk", "bbc.co.uk", "a.github.io", "localhost", "8.8.8.8", "x.unknown-suffix-zz")
    assert [domains.of(host) for host in hosts] == [
        "bbc.co.uk",
        "bbc.co.uk",
        "a.github.io",
        "localhost",
        "8.8.8.8",
        "x.unknown-suffix-zz",
    ]
    urls = [
        "http://a.x.org/1",
        "http://b.x.org/2",
        "http://a.x.org/3",
        None,
        "http://y.org/1",
        "http://x.org/4",
        "http://y.org/2",
    ]
    quality = [0.1, 0.5, 0.5, 0.0, None, 0.9, None]
    for parts in (1, 3):
        found = reasons(HostCapSettings(most=2), urls, parts, quality=quality)
        assert [row for row, one in enumerate(found) if one] == [0, 2]
        assert found[0] == "beyond the cap of its host (x.org)"
    assert [
        row for row, one in enumerate(reasons(HostCapSettings(most=1, by="host"), urls, quality=quality)) if one
    ] == [0, 6]
