"""``audit.jsonl``: every operation of a run, one record a line, each with the hash of the one before it.

A line is JSON with sorted names and without blanks; ``hash`` is the SHA-256 of the line without it, so that no byte,
record or order can change unseen. Records cut off at the end show by the checkpoints, each of which keeps the chain's
head (:mod:`megaforge.checkpoint.anchors`), and with a key there are signatures (Ed25519, RFC 8032), one every 100
records and one at the run's end.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaforge.errors import UserError, require
from megaforge.json_text import parse_json
from megaforge.monitor.events import append_line, finite

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.jsonl"
SIGNED_EVERY = 100
_OWN = ("number", "time", "kind", "previous", "hash")
_NOTHING = "0" * 64  # the hash before the first record
_REMEDY = "restore the file, or set it aside and begin another: python tools/audit.py set-aside {run} --reason TEXT"


class BrokenTrailError(UserError):
    """A trail is not what was written."""


class Signer:
    """Signs heads by a private key of 32 bytes. Its text never shows it.

    Raises:
        UserError: there is no ``cryptography``.
    """

    def __init__(self, secret: bytes) -> None:
        self._key = _ed25519().Ed25519PrivateKey.from_private_bytes(secret)
        self.public: str = self._key.public_key().public_bytes_raw().hex()

    def __repr__(self) -> str:
        return f"Signer({self.public})"

    def sign(self, head: Mapping[str, Any]) -> str:
        """The signature of ``head``, in hex."""
        signature: bytes = self._key.sign(_encoded(head))
        return signature.hex()


def _ed25519() -> Any:
    return require("cryptography.hazmat.primitives.asymmetric.ed25519", "encrypt", "a signed audit trail")


def _encoded(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_encoded({name: value for name, value in record.items() if name != "hash"})).hexdigest()


@dataclass
class Trail:
    """A chain that holds.

    Attributes:
        name: of the trail, drawn when it was begun.
        hashes: of its records, in their order.
        records: as they stand.
        signed: how many records the newest signature covers.
        keys: that signed, in hex.
        torn: a last line that a kill cut short; no record.
    """

    name: str = ""
    hashes: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    signed: int = 0
    keys: list[str] = field(default_factory=list)
    torn: bytes = b""

    @property
    def head(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"trail": self.name, "records": len(self.hashes), "hash": self.hashes[-1] if self.hashes else _NOTHING}


def read_trail(path: Path, public_key: str | None = None) -> Trail:
    """The records of ``path``, the chain and its signatures checked.

    Args:
        public_key: in hex; whose signatures they must be, and there must be one.

    Raises:
        BrokenTrailError: names the first line that does not follow from those before it.
        UserError: the file cannot be read.
    """
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    trail = Trail(torn=torn)
    for number, line in enumerate(lines):
        record = _checked(trail, number, line, f"{path}: line {number + 1}")
        trail.records.append(record)
        trail.hashes.append(record["hash"])
        if record["kind"] == "signature":
            _check_signature(trail, record, public_key, f"{path}: line {number + 1}")
    if not trail.records:
        raise BrokenTrailError(f"{path}: holds no record")
    if public_key is not None and not trail.signed:
        raise BrokenTrailError(f"{path}: no record is signed")
    return trail


def _checked(trail: Trail, number: int, line: bytes, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise BrokenTrailError(f"{where} is not JSON: it was altered") from error
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise BrokenTrailError(f"{where} is not a record: it was altered")
    named = f"{where} ({record['kind']})"
    try:
        canonical = _encoded(record)
    except (ValueError, RecursionError) as error:
        raise BrokenTrailError(f"{named}: it was altered") from error
    if canonical != line or record.get("hash") != _hash(record):
        raise BrokenTrailError(f"{named}: its content is not what was hashed: it was altered")
    if record.get("number") != number:
        raise BrokenTrailError(f"{named} is record {record.get('number')}, expected {number}: deleted or reordered")
    if record.get("previous") != trail.head["hash"]:
        raise BrokenTrailError(f"{named} does not follow the record before it: that one was altered or exchanged")
    if number == 0:
        if record["kind"] != "begin" or not isinstance(record.get("trail"), str):
            raise BrokenTrailError(f"{named}: a trail begins with its name")
        trail.name = record["trail"]
    return record


def _check_signature(trail: Trail, record: Mapping[str, Any], public_key: str | None, where: str) -> None:
    """That ``record``, the newest of ``trail``, signs all before it."""
    key, covered = record.get("key"), len(trail.hashes) - 1
    head = {"trail": trail.name, "records": covered, "hash": record["previous"]}
    if public_key is not None and key != public_key:
        raise BrokenTrailError(f"{where} is signed by another key: {key}")
    try:
        public = _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(str(key)))
        public.verify(bytes.fromhex(str(record.get("signature"))), _encoded(head))
    except (
        ValueError,
        require("cryptography.exceptions", "encrypt", "a signed audit trail").InvalidSignature,
    ) as error:
        raise BrokenTrailError(f"{where}: the signature is not that of the records before it") from error
    trail.signed = covered
    if key not in trail.keys:
        trail.keys.append(str(key))


class AuditTrail:
    """Appends records; for the first rank of a run. Any thread may.

    Raises:
        UserError: the trail that is there is broken, or the file cannot be written.
    """

    def __init__(self, path: Path, signer: Signer | None = None) -> None:
        self._path, self._signer, self._lock = path, signer, threading.Lock()
        self._waiting: list[bytes] = []  # records that the disk did not take yet
        self._durable: dict[str, Any] = {}
        if path.exists():
            try:
                self._trail = read_trail(path)
            except BrokenTrailError as error:
                raise UserError(f"--audit-trail: {error}; {_REMEDY.format(run=path.parent)}") from error
            self._mend()
        else:
            self._trail = Trail(secrets.token_hex(8))
            self.append("begin", trail=self._trail.name)
        if self._waiting:
            raise UserError(f"--audit-trail: {path} cannot be written")
        self._durable = self._trail.head

    def _mend(self) -> None:
        torn = self._trail.torn
        if torn:
            with self._path.open("rb+") as file:
                file.truncate(self._path.stat().st_size - len(torn))
            self.append("mended", cut=torn.decode(errors="backslashreplace"))

    @property
    def head(self) -> dict[str, Any]:
        """Of what the disk has: for a checkpoint's manifest."""
        return dict(self._durable)

    @property
    def trail(self) -> Trail:
        """What it holds."""
        return self._trail

    def append(self, kind: str, **fields: Any) -> None:
        """Appends a record (JSON values); when this returns the disk has it. What a disk does not take is a warning,
        and is written before the next record."""
        with self._lock:
            self._add(kind, fields)
            if self._signer is not None and len(self._trail.hashes) - self._trail.signed > SIGNED_EVERY:
                self._sign(self._signer)
            self._write()

    def sign(self) -> None:
        """Signs the head, where there is a key and something new."""
        with self._lock:
            if self._signer is not None and len(self._trail.hashes) > self._trail.signed + 1:
                self._sign(self._signer)
                self._write()

    def heard(self, event: Mapping[str, Any]) -> None:
        """Records an event of the run (:class:`megaforge.monitor.events.EventLog`); its end is signed."""
        if event["kind"] != "progress":
            own = {name: value for name, value in event.items() if name not in ("kind", "time")}
            self.append(event["kind"], **own)
        if event["kind"] == "goodput":
            self.sign()

    def _sign(self, signer: Signer) -> None:
        covered = len(self._trail.hashes)
        self._add("signature", {"key": signer.public, "signature": signer.sign(self._trail.head)})
        self._trail.signed = covered

    def _add(self, kind: str, fields: Mapping[str, Any]) -> None:
        body = {
            **{f"{name}_" if name in _OWN else name: value for name, value in finite(fields).items()},
            "number": len(self._trail.hashes),
            "time": round(time.time(), 3),
            "kind": kind,
            "previous": self._trail.head["hash"],
        }
        record = body | {"hash": _hash(body)}
        self._trail.hashes.append(record["hash"])
        self._waiting.append(_encoded(record) + b"\n")

    def _write(self) -> None:
        try:
            append_line(self._path, b"".join(self._waiting))
        except OSError as error:
            logger.warning("%s: %d records are not written yet: %s", self._path, len(self._waiting), error)
            return
        self._waiting = []
        self._durable = self._trail.head


def set_aside(path: Path, reason: str, replaces: Sequence[str]) -> Path | None:
    """Renames a trail to ``NAME.broken`` and begins another, whose first record says why.

    Args:
        replaces: names of the trails whose heads the checkpoints keep.

    Returns:
        What it is called now; None where there was none.

    Raises:
        UserError: it cannot be renamed or written.
    """
    moved, problem, digest = None, "there was no trail", None
    try:
        if path.exists():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            problem = _problem(path)
            count, moved = 0, path.with_name(path.name + ".broken")
            while moved.exists():
                count += 1
                moved = path.with_name(f"{path.name}.broken.{count}")
            path.rename(moved)
    except OSError as error:
        raise UserError(f"{path}: cannot be set aside ({error.strerror})") from error
    trail = AuditTrail(path)
    about = {"file": moved.name if moved else None, "sha256": digest, "problem": problem}
    trail.append("replaces", reason=reason, trails=sorted(replaces), **about)
    return moved


def _problem(path: Path) -> str:
    try:
        _ = read_trail(path)
    except UserError as error:
        return str(error)
    return "none"
