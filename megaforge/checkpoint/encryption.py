"""Files encrypted at rest: AES-256-GCM in chunks, so that a tensor is read without the rest of its file.

The construction is STREAM (Hoang, Reyhanitabar, Rogaway and Vizar, CRYPTO 2015): a chunk's nonce is a random prefix,
the chunk's number and whether it is the last, so that chunks can be neither exchanged nor left out. A file begins with

    8 bytes   MFAESGCM
    4 bytes   little-endian length of the head
    head      JSON: which key, checkpoint, step and file; plain bytes; the file's own key, encrypted by the user's

and every chunk is authenticated together with all of that. Then come chunks of 4 MiB and their tags of 16 bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megaforge.errors import CheckpointError, DamagedCheckpointError, UserError, require
from megaforge.json_text import parse_json

KEY_VARIABLE, KEY_FILE_VARIABLE = "MEGAFORGE_KEY", "MEGAFORGE_KEY_FILE"
CHUNK = 4 << 20  # plain bytes; larger ones are no faster, and a small tensor is read with all of its chunk
ENCRYPTED_SUFFIX = ".aes"
_TAG, _PREFIX, _NONCE, _KEY = 16, 7, 12, 32
_MAGIC = b"MFAESGCM"
_MAX_HEAD = 1 << 16
_KEPT = 4  # decrypted chunks of a file that stay in memory: neighbouring tensors share them
_MAKE_ONE = "make one with: (umask 077; openssl rand -hex 32 >FILE)"


def _aead(key: bytes) -> Any:
    aead = require("cryptography.hazmat.primitives.ciphers.aead", "encrypt", "--encrypt-checkpoints")
    return aead.AESGCM(key)


def _invalid_tag() -> type[Exception]:
    kind: type[Exception] = require("cryptography.exceptions", "encrypt", "--encrypt-checkpoints").InvalidTag
    return kind


class Key:
    """A user's key of 32 bytes. What it is used for has keys of its own, derived from it; its text never shows it."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != _KEY:
            raise ValueError(f"a key has {_KEY} bytes, this one {len(secret)}")
        self._secret = secret
        self.id = self._derived(b"id")[:8].hex()

    def __repr__(self) -> str:
        return f"Key({self.id})"

    def _derived(self, purpose: bytes) -> bytes:
        return hmac.digest(self._secret, b"megaforge checkpoint " + purpose, "sha256")

    def sign(self, content: bytes) -> str:
        """The HMAC-SHA256 of ``content``, in hex."""
        return hmac.new(self._derived(b"manifest"), content, hashlib.sha256).hexdigest()

    def wrap(self, nonce: bytes, data_key: bytes, label: bytes) -> bytes:
        """``data_key``, encrypted for the place that ``label`` says."""
        wrapped: bytes = _aead(self._derived(b"wrap")).encrypt(nonce, data_key, label)
        return wrapped

    def unwrap(self, nonce: bytes, wrapped: bytes, label: bytes) -> bytes:
        """
        Raises:
            cryptography.exceptions.InvalidTag: it is another key's, of another place, or altered.
        """
        data_key: bytes = _aead(self._derived(b"wrap")).decrypt(nonce, wrapped, label)
        return data_key


def read_key(environment: Mapping[str, str] = os.environ) -> Key:
    """The key of checkpoints, as :func:`read_secret` finds it.

    Raises:
        UserError: there is none, there are two, or it is none. No message shows it.
    """
    secret = read_secret(KEY_VARIABLE, KEY_FILE_VARIABLE, environment)
    assert secret is not None
    return Key(secret)


def read_secret(
    variable: str, file_variable: str, environment: Mapping[str, str] = os.environ, *, optional: bool = False
) -> bytes | None:
    """The 32 bytes that the environment names: in hex or base64, in ``variable`` or in the file that ``file_variable``
    names, which nobody else may read; None where there are none and they are ``optional``.

    Raises:
        UserError: there are none, there are two, or they are not a key. No message shows them.
    """
    text, file = environment.get(variable), environment.get(file_variable)
    if text and file:
        raise UserError(f"{variable} and {file_variable} are both set; keep one of them")
    if not text and not file:
        if optional:
            return None
        raise UserError(f"no key: set {file_variable} to a file with one ({_MAKE_ONE}), or {variable}")
    where = variable
    if file:
        where = f"{file_variable}={file}"
        try:
            mode = os.stat(file).st_mode
            text = Path(file).read_text(encoding="ascii")
        except OSError as error:
            raise UserError(f"{where}: it cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: it holds no key in hex or base64; {_MAKE_ONE}") from error
        if mode & 0o077:
            raise UserError(f"{where}: others may read it; chmod 600 {file}")
    secret = _decoded((text or "").strip())
    if secret is None:
        raise UserError(f"{where}: expected {_KEY} bytes, as 64 hexadecimal digits or in base64; {_MAKE_ONE}")
    return secret


def _decoded(text: str) -> bytes | None:
    for decode in (bytes.fromhex, lambda text: base64.b64decode(text, validate=True)):
        try:
            secret = decode(text)
        except (ValueError, binascii.Error):
            continue
        if len(secret) == _KEY:
            return secret
    return None


@dataclass(frozen=True)
class Seal:
    """What the files of one encrypted checkpoint have in common.

    Attributes:
        key_id: of the key.
        checkpoint: random, in hex: no file of another checkpoint, not even of the same run and step, takes its place.
        key: the key itself, where it is known.
    """

    key_id: str
    checkpoint: str
    key: Key | None = field(default=None, compare=False)

    @classmethod
    def new(cls, key: Key, checkpoint: str) -> Seal:
        """Of a checkpoint that is about to be written."""
        return cls(key.id, checkpoint, key)

    def encryptor(self, step: int, file: str, plain_bytes: int) -> Encryptor:
        """What makes ``file`` of the checkpoint of ``step``."""
        if self.key is None:
            raise ValueError("the key of this seal is not known")
        return Encryptor(self.key, Label(self.checkpoint, step, file), plain_bytes)


class Label(NamedTuple):
    """Where an encrypted file belongs."""

    checkpoint: str
    step: int
    file: str

    def encode(self) -> bytes:
        return json.dumps(self).encode()


def _nonce(prefix: bytes, index: int, last: bool) -> bytes:
    return prefix + struct.pack(">IB", index, last)


class Encryptor:
    """Makes an encrypted file of ``plain_bytes`` bytes, in order: :attr:`head`, what :meth:`update` gives, then
    :meth:`finish`."""

    def __init__(self, key: Key, label: Label, plain_bytes: int) -> None:
        data_key, nonce, self._prefix = os.urandom(_KEY), os.urandom(_NONCE), os.urandom(_PREFIX)
        head = {
            "key": key.id,
            **label._asdict(),
            "bytes": plain_bytes,
            "chunk": CHUNK,
            "wrap": nonce.hex(),
            "data_key": key.wrap(nonce, data_key, label.encode()).hex(),
            "prefix": self._prefix.hex(),
        }
        text = json.dumps(head).encode()
        self.head = _MAGIC + struct.pack("<I", len(text)) + text
        self._cipher = _aead(data_key)
        self._index, self._left = 0, plain_bytes
        self._pending = bytearray()

    def update(self, data: memoryview) -> Iterator[bytes]:
        """Takes plain bytes; gives encrypted chunks as they become full."""
        self._left -= len(data)
        while len(self._pending) + len(data) > CHUNK:  # more follows, so this one is not the last
            if not self._pending:
                yield self._chunk(data[:CHUNK], last=False)
                data = data[CHUNK:]
            else:
                taken = CHUNK - len(self._pending)
                self._pending += data[:taken]
                data = data[taken:]
                yield self._chunk(self._pending, last=False)
                self._pending = bytearray()
        self._pending += data

    def finish(self) -> bytes:
        """The last chunk.

        Raises:
            ValueError: there were not as many plain bytes as was said.
        """
        if self._left:
            raise ValueError(f"{self._left} plain bytes are missing")
        return self._chunk(self._pending, last=True)

    def _chunk(self, plain: bytearray | memoryview, *, last: bool) -> bytes:
        sealed: bytes = self._cipher.encrypt(_nonce(self._prefix, self._index, last), plain, self.head)
        self._index += 1
        return sealed


class EncryptedFile:
    """The plain bytes of an encrypted file, any part of them.

    Attributes:
        size: how many there are.

    Raises:
        CheckpointError: it was encrypted by another key.
        DamagedCheckpointError: it is of another place than ``label`` says, cut short, or altered.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, key: Key, label: Label) -> None:
        self.path = path
        self._invalid = _invalid_tag()
        with open(path, "rb") as file:
            self._head, fields = self._read_head(file)
            size = os.fstat(file.fileno()).st_size
        found = Label(str(fields["checkpoint"]), int(fields["step"]), str(fields["file"]))
        if found != label:
            raise DamagedCheckpointError(
                f"{path}: this is {found.file} of another checkpoint (step {found.step}), in the place of {label.file} "
                f"of step {label.step}"
            )
        if fields["key"] != key.id:
            raise CheckpointError(f"{path}: it was encrypted by the key {fields['key']}, and this is {key.id}")
        try:
            data_key = key.unwrap(fields["wrap"], fields["data_key"], label.encode())
        except self._invalid as error:
            raise DamagedCheckpointError(f"{path}: its head has been altered: it is not what was encrypted") from error
        self._cipher, self._prefix, self.size = _aead(data_key), fields["prefix"], int(fields["bytes"])
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self._count = max(1, -(-self.size // CHUNK))
        expected = len(self._head) + self.size + self._count * _TAG
        if size != expected:
            raise DamagedCheckpointError(f"{path}: cut short or lengthened: {size} bytes instead of {expected}")

    def _read_head(self, file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
        start = file.read(len(_MAGIC) + 4)
        length = struct.unpack("<I", start[-4:])[0] if len(start) == len(_MAGIC) + 4 else _MAX_HEAD + 1
        if not start.startswith(_MAGIC) or length > _MAX_HEAD:
            raise DamagedCheckpointError(f"{self.path}: not a file that was encrypted by this program")
        text = file.read(length)
        try:
            fields = dict(parse_json(text))
            for name, size in (("wrap", _NONCE), ("data_key", _KEY + _TAG), ("prefix", _PREFIX)):
                fields[name] = bytes.fromhex(fields[name])
                if len(fields[name]) != size:
                    raise ValueError(f"{name} has {len(fields[name])} bytes")
            if int(fields["chunk"]) != CHUNK or not 0 <= int(fields["bytes"]) <= CHUNK << 32:
                raise ValueError("its chunks are of another size")
            fields["step"] = int(fields["step"])
            fields["key"], fields["checkpoint"], fields["file"]
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"{self.path}: its head is unreadable ({error})") from error
        return start + text, fields

    def read(self, begin: int, length: int) -> bytearray:
        """``length`` plain bytes from ``begin`` on, as far as there are so many.

        Raises:
            DamagedCheckpointError: a chunk of them has been altered or exchanged.
        """
        result = bytearray(max(0, min(begin + length, self.size) - begin))
        self.read_into(begin, memoryview(result))
        return result

    def read_into(self, begin: int, result: memoryview) -> None:
        """The plain bytes from ``begin`` on into ``result``, which there are as many of. Raises as :meth:`read`."""
        end = begin + len(result)
        for index in range(begin // CHUNK, -(-end // CHUNK)):
            start = index * CHUNK
            first, last = max(begin, start), min(end, start + CHUNK)
            result[first - begin : last - begin] = memoryview(self._chunk(index))[first - start : last - start]

    def _chunk(self, index: int) -> bytes:
        plain = self._chunks.pop(index, None)
        if plain is None:
            size = min(CHUNK, self.size - index * CHUNK) + _TAG
            with open(self.path, "rb") as file:
                file.seek(len(self._head) + index * (CHUNK + _TAG))
                encrypted = file.read(size)
            try:
                nonce = _nonce(self._prefix, index, index == self._count - 1)
                plain = self._cipher.decrypt(nonce, encrypted, self._head)
            except (self._invalid, ValueError) as error:
                raise DamagedCheckpointError(
                    f"{self.path}: its bytes {index * CHUNK} to {index * CHUNK + size - _TAG} have been altered or "
                    "exchanged: they are not what was encrypted"
                ) from error
        self._chunks[index] = plain
        if len(self._chunks) > _KEPT:
            self._chunks.popitem(last=False)
        return plain
