"""The audit trail: every way to tamper with it, found and named."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaforge.errors import UserError
from megaforge.monitor import audit, events
from megaforge.monitor.audit import AUDIT_FILE, AuditTrail, BrokenTrailError, Signer, read_trail, set_aside

KEY = Signer(bytes(range(32)))
Lines = list[bytes]


def written(directory: Path, records: int = 8, signer: Signer | None = None) -> Path:
    path = directory / AUDIT_FILE
    trail = AuditTrail(path, signer)
    for number in range(records):
        trail.append("save", step=number, path=f"step_{number}", value=float("inf"))
    return path


def forged(line: bytes, **changes: Any) -> bytes:
    """A record with other content and the hash that belongs to it."""
    record = {**json.loads(line), **changes}
    record["hash"] = audit._hash(record)
    return audit._encoded(record)


def test_a_trail_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = written(tmp_path, 2)
    first = read_trail(path)
    AuditTrail(path).append("end", reason="done")
    trail = read_trail(path)
    assert trail.name == first.name and trail.hashes[:3] == first.hashes
    assert [record["kind"] for record in trail.records] == ["begin", "save", "save", "end"]
    assert trail.records[1]["value"] is None and trail.records[1]["step"] == 0
    assert trail.head == {"trail": trail.name, "records": 4, "hash": trail.records[3]["hash"]}


TAMPERED: dict[str, tuple[Callable[[Lines], Lines], str]] = {
    "an edit": (lambda r: [*r[:3], r[3].replace(b'"step":2', b'"step":9'), *r[4:]], r"line 4 \(save\): .* altered"),
    "a blank": (lambda r: [*r[:3], r[3].replace(b":2", b": 2"), *r[4:]], r"line 4 \(save\): .* altered"),
    "an edit with its hash": (lambda r: [*r[:3], forged(r[3], step=9), *r[4:]], r"line 5 \(save\) does not follow"),
    "a deletion": (lambda r: [*r[:3], *r[4:]], r"line 4 \(save\) is record 4, expected 3"),
    "a deletion of the beginning": (lambda r: r[1:], r"line 1 \(save\) is record 1, expected 0"),
    "another order": (lambda r: [*r[:3], r[4], r[3], *r[5:]], r"line 4 \(save\) is record 4, expected 3"),
    "a repeated record": (lambda r: [*r[:3], r[2], *r[3:]], r"line 4 \(save\) is record 2, expected 3"),
    "an insertion": (lambda r: [*r[:3], forged(r[3], step=9), *r[3:]], r"line 5 \(save\) is record 3, expected 4"),
    "no JSON": (lambda r: [*r[:3], b"\xff{", *r[3:]], "line 4 is not JSON"),
    "no record": (lambda r: [*r[:3], b"[1]", *r[3:]], "line 4 is not a record"),
    "an empty line": (lambda r: [*r[:3], b"", *r[3:]], "line 4 is not JSON"),
    "another first record": (lambda r: [forged(r[0], kind="start"), *r[1:]], "a trail begins with its name"),
    "nothing": (lambda r: [], "holds no record"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_was_tampered_with_is_found(tmp_path: Path, name: str) -> None:
    tamper, problem = TAMPERED[name]
    path = written(tmp_path)
    lines = tamper(path.read_bytes().splitlines())
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    content = path.read_bytes()
    with pytest.raises(BrokenTrailError, match=problem):
        read_trail(path)
    with pytest.raises(UserError, match=r"--audit-trail: .*set-aside"):
        AuditTrail(path)
    assert path.read_bytes() == content, "what is refused is left as it is"


def test_any_changed_byte_is_found(tmp_path: Path) -> None:
    path = written(tmp_path, 3, KEY)
    AuditTrail(path, KEY).sign()
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(BrokenTrailError):
            read_trail(path, KEY.public)


def test_signatures_cover_what_was_written(tmp_path: Path) -> None:
    path = written(tmp_path, 205, KEY)
    trail = read_trail(path, KEY.public)
    signed = [record["number"] for record in trail.records if record["kind"] == "signature"]
    assert signed == [101, 202] and trail.signed == 202 and trail.keys == [KEY.public]
    again = AuditTrail(path, KEY)
    again.heard({"kind": "progress", "iteration": 1, "uptime": 1.0, "time": 1.0})
    again.heard({"kind": "goodput", "iteration": 1, "uptime": 1.0, "time": 1.0, "hash": "its own"})
    again.sign()
    trail = read_trail(path, KEY.public)
    assert [record["kind"] for record in trail.records[-2:]] == ["goodput", "signature"]
    assert trail.records[-2]["hash_"] == "its own" and trail.signed == len(trail.records) - 1
    other = Signer(bytes(32))
    with pytest.raises(BrokenTrailError, match="signed by another key"):
        read_trail(path, other.public)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:-1], forged(lines[-1], signature="00" * 64), b""]))
    with pytest.raises(BrokenTrailError, match="signature is not that of the records"):
        read_trail(path)
    assert repr(KEY) == f"Signer({KEY.public})"


def test_a_chain_without_signatures_is_not_the_keys(tmp_path: Path) -> None:
    with pytest.raises(BrokenTrailError, match="no record is signed"):
        read_trail(written(tmp_path), KEY.public)


def test_a_torn_last_line_is_cut_and_recorded(tmp_path: Path) -> None:
    path = written(tmp_path, 2)
    with path.open("ab") as file:
        file.write(b'{"hash":"12')
    assert read_trail(path).torn == b'{"hash":"12'
    AuditTrail(path)
    last = read_trail(path).records[-1]
    assert last["kind"] == "mended" and last["cut"] == '{"hash":"12'


def test_records_wait_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="megaforge")
    path = tmp_path / AUDIT_FILE
    trail = AuditTrail(path)
    head = trail.head
    monkeypatch.setattr(events.os, "write", lambda descriptor, line: 0)
    trail.append("save", step=1)
    assert trail.head == head, "checkpoints keep what the disk has"
    assert "1 records are not written yet" in caplog.text
    monkeypatch.undo()
    trail.append("save", step=2)
    assert [record.get("step") for record in read_trail(path).records] == [None, 1, 2]
    assert trail.head == read_trail(path).head


def test_a_broken_trail_is_set_aside_on_record(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = path.read_bytes().replace(b'"step":3', b'"step":4')
    path.write_bytes(content)
    assert set_aside(path, "a test", ["x"]) == tmp_path / (AUDIT_FILE + ".broken")
    assert (tmp_path / (AUDIT_FILE + ".broken")).read_bytes() == content
    about = read_trail(path).records[1]
    assert about["reason"] == "a test" and about["trails"] == ["x"] and "line 5" in about["problem"]
    assert set_aside(path, "again", []) == tmp_path / (AUDIT_FILE + ".broken.1")
    os.unlink(path)
    assert set_aside(path, "it is gone", []) is None
