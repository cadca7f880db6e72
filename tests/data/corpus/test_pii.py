"""Personal data of every kind in ten formats and more, and what only looks like it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megaforge.data.corpus.records import make_records
from megaforge.data.corpus.stage import Scope
from megaforge.data.corpus.stages.pii import PiiSettings

EMAILS = (
    "jane@example.org",
    "jane.doe+news@mail.example.co.uk",
    "JANE_DOE@EXAMPLE.COM",
    "<jane@example.org>",
    "mailto:jane@example.org",
    "j@x.io",
    "jane-doe99@sub.sub2.example.museum",
    "jane%40example.org",
    "jane [at] example [dot] org",
    "jane(at)example.org",
    "o_o@example-site.net,",
)
PHONES = (
    "+1 415-555-2671",
    "(415) 555-2671",
    "415-555-2671",
    "415.555.2671",
    "+44 20 7946 0958",
    "+49 (30) 901820-42",
    "0049 30 901820",
    "1-800-555-0199",
    "+14155552671",
    "415 555 2671",
    "Tel: 030 901820",
    "tel:+1-415-555-2671",
)
SSNS = (
    "123-45-6789",
    "123 45 6789",
    "(123-45-6789)",
    "SSN: 123456789",
    "SSN 123-45-6789",
    "ssn:123-45-6789",
    "social security number 123456789",
    "Social Security No. 123-45-6789",
    "'123-45-6789'",
    "078-05-1120.",
)
IPS = (
    "8.8.8.8",
    "http://8.8.4.4/x",
    "93.184.216.34:8080",
    "(93.184.216.34)",
    "93.184.216.0/24",
    "from 93.184.216.34.",
    "http://93.184.216.34/index.html",
    "93.184.216.34 - - [10/Oct/2000:13:55:36]",
    "host=93.184.216.34",
    "2606:2800:220:1:248:1893:25c8:1946",
    "2606:4700::1111",
    "[2606:4700::1111]:443",
    "::ffff:93.184.216.34",
    "2001:4860:4860::8888%eth0",
)
NONE_OF_IT = (
    "version 3.2.1.4 of it",
    "v1.2.3.4",
    "versions 3.1.2.1, 3.1.2.2 and 3.1.2.3",
    "Chrome/91.0.44.124 Safari/53.7.36.1",
    "python3-foo 2.7.1.3-1ubuntu2 and libfoo-1.2.3.4.tar.gz and foo_1.2.3.4_amd64.deb",
    "requires bar >= 1.2.3.4 or baz==8.4.1.2, since 1.2.3.4",
    "Release: 4.3.2.1",
    "127.0.0.1 and 192.168.1.1 and 10.0.0.7 and 0.0.0.0",
    "section 1.2.3.4.5",
    "999.999.999.999",
    "std::vector and abc::def and fe80::1",
    "2024-01-02 and 12:34:56 and 2024-01-02T12:34:56",
    "ISBN 978-3-16-148410-0",
    "000-12-3456 and 666-12-3456 and 912-34-5678 and 123-00-4567 and 123-45-0000",
    "1234567890 and 3.14159265358979 and 0x1234567890",
    "user@localhost and @decorator and a @ b and x@y",
    "+35236450.6 and [`0084260448`] and 0093840044",
    "f(100) 200 and a[0] = 1000 - 2000",
    "0000:00:1f.2 and deadbeef-1234-5678-9abc-def012345678",
    "1 000 000 and 12,345,678 and 100-200-300",
    "a..b@example..org",
)


def replaced(texts: tuple[str, ...] | list[str], **settings: tuple[str, ...]) -> tuple[list[str], dict[str, int]]:
    outcome = PiiSettings(**settings).open(Scope(Path("."))).apply(make_records(texts))
    assert outcome.reasons is None
    return outcome.records["text"].to_pylist(), dict(outcome.counts)


@pytest.mark.parametrize(
    ("name", "tag", "texts"),
    [("email", "<EMAIL>", EMAILS), ("phone", "<PHONE>", PHONES), ("ssn", "<SSN>", SSNS), ("ip", "<IP>", IPS)],
)
def test_every_format_is_found_alone_within_words_and_twice(name: str, tag: str, texts: tuple[str, ...]) -> None:
    wrong = []
    for text in texts:
        within = [text, f"Call or write: {text} today.", f"first {text}\nthen {text}", f"Straße «{text}» 漢字"]
        got, counts = replaced(within)
        if [one.count(tag) for one in got] != [1, 1, 2, 1] or counts != {name: 5}:
            wrong.append((text, got, counts))
    assert not wrong


def test_what_only_looks_like_it_stays() -> None:
    got, counts = replaced(NONE_OF_IT)
    assert got == list(NONE_OF_IT) and not counts


def test_chosen_kinds_rewrites_and_neighbours() -> None:
    text = "a@b.org,c@d.org;8.8.8.8 9.9.9.9 123-45-6789"
    assert replaced([text], kinds=("email",))[0] == ["<EMAIL>,<EMAIL>;8.8.8.8 9.9.9.9 123-45-6789"]
    got, counts = replaced([text, "", "nothing"])
    assert got == ["<EMAIL>,<EMAIL>;<IP> <IP> <SSN>", "", "nothing"]
    assert counts == {"email": 2, "ip": 2, "ssn": 1}
    outcome = PiiSettings().open(Scope(Path("."))).apply(make_records([text, "nothing"]))
    assert outcome.rewrites == ["2 email, 1 ssn, 2 ip", None]


def test_lines_among_others_of_any_bytes() -> None:
    """The same as line by line, whatever lines stand between, in texts that are and are not ASCII."""
    source, kinds = random.Random(6), ("phone", "ssn", "ip")
    numbers = (PHONES[0], SSNS[0], f"\u00fc {IPS[0]} {SSNS[1]}", *PHONES[3:5])
    lines = ["", "漢字 \U0001f600", "plain", " ", "caf\u00e9 1.2.3", *numbers]
    texts = ["\n".join(source.choices(lines, k=source.randint(1, 12))) for _ in range(60)]
    got, counts = replaced(texts, kinds=kinds)
    single = [[replaced([line], kinds=kinds) for line in text.split("\n")] for text in texts]
    assert got == ["\n".join(one[0][0] for one in text) for text in single]
    assert sum(counts.values()) == sum(sum(one[1].values()) for text in single for one in text) > 50
    assert replaced(texts[3:9], kinds=kinds)[0] == got[3:9]
