"""Encrypted files and checkpoints: read back by who has the key, refused by one clear line otherwise."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megaforge.checkpoint import encryption
from megaforge.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from megaforge.checkpoint.encryption import EncryptedFile, Encryptor, Key, Label, Seal, read_key
from megaforge.checkpoint.find import find_checkpoint
from megaforge.checkpoint.manifest import MANIFEST_FILE, SIGNATURE_FILE, SUMS_FILE, read_manifest, write_manifest
from megaforge.checkpoint.registry import list_checkpoints, verify_checkpoints
from megaforge.checkpoint.shards import TensorEntry
from megaforge.checkpoint.sources import open_source
from megaforge.errors import CheckpointError, UserError
from megaforge.parallel.context import ParallelContext
from megaforge.training.checkpointing import agreed_key
from tests.training.tiny import arguments, make_trainer, weights, write_dataset
from tools.convert_checkpoint import main

CTX = ParallelContext.single()
FILE = "rank_00000.safetensors.aes"
SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
KEY, LABEL = Key(SECRET), Label("c0ffee", 3, "x")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encryption, "CHUNK", 64)


@pytest.fixture
def with_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(encryption.KEY_VARIABLE, SECRET.hex())


def _encrypt(path: Path, plain: bytes, pieces: int, label: Label = LABEL) -> Path:
    encryptor, content = Encryptor(KEY, label, len(plain)), b""
    step = max(1, -(-len(plain) // pieces))
    for start in range(0, len(plain), step):
        content += b"".join(encryptor.update(memoryview(plain)[start : start + step]))
    path.write_bytes(encryptor.head + content + encryptor.finish())
    return path


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 128, 1000])
def test_any_part_of_any_length(tmp_path: Path, size: int) -> None:
    plain = os.urandom(size)
    for pieces in (1, 3, max(size, 1)):
        file = EncryptedFile(_encrypt(tmp_path / "x", plain, pieces), KEY, LABEL)
        assert file.size == size and file.read(0, size) == plain
        for begin in range(0, size, 37):
            for length in (0, 1, 64, 200):
                assert file.read(begin, length) == plain[begin : begin + length]
    with pytest.raises(ValueError, match="5 plain bytes are missing"):
        Encryptor(KEY, LABEL, 5).finish()


def _refusal(path: Path, key: Key = KEY, label: Label = LABEL) -> str:
    with pytest.raises(CheckpointError) as refused:
        file = EncryptedFile(path, key, label)
        file.read(0, file.size)
    return str(refused.value)


def test_every_changed_byte_is_refused_and_so_is_every_length(tmp_path: Path) -> None:
    path = _encrypt(tmp_path / "x", bytes(200), 1)
    content = path.read_bytes()
    said = set()
    for position in range(0, len(content), 3):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        said.add(_refusal(path).removeprefix(f"{path}: ")[:12])
    assert {"its head has", "its bytes 0 ", "its bytes 64"} <= said
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        _refusal(path)
    path.write_bytes(content[:-30])
    assert "cut short or lengthened: " in _refusal(path)
    path.write_bytes(content + b"x")
    assert "cut short or lengthened: " in _refusal(path)


def test_chunks_and_files_stay_in_their_places(tmp_path: Path) -> None:
    path = _encrypt(tmp_path / "x", bytes(256), 1)
    content, sealed = path.read_bytes(), 64 + 16
    body = len(content) - 4 * sealed
    first, second, third, last = (content[body + n * sealed : body + (n + 1) * sealed] for n in range(4))
    for order in ((second, first, third, last), (first, first, third, last), (first, second, last, third)):
        path.write_bytes(content[:body] + b"".join(order))
        assert "have been altered or exchanged" in _refusal(path)
    path.write_bytes(content)
    for other in (LABEL._replace(step=4), LABEL._replace(file="y"), LABEL._replace(checkpoint="bad")):
        assert "of another checkpoint (step 3), in the place of" in _refusal(path, label=other)
    forged = content.replace(b'"step": 3', b'"step": 4')
    path.write_bytes(forged)
    assert "its head has been altered" in _refusal(path, label=LABEL._replace(step=4))
    path.write_bytes(content)
    stranger = Key(OTHER)
    assert _refusal(path, stranger) == f"{path}: it was encrypted by the key {KEY.id}, and this is {stranger.id}"
    path.write_bytes(bytes(100))
    assert "not a file that was encrypted by this program" in _refusal(path)


def test_where_the_key_comes_from_and_that_nothing_shows_it(tmp_path: Path) -> None:
    file = tmp_path / "key"
    texts = (SECRET.hex(), SECRET.hex().upper() + "\n", base64.b64encode(SECRET).decode())
    for text in texts:
        file.write_text(text)
        file.chmod(0o600)
        assert read_key({"MEGAFORGE_KEY": text}).id == read_key({"MEGAFORGE_KEY_FILE": str(file)}).id == KEY.id
    file.chmod(0o640)
    for environment, said in (
        ({}, "no key: set MEGAFORGE_KEY_FILE"),
        ({"MEGAFORGE_KEY": texts[0], "MEGAFORGE_KEY_FILE": "f"}, "both set"),
        ({"MEGAFORGE_KEY_FILE": str(file)}, f"others may read it; chmod 600 {file}"),
        ({"MEGAFORGE_KEY_FILE": str(tmp_path / "none")}, "cannot be read .No such file"),
        ({"MEGAFORGE_KEY": texts[0][:-2]}, "MEGAFORGE_KEY: expected 32 bytes, as 64 hexadecimal digits"),
        ({"MEGAFORGE_KEY": "sesame"}, "expected 32 bytes"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            read_key(environment)
        assert SECRET.hex()[:8] not in str(refused.value) and "sesame" not in str(refused.value)
    shown = f"{KEY} {KEY!r} {Seal.new(KEY, 'c')}"
    assert KEY.id in shown and SECRET.hex()[:8] not in shown and str(SECRET) not in shown


def _entries(value: float) -> list[TensorEntry]:
    shapes = {"a": (40, 3), "b": (), "d": (7,)}
    kinds = {"a": torch.float32, "b": torch.float64, "d": torch.bfloat16}
    return [TensorEntry(name, None, torch.full(shape, value, dtype=kinds[name])) for name, shape in shapes.items()]


def _save(directory: Path, step: int, key: Key | None = KEY) -> Path:
    return save_checkpoint(directory, step, _entries(step + 0.25), {"step": step}, CTX, key=key)


def _load(path: Path) -> None:
    entries = _entries(0.0)
    step = load_checkpoint(path, entries, CTX, verify=False)["step"]
    assert all((entry.tensor == step + 0.25).all() for entry in entries)


def test_a_checkpoint_is_read_with_its_key_alone(
    tmp_path: Path, with_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plain = _save(tmp_path, 1), _save(tmp_path / "plain", 1, None)
    text = (path / FILE).read_bytes()
    pattern = torch.full((3,), 1.25).numpy().tobytes()
    assert pattern not in text and b'"a"' not in text and pattern in (plain / FILE[:-4]).read_bytes()
    assert sorted(file.name for file in path.iterdir()) == [SUMS_FILE, SIGNATURE_FILE, MANIFEST_FILE, FILE]
    sums = dict(reversed(line.split("  ")) for line in (path / SUMS_FILE).read_text().splitlines())
    assert sums == {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in sums} and len(sums) == 3
    _load(find_checkpoint(tmp_path, CTX))
    source = open_source(tmp_path)
    assert source.encrypted and not open_source(plain).encrypted
    assert torch.equal(source.read("a", ((3, 9), (1, 2))), torch.full((6, 1), 1.25))
    [row] = verify_checkpoints(tmp_path)
    assert row.problem is None
    monkeypatch.setenv(encryption.KEY_VARIABLE, OTHER.hex())
    for action in (lambda: _load(path), lambda: open_source(path)):
        with pytest.raises(CheckpointError, match=f"encrypted by the key {KEY.id}, and this is {Key(OTHER).id}"):
            action()
    monkeypatch.delenv(encryption.KEY_VARIABLE)
    with pytest.raises(CheckpointError, match=f"it is encrypted .key {KEY.id}.: no key: set MEGAFORGE_KEY_FILE"):
        _load(path)
    [listed], [verified] = list_checkpoints(tmp_path), verify_checkpoints(tmp_path)
    assert listed.problem is None and "no key" in str(verified.problem)


def _forge(path: Path) -> None:
    """Another manifest, with hashes that agree, as somebody without the key can make it."""
    write_manifest(path, dataclasses.replace(read_manifest(path), metric=0.5))


def test_forged_checkpoints_are_refused(tmp_path: Path, with_key: None) -> None:
    path, twin, later = _save(tmp_path / "a", 1), _save(tmp_path / "b", 1), _save(tmp_path / "a", 2)
    whole = (path / FILE).read_bytes()
    for other in (twin, later):  # their hashes are no secret, and the signed manifest stays as it was
        shutil.copy(other / FILE, path / FILE)
        with pytest.raises(CheckpointError, match=f"this is {FILE} of another checkpoint"):
            _load(path)
    for altered in (whole[:-20], whole[:-1] + bytes([whole[-1] ^ 1])):
        (path / FILE).write_bytes(altered)
        with pytest.raises(UserError, match="bytes instead of|has been altered"):
            find_checkpoint(path, CTX)
        with pytest.raises(CheckpointError, match="cut short|altered or exchanged"):
            _load(path)
    (path / FILE).write_bytes(whole)
    _load(path)
    _forge(path)
    with pytest.raises(CheckpointError, match="manifest.json has been altered: it is not what was signed"):
        _load(path)
    (path / SIGNATURE_FILE).unlink()
    with pytest.raises(CheckpointError, match="manifest.hmac is missing"):
        _load(path)


def test_a_run_goes_on_from_what_it_encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_key: None) -> None:
    monkeypatch.setattr(encryption, "CHUNK", 1 << 12)
    prefix = write_dataset(tmp_path / "d")
    whole = make_trainer(arguments(prefix))
    whole.train()
    save = str(tmp_path / "run")
    line = arguments(prefix, "--save", save, "--encrypt-checkpoints", "--async-save", "--save-interval", "2")
    make_trainer([*line, "--train-iters", "4"]).train()
    resumed = make_trainer([*line, "--load", save])
    assert resumed.iteration == 4
    resumed.train()
    assert all(map(torch.equal, weights(resumed).values(), weights(whole).values()))
    assert {file.name for file in Path(save).rglob("rank_*")} == {FILE}
    for more in (("--load", save), ("--load", save, "--finetune")):
        with pytest.raises(UserError, match="would hold plain checkpoints: add --encrypt-checkpoints"):
            make_trainer(arguments(prefix, "--save", str(tmp_path / "plain"), *more))
    assert make_trainer(arguments(prefix, "--load", save)).iteration == 6, "what saves nothing may read it"

    def convert(*line: str) -> int:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "--load", *line])
        return main()

    file, moved = str(tmp_path / "x.safetensors"), str(tmp_path / "moved")
    with pytest.raises(UserError, match="is encrypted, and --save .* is plain; add --plain"):
        convert(save, "--save", file)
    assert convert(save, "--save", file, "--plain") == convert(save, "--save", moved) == 0
    encrypted, plain = open_source(moved), open_source(file)
    assert encrypted.encrypted and not plain.encrypted
    assert all(torch.equal(encrypted.read(key), plain.read(key)) for key in plain.tensors)
    with pytest.raises(UserError, match="--plain: .* is not encrypted"):
        convert(file, "--save", str(tmp_path / "y.safetensors"), "--plain")
    monkeypatch.delenv(encryption.KEY_VARIABLE)
    with pytest.raises(UserError, match="^--encrypt-checkpoints: no key"):
        make_trainer([*line, "--load", save])


def _agree(secrets: list[bytes]) -> str:
    ctx = ParallelContext.create()
    os.environ[encryption.KEY_VARIABLE] = secrets[ctx.world.rank].hex()
    try:
        return agreed_key(ctx).id
    except UserError as error:
        return str(error)
    finally:
        del os.environ[encryption.KEY_VARIABLE]


def test_all_ranks_have_one_key(ranks) -> None:
    assert ranks.run(2, _agree, [SECRET, SECRET]) == [KEY.id] * 2
    [said, same] = ranks.run(2, _agree, [SECRET, OTHER])
    assert said == same and "the ranks have 2 keys" in said
