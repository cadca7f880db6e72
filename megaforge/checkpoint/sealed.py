"""The files of a checkpoint, which may be encrypted: who has its key reads them like others."""

from __future__ import annotations

import dataclasses
import hmac
from pathlib import Path

from megaforge.checkpoint.encryption import EncryptedFile, Label, read_key
from megaforge.checkpoint.manifest import MANIFEST_FILE, SIGNATURE_FILE, Manifest
from megaforge.checkpoint.safetensors_file import SafetensorsFile
from megaforge.errors import CheckpointError, DamagedCheckpointError, UserError


def unlocked(path: Path, manifest: Manifest) -> Manifest:
    """``manifest`` of the checkpoint ``path``; an encrypted one's with the key, which it was signed with.

    Raises:
        CheckpointError: there is no key, or it is another one.
        DamagedCheckpointError: the manifest is not what was signed.
        OSError: it cannot be read.
    """
    seal = manifest.seal
    if seal is None:
        return manifest
    try:
        key = read_key()
    except UserError as error:
        raise CheckpointError(f"{path}: it is encrypted (key {seal.key_id}): {error}") from error
    if key.id != seal.key_id:
        raise CheckpointError(f"{path}: it was encrypted by the key {seal.key_id}, and this is {key.id}")
    try:
        signature = (path / SIGNATURE_FILE).read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path}: {SIGNATURE_FILE} is missing") from error
    if not hmac.compare_digest(signature.encode(), key.sign((path / MANIFEST_FILE).read_bytes()).encode()):
        raise DamagedCheckpointError(f"{path}: {MANIFEST_FILE} has been altered: it is not what was signed")
    return dataclasses.replace(manifest, seal=dataclasses.replace(seal, key=key))


def open_tensors(path: Path, name: str, manifest: Manifest) -> SafetensorsFile:
    """The file ``name`` of the checkpoint ``path``; ``manifest`` is :func:`unlocked`.

    Raises:
        DamagedCheckpointError: it is not what was written.
        OSError: it cannot be read.
    """
    seal = manifest.seal
    if seal is None:
        return SafetensorsFile(path / name)
    if seal.key is None:
        raise ValueError(f"{path} is encrypted, and its manifest was not unlocked")
    label = Label(seal.checkpoint, manifest.step, name)
    return SafetensorsFile(path / name, EncryptedFile(path / name, seal.key, label))
